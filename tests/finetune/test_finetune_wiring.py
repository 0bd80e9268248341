"""What is handed to what: which weights move, are averaged and are evaluated, and what is mixed."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from batches import Optimized, fitted, method
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch import Tensor, nn
from tuned_models import CLASSES, apart, batch, classifier, data, pictures, trained, vit

from glpretrain.core.schedule import Schedule
from glpretrain.encoders import FeatureMap
from glpretrain.finetune import ClassHead, Classification
from glpretrain.finetune.base import for_tuning, logits_of
from glpretrain.training.optim import Optimization

FAST = Optimization(lr=Schedule(0.01), clip=None)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_head_begins_as_in_maes_code() -> None:
    head = ClassHead(200, 50, pool="mean", norm=True)
    assert head.linear.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert head.linear.weight.abs().max() > 4e-5 and not head.linear.bias.any()
    assert head.norm.eps == 1e-6


def test_the_head_sees_what_its_pooling_says() -> None:
    items, encoder = batch().views["global"].items[0], vit()
    encoder.eval()
    output = encoder(items)
    mean = output.patches.mean(dim=1)
    for pool, pooled in (("cls", output.cls), ("cls_mean", torch.cat([output.cls, mean], dim=1))):
        model = apart(classifier(encoder, pool=pool)).eval()
        linear = model.head.linear
        torch.testing.assert_close(logits_of(model.evaluated, items), linear(pooled))


def test_the_mean_is_taken_before_the_final_norm_and_has_one_of_its_own() -> None:
    items, encoder = batch().views["global"].items[0], vit()
    seen: list[Tensor] = []
    encoder.eval().model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder(items)
    model = apart(classifier(encoder)).eval()
    pooled = seen[0][:, 1:].mean(dim=1)
    torch.testing.assert_close(logits_of(model.evaluated, items), model.head.linear(model.head.norm(pooled)))


def test_other_encoders_keep_their_norm_below_the_mean() -> None:
    encoder = FeatureMap("convnext_atto", img_size=32)
    items = torch.cat([batch().views["global"].items[0]] * 2, dim=2).repeat(1, 1, 1, 2)
    mean = encoder.eval()(items).patches.mean(dim=1)
    model = apart(classifier(encoder)).eval()
    torch.testing.assert_close(logits_of(model.evaluated, items), model.head.linear(model.head.norm(mean)))


def test_a_backbone_is_prepared_and_stays_as_it_was() -> None:
    encoder = vit(positions="sincos", drop_path_rate=0.2, drop_path_uniform=True)
    before = weights_of(encoder)
    model = classifier(encoder, drop_path=0.3)
    assert equal(before, weights_of(encoder)) and model.encoder is not encoder
    assert model.encoder.card.arguments["drop_path_rate"] == 0.3
    rates = [block.drop_path1.drop_prob for block in model.encoder.model.blocks if hasattr(block.drop_path1, "drop_prob")]
    assert rates == [pytest.approx(0.3)]  # none in the first of two blocks
    assert model.encoder.model.pos_embed.requires_grad
    assert torch.equal(model.encoder.model.pos_embed, encoder.model.pos_embed)
    assert type(model.encoder.model.norm) is nn.Identity


def test_paths_are_dropped_by_the_keys_of_the_items() -> None:
    model = apart(classifier(drop_path=0.5)).train()
    one, again = (model.losses(batch(), 0.0)["classes"] for _ in range(2))
    assert torch.equal(one, again)
    model.eval()
    assert not torch.equal(one, model.losses(batch(), 0.0)["classes"])


def test_an_encoder_without_dropped_paths_says_so() -> None:
    encoder = vit()
    encoder.card.arguments.pop("drop_path_rate")
    with pytest.raises(ValueError, match="drops no paths"):
        for_tuning(encoder, drop_path=0.1)


def test_the_average_of_the_weights_follows_timms_rule_and_does_not_learn() -> None:
    model = classifier(ema=0.9, optimization=FAST)
    assert not any(parameter.requires_grad for parameter in model.ema.parameters())
    start = weights_of(model.student)
    seen = fitted(model, [batch() for _ in range(4)])
    name = "heads.task.linear.bias"
    average = start[name]
    for step in range(1, 5):
        decay = 0.0 if step == 1 else min(0.9, 1 - step ** (-2 / 3))
        average = decay * average + (1 - decay) * seen.states[step - 1][f"student.{name}"]
        torch.testing.assert_close(seen.states[step - 1][f"ema.module.{name}"], average)


class Spoil(pl.Callback):
    """Moves the student away before it is evaluated."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with torch.no_grad():
            pl_module.student.heads["task"].linear.bias.copy_(torch.tensor([1e6, 0.0, 0.0]))


@pytest.mark.parametrize(("ema", "is_average"), [(0.99, True), (None, False)])
def test_what_is_evaluated_and_saved_is_the_average(tmp_path: Path, ema: float | None, is_average: bool) -> None:
    """A spoiled student predicts the first class everywhere; the average does not notice."""
    model = classifier(ema=ema, optimization=FAST)
    trained(model, data(pictures(tmp_path)), steps=4, callbacks=[Spoil()])  # one epoch
    spoiled = model.student.heads["task"].linear.bias[0].item() > 1e5
    assert spoiled and (model.head.linear.bias[0].item() < 1e5) is is_average
    assert (model.found["accuracy"].value > 60.0) is is_average


def test_a_frozen_backbone_does_not_move_and_is_in_evaluation_mode() -> None:
    model = classifier(FeatureMap("resnet10t", img_size=32), freeze=True, ema=0.9, optimization=FAST)
    before = weights_of(model.encoder)
    assert any("running_mean" in name for name in before)
    seen = fitted(model, [batch()._replace(views=large()) for _ in range(3)])
    assert equal(before, weights_of(model.encoder)) and not model.encoder.training
    assert set(seen.gradients[-1]) == {f"student.heads.task.{name}" for name, _ in model.head.named_parameters()}
    moved = weights_of(model.student.heads)
    assert not torch.equal(moved["task.linear.weight"], weights_of(classifier(FeatureMap("resnet10t")).student.heads)["task.linear.weight"])


def large() -> dict:
    group = batch().views["global"]
    return {"global": group._replace(items=group.items.repeat(1, 1, 1, 4, 4))}


def test_statistics_of_batch_norms_are_averaged_too() -> None:
    model = classifier(FeatureMap("resnet10t", img_size=32), ema=0.9, optimization=FAST)
    fitted(model, [batch()._replace(views=large()) for _ in range(3)])
    means = [value for name, value in weights_of(model.backbone()).items() if name.endswith("running_mean")]
    assert means and all(mean.any() for mean in means)


def test_a_step_that_is_refused_moves_no_average() -> None:
    model = classifier(ema=0.9, optimization=FAST)
    broken = batch()
    broken.views["global"].items[0, 0, 0, 0, 0] = torch.inf
    seen = fitted(model, [batch(), broken, batch()])
    states = [{name: value for name, value in state.items() if name.startswith("ema.")} for state in seen.states]
    assert equal(states[0], states[1]) and not equal(states[1], states[2])


@pytest.mark.parametrize(("from_scratch", "factor"), [(False, 0.75), (True, 1.0)])
def test_layers_learn_at_rates_of_their_own_unless_the_weights_are_fresh(from_scratch: bool, factor: float) -> None:
    model = method(Classification, vit(), Optimized(Schedule(0.1)), classes=CLASSES)
    model.from_scratch = from_scratch
    rates = fitted(model, [batch()]).rates[0]
    layers = {"model.patch_embed.proj.weight": 3, "model.blocks.0.mlp.fc1.weight": 2, "model.blocks.1.mlp.fc1.weight": 1}
    for name, below in layers.items():
        assert rates[f"student.encoder.{name}"][0] == pytest.approx(0.1 * factor**below)
    assert rates["student.heads.task.linear.weight"][0] == pytest.approx(0.1)


def test_images_are_mixed_in_training_only(tmp_path: Path) -> None:
    model, sizes = classifier(mixup=0.8, cutmix=1.0), []
    mix = model.mixing
    model.mixing = lambda items, targets: sizes.append(len(items)) or mix(items, targets)
    trained(model, data(pictures(tmp_path)), steps=4)
    assert sizes == [4] * 4 and model.found["accuracy"].n > 0


def test_mixing_depends_on_seed_epoch_and_batch_alone(tmp_path: Path) -> None:
    def losses(seed: int) -> list[float]:
        model, module = classifier(mixup=0.8, cutmix=1.0, optimization=FAST), data(pictures(tmp_path / str(torch.rand(()).item())))
        module.seed = seed
        seen: list[float] = []

        class Note(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
                seen.append(float(outputs["loss"]))

        trained(model, module, steps=4, callbacks=[Note()])
        return seen

    first = losses(0)
    assert losses(0) == first
    assert losses(1) != first


def test_items_of_a_batch_are_not_changed_by_mixing() -> None:
    model, one = classifier(mixup=0.8), batch()
    before = one.views["global"].items.clone()
    model.losses(one, 0.0)
    assert torch.equal(one.views["global"].items, before)


def test_smoothed_targets_are_timms() -> None:
    model = apart(classifier(label_smoothing=0.2)).eval()
    logits = logits_of(model.student, batch().views["global"].items[0])
    soft = torch.full((4, 3), 0.2 / 3).scatter(1, batch().targets[:, None], 0.8 + 0.2 / 3)
    torch.testing.assert_close(model.losses(batch(), 0.0)["classes"], -(soft * logits.log_softmax(dim=1)).sum(dim=1))


def test_scores_agree_with_scikit_learn() -> None:
    names = [str(number) for number in range(7)]
    model = Classification(vit(), names)
    truth = torch.tensor([0, 1, 1, 2, 3, 4, 5, 5, 5, 5])  # none of the last class
    logits = torch.sin(2.3 * torch.arange(70.0)).reshape(10, 7)
    found = model.scores(model.outcomes(logits, truth), None)
    assert found["accuracy"].value == pytest.approx(100 * (logits.argmax(dim=1) == truth).float().mean().item())
    assert found["balanced_accuracy"].value == pytest.approx(100 * balanced_accuracy_score(truth, logits.argmax(dim=1)))
    top = top_k_accuracy_score(truth, logits.numpy(), k=5, labels=list(range(7)))
    assert found["top5"].value == pytest.approx(100 * top)
    assert all(score.low < score.value < score.high and score.n == 10 for score in found.values())
    assert "top5" not in classifier().scores(torch.zeros(4, 3, dtype=torch.int64), None)


def test_items_of_one_group_widen_the_interval() -> None:
    outcomes = torch.tensor([[0, 0, 1]] * 20 + [[1, 0, 1]] * 20)
    alone, together = (classifier().scores(outcomes, groups)["accuracy"] for groups in (None, torch.arange(40) // 10))
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_a_batch_that_cannot_be_mixed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.batch_size=3 given; mixup and cutmix mix pairs"):
        trained(classifier(mixup=0.1), data(pictures(tmp_path), batch_size=3), steps=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pool": "max"}, "pool='max' given; accepted: cls, mean, cls_mean"),
        ({"drop_path": 1.0}, "drop_path=1.0 given"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1 given"),
        ({"mix_prob": 2.0}, "mix_prob=2.0 given"),
        ({"mixup": -1.0}, "mixup=-1.0 given"),
        ({"ema": 1.0}, "ema=1.0 given"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        classifier(**settings)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"classes \['only'\] given; accepted: two or more"):
        Classification(vit(), ["only"])
