"""Callbacks look at the right thing: the trained backbone, the view at hand, the steps that are left."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from batches import Optimized, apart, batch_of, fitted, method, teacher_of, views_of
from pytorch_lightning.loggers import Logger
from torch import Tensor

from glpretrain.callbacks import LogViews, RunEvaluators, RunProgress, Throughput, TrainingHealth
from glpretrain.callbacks.views import columns
from glpretrain.core.batch import Batch
from glpretrain.core.schedule import Schedule
from glpretrain.data import Scenes
from glpretrain.data.sources.base import Source
from glpretrain.data.sources.images.videos import VideoSource
from glpretrain.encoders import Encoder, PointTransformer, ViT
from glpretrain.evaluate import Evaluator, FeatureCache, Result, Score, Sources
from glpretrain.methods import DINO


@dataclass(frozen=True, kw_only=True)
class FirstFeature(Evaluator):
    """The mean of the first feature: as good a score as any to tell one encoder from another."""

    headlines = ("feature",)
    scored = "test"
    needs = ("test",)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        rows = [output.cls for _, output in self.features.encode(encoder, sources["test"], resize="crop", cache=cache)]
        return Result({"feature": Score(torch.cat(rows)[:, 0].mean().item(), None, None, 4)}, chosen={})


def sources() -> dict[str, Source | VideoSource]:
    return {"test": Scenes(4, size=32)}


class Notes(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[dict[str, float], int | None]] = []

    @property
    def name(self) -> str:
        return "notes"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((metrics, step))

    def log_hyperparams(self, params: object) -> None:
        """Nothing to keep."""


def dino() -> DINO:
    encoder = ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    optimized = Optimized(lr=Schedule(0.02, shape="constant"))
    return apart(method(DINO, encoder, optimized, num_prototypes=7, hidden_dim=11, bottleneck_dim=5, momentum=Schedule(0.5)))


def batches(count: int) -> list[Batch]:
    return [batch_of(global_views=views_of("g", 2, step=step)) for step in range(count)]


def test_the_teachers_encoder_is_scored_as_it_is_at_the_moment() -> None:
    model, evaluator, notes = dino(), FirstFeature(), Notes()
    before = evaluator.run(teacher_of(model).encoder, sources()).scores["feature"].value
    evaluators = RunEvaluators({"first": evaluator}, sources(), every_n_steps=1)
    fitted(model, batches(2), callbacks=[evaluators], logger=notes)
    after, student = (evaluator.run(encoder, sources()).scores["feature"].value for encoder in (model.backbone(), model.encoder))
    assert len({round(value, 4) for value in (before, after, student)}) == 3
    assert evaluators.before is not None and evaluators.before["first_feature"] == pytest.approx(before)
    assert evaluators.after is not None and evaluators.after["first_feature"] == pytest.approx(after)
    logged = [(metrics["eval/first/feature"], step) for metrics, step in notes.rows if "eval/first/feature" in metrics]
    assert [step for _, step in logged] == [0, 1, 2, 2]
    assert (logged[0][0], logged[-1][0]) == (pytest.approx(before), pytest.approx(after))


def test_the_table_has_before_after_and_change_in_this_order() -> None:
    evaluators = RunEvaluators({"first": FirstFeature()})
    names = ("first_feature", "first_feature_low", "first_feature_high")
    evaluators.before, evaluators.after = (dict(zip(names, (value, value - 0.5, value + 1), strict=True)) for value in (20.0, 30.0))
    rows = [list(column.cells) for column in evaluators.table().columns]
    assert rows[1:4] == [["20.0 [19.5, 21.0]"], ["30.0 [29.5, 31.0]"], ["+10.0"]]


class Clock:
    """Stands in for a trainer in the middle of a run."""

    global_step, estimated_stepping_batches = 10, 100
    progress_bar_metrics: dict[str, float] = {"train/loss": 2.5}  # noqa: RUF012

    @property
    def lightning_module(self) -> "Clock":
        return self

    def progress(self) -> float:
        return self.global_step / 100


def test_the_time_left_is_that_of_the_steps_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("glpretrain.callbacks.progress.time.perf_counter", lambda: now[0])
    progress, clock = RunProgress(Throughput()), Clock()
    progress.disable()
    progress.on_train_start(clock, dino())  # pyright: ignore[reportArgumentType]  a trainer as far as it is looked at
    clock.global_step, now[0] = 30, 1040.0  # two seconds a step, 70 steps to go
    assert progress.text(clock) == "step 30/100  loss 2.500  0:02:20 left"  # pyright: ignore[reportArgumentType]


class Usage(pl.Callback):
    """Notes each report of prototypes, and what the teacher's assignments were."""

    def __init__(self) -> None:
        self.reports: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if "health/cls/perplexity" in trainer.callback_metrics and (trainer.global_step % 2 == 0):
            self.reports.append(float(trainer.callback_metrics["health/cls/perplexity"]))


def test_a_report_of_prototypes_is_of_the_last_steps_alone() -> None:
    model, usage, targets = dino(), Usage(), list[Tensor]()
    model.cls_objective.register_forward_hook(
        lambda module, args, given, output: targets.append(
            model.cls_objective.targets(given["teacher_logits"], teacher_temp=given["teacher_temp"]).flatten(0, 1)
        ),
        with_kwargs=True,
    )
    fitted(model, batches(4), callbacks=[TrainingHealth(every_n_steps=2, num_steps=1), usage])
    means = [targets[step].mean(dim=0) for step in (1, 3)]
    assert usage.reports == pytest.approx([torch.exp(-(mean * mean.log()).sum()).item() for mean in means], rel=1e-4)


def test_every_view_is_shown_with_its_own_mask() -> None:
    encoder = ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    mask = torch.tensor([[False, True, False, False], [False, False, False, True]]).unsqueeze(1)  # [G 1 N]
    shown = columns(batch_of(global_views=torch.ones(2, 1, 3, 16, 16), mask=mask), encoder, num_items=1)
    darker = [shown[f"global {view}, hidden"] < shown[f"global {view}"] for view in (1, 2)]  # [1 H W 3]
    assert darker[0][:, :8, 8:].all() and not darker[0][:, 8:].any() and not darker[0][:, :8, :8].any()
    assert darker[1][:, 8:, 8:].all() and not darker[1][:, :8].any()


def test_every_view_is_shown_with_its_own_corruption() -> None:
    encoder = ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    corruption = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    corruption[0, 0, 3, 5] = corruption[1, 0, 12, 2] = True
    views = torch.ones(2, 1, 3, 16, 16)
    shown = columns(batch_of(global_views=views, corrupted_views=-views, corruption=corruption), encoder, num_items=1)
    for view in range(2):
        darker = (shown[f"global {view + 1}, replaced"] < shown[f"global {view + 1}"]).all(dim=-1)
        assert torch.equal(darker, corruption[view])
        assert (shown[f"global {view + 1}, corrupted"] < shown[f"global {view + 1}"]).all()


def test_hidden_groups_of_a_cloud_are_drawn_darker() -> None:
    cloud = torch.tensor([[[-1.0, 0.0, 0.0], [-0.9, 0.0, 0.0], [1.0, 0.0, 0.0], [0.9, 0.0, 0.0]]])  # two groups, left and right
    encoder = PointTransformer("pos_bert_base", num_points=4, points_per_token=2, group_size=2, embed_dim=12, depth=1, num_heads=3)
    mask = torch.zeros(1, 1, 2, dtype=torch.bool)
    mask[..., 0] = True  # the group of the first point, from which the farthest is sought
    shown = columns(batch_of(global_views=cloud.unsqueeze(0), mask=mask), encoder, num_items=1)
    darker = (shown["global 1, hidden"] < shown["global 1"]).all(dim=-1)[0].any(dim=0)  # [w]
    assert int(darker.sum()) == 2 and not darker[len(darker) // 2 :].any()


def test_the_picture_is_of_the_first_batch_alone(tmp_path: Path) -> None:
    seen: list[float] = []
    path = tmp_path / "views.png"

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: object, pl_module: object, outputs: object, batch: object, batch_idx: int) -> None:
            seen.append(path.stat().st_mtime_ns)

    fitted(dino(), batches(2), callbacks=[LogViews(path), Look()])
    assert seen[0] == seen[1]
