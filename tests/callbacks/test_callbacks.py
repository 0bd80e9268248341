"""Callbacks read and never change: scores before and after, the picture of the views, the speed, the progress line, the loggers."""

import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import batch_of
from PIL import Image
from rich.console import Console
from shrinking import ROOT, shrunk
from torch import Tensor

from glpretrain import modalities
from glpretrain.callbacks import RunEvaluators, Throughput, TrainingHealth
from glpretrain.callbacks.evaluators import result_key
from glpretrain.callbacks.loggers import wandb_mode
from glpretrain.callbacks.verdicts import usage
from glpretrain.callbacks.views import columns, grid_figure
from glpretrain.cli.pretraining import pretrain
from glpretrain.cli.training import Training
from glpretrain.core.batch import Batch
from glpretrain.data import Scenes
from glpretrain.encoders import Encoder, ViT
from glpretrain.evaluate import KNN, Evaluator, FeatureCache, Result, Score, Sources
from glpretrain.objectives.distillation import Distillation


@dataclass(frozen=True, kw_only=True)
class Probe(Evaluator):
    """Answers with the number of runs so far, and disturbs everything that a callback has to put back."""

    headlines = ("accuracy",)
    scored = "test"
    needs = ("test",)

    seen: list[bool] = field(default_factory=list)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        self.seen.append(encoder.training)
        encoder.train()
        torch.manual_seed(13)
        np.random.seed(13)
        random.seed(13)
        time.sleep(0.05)
        return Result({"accuracy": Score(10.0 * len(self.seen), 10.0 * len(self.seen) - 0.5, 11.0 * len(self.seen), 3)}, chosen={"k": 7.0})


def watching(probe: Probe, **options) -> RunEvaluators:
    return RunEvaluators({"probe": probe}, {"test": Scenes(1)}, **options)


def training(tmp_path: Path, *options: str, recipe: str = "mae") -> Training:
    arguments = [
        "--config",
        str(shrunk(ROOT / f"{recipe}.yaml", tmp_path)),
        "--runs",
        str(tmp_path / "runs"),
        "--evaluate",
        "false",
        "--report",
        "false",
    ]
    return Training([*arguments, "--trainer.logger", "false", "--trainer.enable_progress_bar", "false", *options])


def batch(*, mask: bool, corrupted: bool) -> Batch:
    """G=2, L=3, B=5 items of 16 x 24 pixels with patches of 8."""
    views = torch.sin(torch.arange(2 * 5 * 3 * 16 * 24).reshape(2, 5, 3, 16, 24) * 0.01)
    hidden = torch.zeros(2, 5, 6, dtype=torch.bool)
    hidden[:, :, 1] = True  # the second patch of the upper row
    corruption = torch.zeros(2, 5, 16, 24, dtype=torch.bool)
    corruption[..., :4, :] = True
    return batch_of(
        views,
        local_views=views[:1, :, :, :8, :8].expand(3, -1, -1, -1, -1),
        mask=hidden if mask else None,
        corrupted_views=-views if corrupted else None,
        corruption=corruption if corrupted else None,
    )


def encoder() -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=(16, 24), patch_size=8, embed_dim=6, depth=1, num_heads=3)


def test_scores_before_and_after_reach_the_results(tmp_path: Path) -> None:
    cli = training(tmp_path)
    probe = Probe()
    evaluators = watching(probe, every_n_steps=1)
    cli.evaluators = evaluators
    cli.trainer.callbacks.insert(0, evaluators)
    results = cli.fit().results
    assert results["before"] == {"probe": 10.0, "probe_low": 9.5, "probe_high": 11.0, "probe_n": 3.0, "probe_k": 7.0}
    assert results["measured_on"] == {"probe": "scenes"}
    assert results["after"]["probe"] == 40.0  # before, after each of the two steps, after all
    assert results["evaluation_seconds"] >= 0.2
    assert probe.seen == [False] * 4


def test_resumed_run_does_not_claim_random_weights(tmp_path: Path) -> None:
    checkpoint = training(tmp_path).fit().folder / "checkpoints" / "last.ckpt"
    cli = training(tmp_path, "--ckpt_path", str(checkpoint), "--trainer.max_steps", "3")
    cli.evaluators = watching(Probe())
    cli.trainer.callbacks.insert(0, cli.evaluators)
    results = cli.fit().results
    assert results["before"] is None
    assert results["after"]["probe"] == 10.0


def test_evaluation_changes_neither_mode_nor_random_state_nor_training(tmp_path: Path) -> None:
    plain = training(tmp_path, recipe="dino")
    plain.fit()
    watched = training(tmp_path, recipe="dino")
    watched.trainer.callbacks.insert(0, watching(Probe(), every_n_steps=1))
    modes = [module.training for module in watched.model.modules()]
    state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    watched.trainer.callbacks[0]._evaluate(watched.trainer, watched.model)
    assert [module.training for module in watched.model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()
    watched.fit()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, watched.model.state_dict()[name]), name


def test_interval_of_evaluation_is_checked() -> None:
    with pytest.raises(ValueError, match="every_n_steps is a positive number or null, not 0"):
        RunEvaluators(every_n_steps=0)


def test_table_shows_headlines_with_their_change() -> None:
    evaluators = RunEvaluators({"knn": Probe(), "linear": Probe()})
    evaluators.before = {"knn": 10.0, "knn_low": 9.0, "knn_high": 11.0, "knn_k10": 9.0, "linear": 30.0, "linear_low": None}
    evaluators.after = {"knn": 14.0, "knn_low": 12.5, "knn_high": 16.0, "knn_k10": 9.5, "linear": 29.0, "linear_low": None}
    evaluators.measured_on = {"knn": "photos"}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(evaluators.table())
    text = console.export_text()
    assert "14.0 [12.5, 16.0]" in text and "30.0 " in text
    assert "+4.0" in text
    assert "-1.0" in text
    assert "photos" in text
    assert "k10" not in text


def test_names_in_results_follow_the_contract() -> None:
    assert [result_key("knn", score) for score in ("accuracy", "accuracy_low", "k10")] == ["knn", "knn_low", "knn_k10"]
    assert result_key("prompt", "miou") == "prompt_miou"


def test_grid_has_a_column_per_view_and_shows_what_is_hidden() -> None:
    shown = columns(batch(mask=True, corrupted=True), encoder(), num_items=3)
    parts = ("", ", hidden", ", replaced", ", corrupted")
    expected = [f"global {g}{part}" for g in (1, 2) for part in parts] + ["local 1", "local 2", "local 3"]
    assert list(shown) == expected
    assert {picture.shape for title, picture in shown.items() if "local" not in title} == {(3, 16, 24, 3)}
    dimmed = shown["global 1, hidden"] < shown["global 1"]
    assert dimmed[:, :8, 8:16].all()
    assert dimmed.sum() == dimmed[:, :8, 8:16].sum()  # and nothing outside the hidden patch
    assert torch.equal(shown["global 2, replaced"][:, 4:], shown["global 2"][:, 4:])


def test_grid_without_masks_has_only_views() -> None:
    assert list(columns(batch(mask=False, corrupted=False), encoder(), num_items=3))[:2] == ["global 1", "global 2"]


def test_grid_marks_strongly_augmented_student_views() -> None:
    plain = batch(mask=False, corrupted=False)
    student = plain.views["global"]._replace(strong=torch.tensor([False, True, False, False, True]))
    shown = columns(plain._replace(views=plain.views | {"student": student}), encoder(), num_items=2)
    assert list(shown) == ["global 1", "global 2", "local 1", "local 2", "local 3", "student 1", "student 2"]
    assert torch.equal(shown["student 2"][0], shown["global 2"][0])
    assert torch.equal(shown["student 2"][1, :-1], shown["global 2"][1, :-1])
    assert (shown["student 2"][1, -1] == torch.tensor([1.0, 0.0, 0.0])).all()


def test_pictures_have_the_pixels_of_the_file() -> None:
    card = encoder().card
    pixels = torch.linspace(0, 1, 2 * 3 * 16 * 24).reshape(2, 3, 16, 24)
    mean, std = (torch.tensor(values)[:, None, None] for values in (card.mean, card.std))
    pictures = modalities.get("image").pictures((pixels - mean) / std, card=card)
    assert torch.allclose(pictures, pixels.permute(0, 2, 3, 1), atol=1e-6)  # float32 rounding


def test_grid_is_written_as_a_picture(tmp_path: Path) -> None:
    grid_figure(columns(batch(mask=True, corrupted=False), encoder(), num_items=2)).savefig(tmp_path / "views.png")
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.width > picture.height


class _Clock:
    """Stands in for the trainer and for time."""

    world_size = 2

    def log(self, name: str, value: Tensor | float, *, batch_size: int) -> None:
        self.logged = value


def test_speed_leaves_out_warm_up_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluators = RunEvaluators({})
    throughput, clock, now = Throughput(evaluators=evaluators, num_warmup_steps=2), _Clock(), [0.0]
    monkeypatch.setattr("glpretrain.callbacks.throughput.time.perf_counter", lambda: now[0])
    for seconds in (100.0, 50.0, 1.0, 1.0):  # two warm-up steps, two of one second
        now[0] += seconds
        throughput.on_train_batch_end(clock, clock, None, batch(mask=False, corrupted=False), 0)
    now[0] += 1000.0 + 2.0
    evaluators.seconds += 1000.0
    throughput.on_train_batch_end(clock, clock, None, batch(mask=False, corrupted=False), 0)
    assert throughput.images_seen == 50  # 5 steps of 5 items in 2 processes
    assert throughput.images_per_second == pytest.approx(30 / 4.0)
    assert clock.logged == throughput.images_per_second


def test_progress_line_names_step_loss_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(
        str(shrunk(ROOT / "mae.yaml", tmp_path)),
        overrides=["--evaluate", "false", "--report", "false", "--runs", str(tmp_path), "--trainer.logger", "false"],
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training step")]
    assert lines[-1].startswith("training step 2/2  loss ")
    assert lines[-1].endswith("0:00:00 left")


def test_recipe_may_bring_its_own_instead_of_a_default(tmp_path: Path) -> None:
    own = '[{"class_path": "glpretrain.callbacks.RunEvaluators", "init_args": {"evaluators": {}, "every_n_steps": 5}}]'
    cli = training(tmp_path, "--evaluate", "true", "--trainer.callbacks", own)
    found = [callback for callback in cli.trainer.callbacks if isinstance(callback, RunEvaluators)]
    assert [callback.every_n_steps for callback in found] == [5]
    assert cli.evaluators is found[0]
    assert cli.throughput.evaluators is found[0]


@pytest.mark.parametrize(
    ("environment", "mode"),
    [({}, "offline"), ({"WANDB_API_KEY": "k"}, "online"), ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline")],
)
def test_wandb_is_offline_unless_asked(environment: dict[str, str], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode() == mode


def test_login_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode() == "online"


def test_usage_of_prototypes_counts_directions() -> None:
    assignments = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.6, 0.0, 0.4, 0.0]])
    first = torch.nn.functional.one_hot(assignments.argmax(dim=1), 4).sum(dim=0)
    found = usage(torch.stack([assignments.sum(dim=0), first]))
    mean = torch.tensor([1.6, 1.0, 0.4]) / 3
    assert found["perplexity"].item() == pytest.approx(torch.exp(-(mean * mean.log()).sum()).item())
    assert found["used"] == 25
    even = usage(torch.ones(2, 7))
    assert even["perplexity"].item() == pytest.approx(7) and even["used"] == 100
    assert usage(torch.eye(7)[:1].repeat(2, 1))["perplexity"] == 1


@pytest.mark.parametrize(
    ("recipe", "terms"), [("ibot", ("cls", "patch")), pytest.param("mmc", ("patch",), marks=pytest.mark.slow), ("mae", ())]
)
def test_usage_is_that_of_the_targets_and_changes_no_weight(recipe: str, terms: tuple[str, ...], tmp_path: Path) -> None:
    def run(folder: Path, *callbacks: str) -> tuple[Training, dict[str, list[Tensor]]]:
        folder.mkdir()
        cli = training(folder, "--trainer.max_steps", "4", "--trainer.callbacks", f"[{', '.join(callbacks)}]", recipe=recipe)
        targets: dict[str, list[Tensor]] = {}
        hooks = []
        for name, module in cli.model.named_modules():
            if name in ("cls_objective", "patch_objective"):
                found = targets.setdefault(name.removesuffix("_objective"), [])

                def keep(module: Distillation, args: tuple, given: dict, output: Tensor, *, found: list = found) -> None:
                    found.append(module.targets(given["teacher_logits"], teacher_temp=given["teacher_temp"]).flatten(0, -2))

                hooks.append(module.register_forward_hook(keep, with_kwargs=True))
        cli.fit()
        for hook in hooks:
            hook.remove()
        return cli, targets

    own = '{"class_path": "glpretrain.callbacks.TrainingHealth", "init_args": {"every_n_steps": 3, "num_steps": 2}}'
    (plain, targets), (watched, _) = run(tmp_path / "plain"), run(tmp_path / "watched", own)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, watched.model.state_dict()[name]), name
    logged = {name: value for name, value in watched.trainer.logged_metrics.items() if name.startswith("health/")}
    of_terms = {f"health/{term}/{score}" for term in terms for score in ("perplexity", "used", "sharpness", "excess")}
    of_terms |= {"health/contrast/excess", "health/local/excess"} if recipe == "mmc" else set()  # these have no prototypes
    assert {name for name in logged if name.count("/") == 2} == of_terms
    for term in terms:
        rows = torch.cat(targets[term][1:3])  # the last two of three steps
        mean = rows.mean(dim=0)
        assert logged[f"health/{term}/perplexity"].item() == pytest.approx(torch.exp(-(mean * mean.log()).sum()).item(), rel=1e-4)
        entropy = torch.special.entr(rows).sum(dim=1).mean().item()
        assert logged[f"health/{term}/sharpness"].item() == pytest.approx(math.log(rows.shape[1]) - entropy, rel=1e-4)
        assert logged[f"health/{term}/used"].item() == pytest.approx(100 * len(rows.argmax(dim=1).unique()) / rows.shape[1])
    assert not [module for module in watched.model.modules() if module._forward_hooks]


def test_steps_of_usage_are_checked() -> None:
    with pytest.raises(ValueError, match="num_steps 6; accepted: from 1 to every_n_steps, which is 5"):
        TrainingHealth(every_n_steps=5, num_steps=6)


def test_a_recipe_names_evaluators_that_score_it_on_the_way(tmp_path: Path) -> None:
    def scenes(length: int, split: str) -> dict:
        return {"class_path": "glpretrain.data.Scenes", "init_args": {"length": length, "size": 48, "split": split}}

    evaluators = {
        "health": {"class_path": "glpretrain.evaluate.Health"},
        "near": {"class_path": "glpretrain.evaluate.KNN", "init_args": {"k": [5]}},
    }
    sources = {"train": scenes(30, "train"), "test": scenes(20, "test")}
    callback = {
        "class_path": "glpretrain.callbacks.RunEvaluators",
        "init_args": {"evaluators": evaluators, "sources": sources, "every_n_steps": 1},
    }
    results = training(tmp_path, "--trainer.callbacks", json.dumps([callback])).fit().results
    assert results["measured_on"] == {"health": "scenes", "near": "scenes"}
    assert results["after"]["near_n"] == 20 and results["after"]["health_rank_cls"] > 1
    assert results["before"]["health_rank_cls"] != results["after"]["health_rank_cls"]


def test_a_role_that_is_not_given_is_the_data_modules(tmp_path: Path) -> None:
    cli = training(tmp_path)
    callback = RunEvaluators({"knn": KNN(k=(1,))}, {"test": Scenes(9, size=48, split="test")})
    cli.trainer.callbacks.insert(0, callback)
    cli.fit()
    assert callback.after is not None and callback.after["knn_n"] and callback.after["knn_n"] < 9
    assert any("of 9 items of test are not scored" in reason for reason in callback.left_out.values())  # train shows few of the classes
    assert len(callback.sources["train"]) > 9 and len(callback.sources["test"]) == 9


def test_sources_that_cannot_be_scored_are_left_out_and_do_not_stop_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = training(tmp_path)
    cli.evaluators = RunEvaluators({"knn": KNN(k=(500,)), "probe": Probe()}, {"train": Scenes(20), "test": Scenes(9)})
    cli.trainer.callbacks.insert(0, cli.evaluators)
    results = cli.fit().results
    reason = "k: [500]; accepted: numbers from 1 to 20, the training items"
    assert results["steps"] == 2 and results["left_out"] == {"knn": reason} and results["after"]["probe"] == 20.0
    assert capsys.readouterr().err.count(f"left out: knn: {reason}\n") == 1
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(cli.evaluators.table())
    text = console.export_text()
    assert "left out" in text and reason in " ".join(text.split())


def test_an_unknown_mode_of_wandb_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(ValueError, match="WANDB_MODE: of; accepted: online, offline"):
        wandb_mode()
