"""What the base does around every optimizer step, seen in fits of two or three steps: rates, clipping, the teacher, equal states."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from batches import Given, Optimized, Recorder, apart, batch_of, fitted, method, teacher_of, views_of

import glpretrain.methods.base
import glpretrain.training.branch
from glpretrain.core.batch import Batch
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import Encoder, ViT
from glpretrain.methods import DINO, MAE, LocalContrast
from glpretrain.methods.base import Method
from glpretrain.training.optim import TrunkRelease

CROPS = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 3, 4)


def encoder() -> Encoder:
    return ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)


def dino(optimized: Optimized | None = None, **settings: object) -> DINO:
    return method(DINO, encoder(), optimized, num_prototypes=7, hidden_dim=11, bottleneck_dim=5, **settings)


def batches(count: int) -> list[Batch]:
    return [batch_of(global_views=views_of("g", 2, step=step), crops=CROPS) for step in range(count)]


def test_gradients_of_every_module_are_clipped_one_by_one_to_the_norm_of_the_step() -> None:
    clip = Schedule(0.02, 0.01, shape="linear")
    model = method(LocalContrast, encoder(), Optimized(clip=clip), hidden_dim=11, projection_dim=5, hallucinate=0.1)
    seen = fitted(model, batches(2))
    for step, (before, after) in enumerate(zip(seen.gradients, seen.clipped, strict=True)):
        limit = clip(step / 2)
        for name, gradient in before.items():
            factor = min(1.0, limit / (float(gradient.norm()) + 1e-6))
            torch.testing.assert_close(after[name], factor * gradient, msg=lambda text, name=name: f"{name}: {text}")
        scaled = {name.split(".")[0] for name, gradient in before.items() if gradient.norm() > 2 * limit}
        assert scaled == {"student", "hallucinator"}  # which stands beside the student


def test_without_a_norm_gradients_are_left_alone() -> None:
    seen = fitted(dino(), batches(1))
    assert all(torch.equal(gradient, seen.clipped[0][name]) for name, gradient in seen.gradients[0].items())


class Gradients(pl.Callback):
    """Notes before each forward pass whether any parameter has a gradient."""

    def __init__(self) -> None:
        self.held: list[bool] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.held.append(any(parameter.grad is not None for parameter in module.parameters()))


def test_no_gradient_is_held_during_a_forward_pass_but_those_of_micro_batches() -> None:
    for accumulated, wanted in ((1, [False] * 4), (2, [False, True] * 2)):
        seen = Gradients()
        trainer = pl.Trainer(
            max_steps=4 // accumulated,
            accumulate_grad_batches=accumulated,
            accelerator="cpu",
            callbacks=[seen],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(dino(), Given(batches(4)))
        assert seen.held == wanted


def scale(name: str) -> float:
    """Of the rate, at a layer decay of 0.5 and a patch rate of 0.2."""
    if not name.startswith("student.encoder.") or name.startswith("student.encoder.model.norm."):
        return 1.0
    for start, factor in (("blocks.1.", 0.5), ("blocks.0.", 0.25), ("patch_embed.", 0.2 * 0.125)):
        if name.startswith(f"student.encoder.model.{start}"):
            return factor
    return 0.125


def check_rates(seen: Recorder, model: Method, *, lr: list[float], weight_decay: list[float]) -> None:
    """Every parameter that learns has the rate of its layer; those with more than one axis decay, except biases."""
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for step, rates in enumerate(seen.rates):
        expected = {
            name: (lr[step] * scale(name), weight_decay[step] if parameter.ndim > 1 and not name.endswith(".bias") else 0.0)
            for name, parameter in learning.items()
        }
        assert rates == {name: pytest.approx(values) for name, values in expected.items()}, step


def test_prototypes_frozen_by_their_rate_keep_their_place_while_adamws_momenta_follow_the_gradients() -> None:
    """A decay would move them too; both end with the freeze, half way through the run."""
    for how, counted in (("rate", [1.0, 2.0]), ("gradient", [0.0, 1.0])):
        optimized = Optimized(weight_decay=Schedule(0.5, shape="constant"), freeze_prototypes=0.5, freeze_by=how)
        model = dino(optimized, train_gain=True)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        moments = Moments()
        seen = fitted(model, batches(2), callbacks=[moments])
        for name in ("student.heads.cls.1.directions", "student.heads.cls.1.gain"):
            assert torch.equal(seen.states[0][name], before[name]) and not torch.equal(seen.states[1][name], before[name])
            assert [steps[name] for steps in moments.steps] == counted, how
            assert (name in seen.clipped[0]) is (how == "rate")


class Moments(pl.Callback):
    """Notes after each step how often AdamW has seen a gradient of each parameter."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        state = trainer.optimizers[0].state
        self.steps.append({name: float(state[p]["step"]) if p in state else 0.0 for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_by": "rate"}, "freeze_by='rate' would be ignored: freeze_prototypes is 0"),
        ({"freeze_by": "lr", "freeze_prototypes": 0.5}, "freeze_by='lr' given; accepted: gradient, rate"),
        ({"mask_token": "embedding"}, "mask_token='embedding' would be ignored: nothing here has a mask token"),
        (
            {"clip": 1.0, "clip_skip": ("expert_heads",)},
            "clip: skip names expert_heads; accepted: modules with parameters",
        ),
    ],
)
def test_settings_of_the_optimizer_that_would_be_ignored_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(dino(Optimized(**settings)), batches(1))


SLOWED = Optimized(Schedule(0.4, 0.0, shape="linear"), Schedule(0.0, 0.6, shape="linear"), layer_decay=0.5, patch_lr=0.2)


def test_every_parameter_has_the_rate_of_its_layer_and_step() -> None:
    model = dino(SLOWED)
    check_rates(fitted(model, batches(2)), model, lr=[0.4, 0.2], weight_decay=[0.0, 0.3])


def test_a_warm_started_run_has_the_same_rates_and_its_teacher_the_weights() -> None:
    model, backbone = dino(replace(SLOWED, trunk=TrunkRelease(frozen=0.0, ramp=0.0))), encoder()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.5)
    model.init_from(copy.deepcopy(backbone))
    for side in (model.encoder, teacher_of(model).encoder):
        assert all(torch.equal(value, backbone.backbone_state()[name]) for name, value in side.backbone_state().items())
    check_rates(fitted(model, batches(2)), model, lr=[0.4, 0.2], weight_decay=[0.0, 0.3])


def test_a_term_is_the_mean_of_its_items_times_their_weights_and_the_loss_the_weighted_sum_of_terms() -> None:
    weights = {"cls": 0.5, "patch": 2.0}
    model = method(LocalContrast, encoder(), hidden_dim=11, projection_dim=5, weights=weights)
    batch = batches(1)[0]._replace(weight=torch.tensor([2.0, 0.0, 0.5]))
    expected = {name: ((2.0 * term[0] + 0.5 * term[2]) / 3).item() for name, term in model.losses(batch, 0.0).items()}
    logged = fitted(model, [batch]).logged[0]
    assert {name: logged[f"train/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert logged["train/loss"] == pytest.approx(sum(weights[name] * value for name, value in expected.items()), rel=1e-5)


@pytest.mark.parametrize("wrong", ["cls", "patch"])
def test_one_term_that_is_not_finite_ends_a_run_that_may_refuse_no_step(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = method(LocalContrast, encoder(), Optimized(max_refused=0), hidden_dim=11, projection_dim=5)
    losses = model.losses
    monkeypatch.setattr(model, "losses", lambda batch, progress: {**losses(batch, progress), wrong: torch.tensor(float("inf"))})
    with pytest.raises(ValueError, match=rf"step 1: the loss is not finite \(.*{wrong} = inf"):
        fitted(model, batches(1))


def test_the_backbone_is_the_teachers_where_there_is_one() -> None:
    model = dino()
    assert model.backbone() is teacher_of(model).encoder is not model.encoder
    alone = method(MAE, encoder(), decoder_dim=12, decoder_depth=1, decoder_heads=3)
    assert alone.backbone() is alone.encoder


def test_the_teacher_follows_the_student_as_it_is_after_the_step() -> None:
    momentum = Schedule(0.25, 0.75, shape="linear")
    model = dino(Optimized(Schedule(0.01, shape="constant")), momentum=momentum)
    teacher = {name: value.clone() for name, value in teacher_of(model).state_dict().items()}
    for step, state in enumerate(fitted(model, batches(3)).states):
        share = momentum(step / 3)
        for name, value in teacher.items():
            teacher[name] = share * value + (1 - share) * state[f"student.{name}"]
            torch.testing.assert_close(state[f"teacher.branch.{name}"], teacher[name], msg=lambda text, name=name: f"{name}: {text}")


def test_processes_are_given_equal_states_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Method, int]] = []
    monkeypatch.setattr(glpretrain.methods.base, "broadcast_states", lambda module: given.append((module, module.global_step)))
    model = dino()
    fitted(model, batches(2))
    assert given == [(model, 0)]


def test_a_rule_of_the_rate_counts_processes_and_accumulated_batches() -> None:
    model = dino()
    model.optimization = replace(model.optimization, lr=Schedule(5e-4, 1e-6, per=256))
    data, strategy = SimpleNamespace(batch_size=64), SimpleNamespace(root_device=torch.device("cpu"))
    model._trainer = SimpleNamespace(datamodule=data, strategy=strategy, world_size=3, accumulate_grad_batches=2)
    model.setup("fit")
    assert model.optimization.lr == Schedule(7.5e-4, 1e-6)  # 384 items a step


def test_a_trunk_that_does_not_learn_has_no_gradient_where_processes_wait_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of zero would go into the optimizer's momenta and count as a step of the trunk."""
    monkeypatch.setattr(glpretrain.training.branch, "has_process_group", lambda: True)
    model = dino(Optimized(trunk=TrunkRelease(frozen=0.6, ramp=0.0)))
    model.init_from(encoder())
    seen = fitted(model, batches(2))
    for before, after in zip(seen.gradients, seen.clipped, strict=True):
        trunk = {name: value for name, value in before.items() if name.startswith("student.encoder.")}
        assert trunk and not any(value.any() for value in trunk.values())
        assert after and not [name for name in after if name in trunk]


def test_a_trunk_waits_for_its_share_and_what_is_watched_is_the_total() -> None:
    """Ten steps with windows of two: the means of the first two are known at step 4, the first step that can begin at rate is 5."""
    for tolerance, released in ((9.0, 0.5), (None, 0.8)):
        trunk = TrunkRelease(frozen=0.8, ramp=0.0, tolerance=tolerance, window=0.2)
        model = dino(Optimized(trunk=trunk), teacher_temp=Schedule(0.2), weights={"cls": 0.5})
        apart(model).init_from(encoder())
        seen = fitted(model, batches(10))
        assert model.trunk is not None and model.trunk.released == released
        assert [row["schedule/trunk_rate"] for row in seen.logged] == [float(step / 10 >= released) for step in range(10)]
        if tolerance is not None:
            totals = [row["train/loss"] for row in seen.logged]
            expected = torch.tensor([sum(totals[0:2]), sum(totals[2:4])]) / 2
            torch.testing.assert_close(model.trunk.means, expected)
