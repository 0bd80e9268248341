"""A head that starts as a linear probe: its weights, what they are fitted to, and when they are left alone."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from golden import noise
from sklearn.linear_model import LogisticRegression
from tuned_models import CLASSES, classifier, data, pictures, trained, vit

from glpretrain.core.schedule import Schedule
from glpretrain.data import ImageList
from glpretrain.evaluate.rows import LabelledFeatures
from glpretrain.finetune import LabelledData, LabelledViews, Multilabel
from glpretrain.finetune.base import HEAD
from glpretrain.finetune.head_start import INVERSE_L2, label_layer, probe_layer, seen_by_head
from glpretrain.training.optim import Optimization


def moving(rate: float) -> dict[str, Optimization]:
    return {"optimization": Optimization(lr=Schedule(rate, end=rate), weight_decay=Schedule(0.0, end=0.0))}


STILL = moving(1e-30)


def seen(count: int = 120) -> LabelledFeatures:
    """Features of three classes of four, on unlike scales; the third of the classes has no item."""
    labels = torch.arange(count) % 3
    labels[labels == 2] = 3
    rows = noise(count, 6, name="rows") * torch.tensor([1.0, 50.0, 0.01, 1.0, 1.0, 1.0]) + 3.0
    rows[:, 0] += labels
    return LabelledFeatures(rows, labels, torch.arange(count))


def test_the_layer_computes_what_the_regression_on_standardised_rows_does() -> None:
    given = seen()
    weight, bias, strength = probe_layer(given, num_classes=4, device=torch.device("cpu"))
    rows = (given.cls - given.cls.mean(dim=0)) / given.cls.std(dim=0)
    expected = LogisticRegression(C=strength, max_iter=2000, tol=1e-8).fit(rows.numpy(), given.labels.numpy())
    logits = given.cls @ weight.T + bias
    probabilities = logits[:, [0, 1, 3]].softmax(dim=1)
    torch.testing.assert_close(probabilities, torch.from_numpy(expected.predict_proba(rows.numpy())).float(), rtol=0, atol=2e-3)
    assert strength in INVERSE_L2 and not weight[2].any() and bias[2] == bias.min()
    with pytest.raises(ValueError, match="training items of one class"):
        one = LabelledFeatures(given.cls[:5], torch.zeros(5, dtype=torch.int64), torch.arange(5))
        probe_layer(one, num_classes=4, device=torch.device("cpu"))


def test_training_begins_with_the_probe_of_its_own_items_as_they_are(tmp_path: Path) -> None:
    module = data(pictures(tmp_path / "set"))
    model = classifier(head_start="probe", ema=0.9, **STILL)
    trained(model, module, steps=1)
    encoder = module.plain_batches(module.source, at_most=100)
    found = seen_by_head(model.student, encoder, device=torch.device("cpu"))
    assert sorted(found.index.tolist()) == list(range(len(module.source)))
    assert found.labels.tolist() == [module.source.label_of(index) for index in found.index.tolist()]
    weight, bias, _ = probe_layer(found, num_classes=3, device=torch.device("cpu"))
    for branch in (model.student, model.evaluated):
        torch.testing.assert_close(branch.heads[HEAD].linear.weight, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(branch.heads[HEAD].linear.bias, bias, rtol=1e-4, atol=1e-5)
    assert model.student.training


def test_at_most_some_items_are_drawn_once_and_for_all(tmp_path: Path) -> None:
    module = data(pictures(tmp_path / "set"))
    trained(classifier(**STILL), module, steps=1)
    draws = [torch.cat([batch.index for batch in module.plain_batches(module.source, at_most=7)]).tolist() for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) == 7


def test_the_penalty_is_chosen_by_all_classes_alike() -> None:
    labels = (torch.arange(200) % 10 == 0).long()  # nine of ten are of one class
    rows = noise(200, 4, name="rare") + 1.2 * labels[:, None]
    layer = probe_layer(LabelledFeatures(rows, labels, torch.arange(200)), num_classes=2, device=torch.device("cpu"))
    predicted = (rows @ layer.weight.T + layer.bias).argmax(dim=1)
    assert layer.strength > INVERSE_L2[0] and (predicted[labels == 1] == 1).float().mean() > 0.4


def test_the_layer_for_several_labels_computes_a_regression_for_each() -> None:
    given = seen()
    truth = torch.stack([given.labels > 0, given.cls[:, 3] > 3.0, torch.ones(120, dtype=torch.bool)], dim=1)
    layer = label_layer(LabelledFeatures(given.cls, truth.float(), given.index))
    rows = ((given.cls - given.cls.mean(dim=0)) / given.cls.std(dim=0)).numpy()
    for place in (0, 1):
        expected = LogisticRegression(C=layer.strength, max_iter=500).fit(rows, truth[:, place].numpy()).decision_function(rows)
        found = given.cls @ layer.weight[place] + layer.bias[place]
        torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-3)
    assert not layer.weight[2].any() and layer.bias[2] == layer.bias.min()
    with pytest.raises(ValueError, match="all have the same labels"):
        label_layer(LabelledFeatures(given.cls, torch.ones(120, 2), given.index))


def test_few_items_get_a_penalty_that_is_not_chosen() -> None:
    rows, labels = noise(3, 4, name="few"), torch.tensor([0, 1, 2])
    assert probe_layer(LabelledFeatures(rows, labels, labels), num_classes=3, device=torch.device("cpu")).strength == 0.1
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert label_layer(LabelledFeatures(rows, truth, labels)).strength == 0.1


def test_a_model_for_several_labels_begins_with_it(tmp_path: Path) -> None:
    pictures(tmp_path / "set")
    lines = [f"set/{name}/{number}.png\t{name};{'a' if number % 2 else 'b'}" for name in CLASSES for number in range(8)]
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    source = ImageList(tmp_path / "list.tsv")
    module = LabelledData(source, LabelledViews(16), batch_size=4, num_workers=0, cache=False, separator=";")
    model = Multilabel(vit(), module.classes, head_start="probe", **STILL)
    trained(model, module, steps=1)
    layer = label_layer(seen_by_head(model.student, module.plain_batches(module.source, at_most=100), device=torch.device("cpu")))
    torch.testing.assert_close(model.student.heads[HEAD].linear.weight, layer.weight, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="Multilabel: head_start='probe' given with head='mlp'"):
        Multilabel(vit(), module.classes, head="mlp", head_start="probe")


def test_a_run_that_goes_on_keeps_its_head(tmp_path: Path) -> None:
    def trainer(steps: int) -> pl.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        return pl.Trainer(accelerator="cpu", devices=1, max_steps=steps, num_sanity_val_steps=0, default_root_dir=tmp_path, **quiet)

    def module() -> LabelledData:
        return data(tmp_path / "set")

    pictures(tmp_path / "set")
    began, going_on = classifier(head_start="probe", **moving(1e-2)), classifier(head_start="probe", **STILL)
    first = trainer(2)
    first.fit(began, datamodule=module())
    first.save_checkpoint(tmp_path / "two.ckpt")
    trainer(4).fit(going_on, datamodule=module(), ckpt_path=str(tmp_path / "two.ckpt"), weights_only=True)
    kept, fresh = began.student.heads[HEAD].linear.weight, classifier(head_start="probe", **STILL)
    assert torch.equal(going_on.student.heads[HEAD].linear.weight, kept)
    trainer(1).fit(fresh, datamodule=module())
    assert not torch.equal(fresh.student.heads[HEAD].linear.weight, kept)


def test_sharded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glpretrain.finetune.head_start.DTensor", torch.nn.Parameter)
    with pytest.raises(ValueError, match="head_start=probe given with sharded weights; accepted: fresh"):
        trained(classifier(head_start="probe"), data(pictures(tmp_path / "set")), steps=1)


def test_only_a_linear_head_can_start_so() -> None:
    with pytest.raises(ValueError, match="head_start='probe' given with head='mlp'"):
        classifier(vit(), head="mlp", head_start="probe")
    with pytest.raises(ValueError, match="head_start='warm'"):
        classifier(head_start="warm")
