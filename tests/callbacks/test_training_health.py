"""Faults of a run, and the verdicts that name them at the second report; healthy runs get none."""

from collections.abc import Callable

import pytest
import pytorch_lightning as pl
import torch
from batches import Optimized, batch_of, fitted, method, views_of

from glpretrain.callbacks import TrainingHealth
from glpretrain.callbacks.health import _above_guessing
from glpretrain.callbacks.verdicts import features_health, judge, similarity_drift
from glpretrain.core.batch import Batch
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import ViT
from glpretrain.methods import DINO, IBOT, MAE
from glpretrain.methods.base import Method
from glpretrain.objectives.contrastive import InfoNCE, PatchInfoNCE, QueueInfoNCE
from glpretrain.objectives.distillation import Centre
from glpretrain.training.anchor import Gram

STEPS, EVERY = 20, 10


def encoder() -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3)


def constant(value: float) -> Schedule:
    return Schedule(value, shape="constant")


def dino(lr: float = 1e-3, **settings: object) -> DINO:
    settings = {"momentum": constant(0.99), "teacher_temp": constant(0.04), **settings}
    return method(DINO, encoder(), Optimized(constant(lr)), num_prototypes=64, hidden_dim=32, bottleneck_dim=16, **settings)


def ibot(lr: float = 1e-3) -> IBOT:
    options = {"num_prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 16, "momentum": constant(0.99)}
    return method(IBOT, encoder(), Optimized(constant(lr)), **options)


def mae(lr: float = 1e-3) -> MAE:
    return method(MAE, encoder(), Optimized(constant(lr)), decoder_dim=12, decoder_depth=1, decoder_heads=3)


def batches(*, masked: bool, alike: bool = False) -> list[Batch]:
    """Items that are recognised in both views, by a pattern of their own."""
    found = []
    for step in range(STEPS):
        items = views_of("item", 1, step=step % 4, items=12, size=16)
        views = 0.0 * items if alike else items + 0.5 * views_of("view", 2, step=step, items=12, size=16)
        mask = torch.rand(2, 12, 4).argsort(dim=-1) < 3 if masked else None
        found.append(batch_of(global_views=views.expand(2, -1, -1, -1, -1).contiguous(), mask=mask))
    return found


class FrozenCentre(pl.Callback):
    """Puts the centre back after every step."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        for module in pl_module.modules():
            if isinstance(module, Centre):
                module.value.zero_()


class TwinTeacher(pl.Callback):
    """Gives the teacher the student's weights after every step."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        assert isinstance(pl_module, Method) and pl_module.teacher is not None
        pl_module.teacher.branch.load_state_dict(pl_module.student.state_dict())


def verdicts(
    model: Method, *, masked: bool = False, alike: bool = False, callbacks: tuple[pl.Callback, ...] = (), every: int = EVERY
) -> dict[str, str]:
    torch.manual_seed(0)
    health = TrainingHealth(every_n_steps=every, num_steps=min(every, 2))
    fitted(model, batches(masked=masked, alike=alike)[: 2 * every], callbacks=[*callbacks, health])
    assert all(verdict.step == 2 * every for verdict in health.verdicts)
    return {verdict.name: verdict.text for verdict in health.verdicts}


FAULTS: dict[str, tuple[Callable[[], Method], tuple[pl.Callback, ...], str, str]] = {
    "a rate a thousand times too high": (lambda: dino(1.0), (), "wild", "lower optimization.lr"),
    "a rate of zero": (lambda: dino(0.0), (), "still", "raise optimization.lr"),
    "a momentum of zero": (lambda: dino(momentum=constant(0.0)), (), "twin", "raise momentum"),
    "a momentum of one": (lambda: dino(momentum=constant(1.0)), (), "stuck teacher", "lower momentum"),
    "the teacher is the student": (dino, (TwinTeacher(),), "twin", "raise momentum"),
    "a frozen centre": (dino, (FrozenCentre(),), "stuck cls_objective.centre_state", "lower its momentum"),
    "a teacher's temperature of 1": (lambda: dino(teacher_temp=constant(1.0)), (), "uniform cls", "lower teacher_temp"),
    "a student's temperature of 0.001": (lambda: dino(student_temp=1e-3), (), "excess cls", "raise student_temp"),
}


QUICK = ("a rate a thousand times too high", "a momentum of zero", "a frozen centre", "a teacher's temperature of 1")


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=() if fault in QUICK else pytest.mark.slow) for fault in FAULTS])
def test_a_fault_is_named_with_the_setting_to_change(fault: str) -> None:
    make, callbacks, name, setting = FAULTS[fault]
    found = verdicts(make(), callbacks=callbacks)
    assert name in found and setting in found[name], found


def test_an_encoder_or_a_method_without_gradient_is_named() -> None:
    named = {"still encoder", "no gradient"}
    assert not named & verdicts(dino(), every=1).keys()
    cut = dino()
    cut.student.encoder.requires_grad_(False)
    assert named & verdicts(cut, every=1).keys() == {"still encoder"}
    cut = dino()
    cut.weights = {"cls": 0.0}
    assert named & verdicts(cut, every=1).keys() == {"no gradient"}


@pytest.mark.parametrize("objective", [InfoNCE(temp=0.3), QueueInfoNCE(dim=2, queue_size=7, temp=0.3), PatchInfoNCE(temp=0.3)])
def test_a_contrast_is_at_guessing_where_all_keys_are_the_same_and_below_it_where_items_are_told_apart(
    objective: InfoNCE | QueueInfoNCE | PatchInfoNCE,
) -> None:
    axes = torch.eye(2)
    found = []
    for keys in (torch.ones_like(axes) / 2**0.5, axes):
        if isinstance(objective, InfoNCE):
            given = {"queries": axes, "keys": keys}
        elif isinstance(objective, QueueInfoNCE):
            objective.queue.rows.copy_(keys[:1].expand(7, -1) if keys is not axes else -axes[:1])
            given = {"queries": axes.expand(2, -1, -1), "keys": keys.expand(2, -1, -1)}
        else:
            patches = {"queries": axes.expand(2, -1, -1), "keys": keys.expand(2, -1, -1)}
            given = {**patches, "nearest": torch.arange(2).expand(2, -1), "valid": torch.ones(2, 2, dtype=torch.bool)}
        found.append(_above_guessing(objective, given["keys"], objective(**given)))
    assert found[0].abs().max() < 1e-5 and found[1].max() < -0.1


def test_items_that_are_all_the_same_are_a_collapse() -> None:
    assert "collapse cls" in verdicts(dino(), alike=True)


@pytest.mark.parametrize("make", [dino, ibot, mae])
def test_a_healthy_run_gets_no_verdict(make: Callable[[], Method]) -> None:
    assert verdicts(make(), masked=make is not dino) == {}


def test_a_snapshot_that_stands_still_is_healthy_and_its_distance_is_reported() -> None:
    model, health = dino(gram=Gram(snapshot_at=0.4, start=0.5)), TrainingHealth(every_n_steps=EVERY)
    reports: list[dict[str, float]] = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
            if trainer.global_step % EVERY == 0:
                reports.append(dict(health.numbers))

    fitted(model, batches(masked=False), callbacks=[health, Note()])
    assert health.verdicts == []
    assert all(0.0 < report["gram_drift"] < 2.0 and -1.0 < report["cls_cosine"] < 1.0 for report in reports)
    assert reports[0]["gram_drift"] < reports[1]["gram_drift"]  # two steps and twelve steps after the snapshot


def test_reconstruction_has_the_verdicts_of_its_weights() -> None:
    assert set(verdicts(mae(0.0), masked=True)) == {"still"}
    assert "wild" in verdicts(mae(1.0), masked=True)


NUMBERS = {
    **{"update": 1e-3, "encoder_update": 1e-3, "gradient": 1.0, "encoder_gradient": 0.5, "growth": 2.0, "distance": 0.1, "pull": 0.01},
    **{"spread_cls": 0.5, "spread_patches": 0.5, "cls/sharpness": 1.0, "cls/perplexity": 30.0, "cls/excess": 0.1},
}


@pytest.mark.parametrize(
    ("numbers", "stuck", "name"),
    [
        ({}, set(), None),
        ({"cls/perplexity": 1.2}, set(), "one prototype cls"),
        ({"spread_patches": 1e-8}, set(), "collapse patches"),
        ({"update": 0.4}, set(), "wild"),
        ({"update": 0.02, "growth": 1.2}, set(), None),
        ({"update": 0.02, "growth": 1.6}, set(), "wild"),
        ({"gradient": 0.0, "encoder_gradient": 0.0}, set(), "no gradient"),  # weight decay still moves the weights
        ({"encoder_gradient": 0.0}, set(), "still encoder"),
        ({"encoder_update": 0.0}, set(), "still encoder"),
        ({"contrast/excess": 30.0}, set(), "excess contrast"),
        ({"pull": 1e-8}, {"teacher"}, None),  # at the end of a long run, rounding hides so small a step
        ({"pull": 0.0}, {"teacher"}, "stuck teacher"),
        ({"update": 0.0, "distance": 0.0}, {"teacher", "cls_objective.centre_state"}, "still"),  # the rest follows from it
    ],
)
def test_numbers_and_their_verdicts(numbers: dict[str, float], stuck: set[str], name: str | None) -> None:
    assert list(judge({**NUMBERS, **numbers}, stuck)) == ([] if name is None else [name])


def test_numbers_of_features() -> None:
    torch.manual_seed(0)
    found = features_health(torch.randn(64, 1) @ torch.randn(1, 8) + 3.0, torch.randn(64, 4, 8))
    assert found["rank_cls"].item() == pytest.approx(1.0, abs=0.01)
    assert 7.0 < found["rank_patches"].item() <= 8.0
    assert found["spread_patches"].item() == pytest.approx(1.0, abs=0.05)
    assert abs(found["patch_decay"].item() + 0.25) < 0.05  # independent patches: 0 minus the 1/4 of a patch with itself


def test_cosines_of_class_tokens_and_their_drift_by_hand() -> None:
    cls, patches = torch.tensor([[2.0, 0.0]]), torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    assert features_health(cls, patches)["cls_cosine"].item() == pytest.approx(0.3)
    # Of three pairs the cosines are 0.8, 0.6 and 0 now; before, all were 1.
    now = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [1.0, 0.0]]])
    assert similarity_drift(now, torch.ones(1, 3, 2)).item() == pytest.approx((0.2 + 0.4 + 1.0) / 3)


def test_patches_of_a_method_that_reads_class_tokens_alone_are_seen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingHealth, "_until_report", lambda self, trainer: 0)
    model, items, health = encoder().eval(), views_of("item", 1, items=12, size=16)[0], TrainingHealth()
    model.register_forward_hook(lambda module, args, output: health._see(None, None, module, args, output))
    alone = model(items, cls_only=True)
    assert alone.patches.shape[1] == 0
    wanted = features_health(alone.cls, model(items).patches)
    assert health._features.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(health._features[name], value, msg=lambda text, name=name: f"{name}: {text}")
