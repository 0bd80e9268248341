"""Mean average precision against scikit-learn, and the linear probe for items with any number of labels."""

import pytest
import torch
from evaluate_stubs import StubEncoder, TableSource
from golden import noise
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from glpretrain.core.types import EncoderOutput, Item
from glpretrain.data.label_sets import joined
from glpretrain.evaluate import MultilabelProbe
from glpretrain.evaluate.metrics.average_precision import mean_average_precision
from glpretrain.evaluate.metrics.roc import Detections, average_precision

NAMES = ("a", "b", "c")


def drawn(count: int, *, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float[B K] of scores in steps, so that many are equal, and Bool[B K]."""
    truth = noise(count, 4, name=f"{name} truth") > 0.6
    return (noise(count, 4, name=name) + truth).mul(3).round(), truth


@pytest.mark.parametrize("count", [20, 60, 400])
def test_average_precision_is_scikit_learns_with_ties_and_weights(count: int) -> None:
    scores, truth = drawn(count, name=f"drawn {count}")
    truth[0] = True
    found = mean_average_precision(scores, truth)
    assert found.value == pytest.approx(100 * average_precision_score(truth.numpy(), scores.numpy(), average="macro"), abs=1e-9)
    assert found.low is not None and found.high is not None and found.low < found.value < found.high and found.n == count
    weights = torch.stack([torch.ones(count), torch.arange(count) % 3.0, (noise(count, name="weights") > 0).double()])
    one = Detections(scores[:, 0], truth[:, 0], torch.arange(count))
    expected = [average_precision_score(truth[:, 0].numpy(), scores[:, 0].numpy(), sample_weight=row.numpy()) for row in weights]
    assert average_precision(one, weights).tolist() == pytest.approx(expected, abs=1e-9)


def test_labels_that_no_item_has_are_left_out_and_groups_widen_the_interval() -> None:
    scores, truth = drawn(120, name="groups")
    truth[:, 2] = False
    kept = [0, 1, 3]
    assert mean_average_precision(scores, truth).value == mean_average_precision(scores[:, kept], truth[:, kept]).value
    alone, together = mean_average_precision(scores, truth), mean_average_precision(scores, truth, torch.arange(120) // 30)
    assert alone.value == together.value and together.low is not None and alone.low is not None and together.low != alone.low
    four = [scores[:30].repeat(4, 1), truth[:30].repeat(4, 1)]
    same = mean_average_precision(*four, torch.arange(120) % 30)
    assert same.value == pytest.approx(mean_average_precision(scores[:30], truth[:30]).value)
    assert same.high - same.low > 1.5 * (mean_average_precision(*four).high - mean_average_precision(*four).low)
    with pytest.raises(ValueError, match="none of 120 items has a label"):
        mean_average_precision(scores, torch.zeros(120, 4, dtype=torch.bool))


def sets(count: int, *, name: str) -> tuple[TableSource, torch.Tensor]:
    """Items whose first channels are noisy signs of their labels, and Bool[B 3] of these."""
    truth = noise(count, 3, name=name) > 0.4
    classes: dict[str, int] = {}
    items = []
    for row, blur in zip(truth, noise(count, 3, name=f"{name} blur"), strict=True):
        label = classes.setdefault(joined([name for name, there in zip(NAMES, row.tolist(), strict=True) if there]), len(classes))
        values = (100 + 40 * row + 30 * blur).clamp(0, 255).byte()
        items.append(Item(values[:, None, None].expand(3, 4, 4).contiguous(), label, None, None))
    return TableSource(items, classes=list(classes)), truth


def features(pixels: torch.Tensor) -> EncoderOutput:
    colours = pixels.mean(dim=(2, 3)).float()
    return EncoderOutput(cls=torch.cat([colours, colours.new_zeros(len(colours), 5)], dim=1), patches=pixels.new_zeros(len(pixels), 4, 8))


def test_the_probe_fits_a_regression_for_each_label() -> None:
    (train, known), (test, asked) = sets(300, name="train"), sets(90, name="test")
    result = MultilabelProbe(inverse_l2=(1.0,)).run(StubEncoder(features), {"train": train, "test": test})
    rows, queries = (torch.stack([item.values[:, 0, 0].float() for item in source.items]) for source in (train, test))
    mean, std = rows.mean(dim=0), rows.std(dim=0)
    rows, queries = (rows - mean) / std, (queries - mean) / std
    scores = [LogisticRegression().fit(rows.numpy(), known[:, k].numpy()).decision_function(queries.numpy()) for k in range(3)]
    expected = sum(average_precision_score(asked[:, k].numpy(), scores[k]) for k in range(3)) / 3
    assert result.scores["map"].value == pytest.approx(100 * expected, abs=0.2) and result.scores["map"].value > 75
    assert MultilabelProbe().run(StubEncoder(features), {"train": train, "test": test}).chosen["inverse_l2"] in (0.001, 0.01, 0.1, 1.0)


def test_labels_that_cannot_be_learned_are_left_out_by_name() -> None:
    (train, _), (test, _) = sets(60, name="few"), sets(30, name="asked")
    train._classes = [name.replace("c", "d") for name in train._classes]
    result = MultilabelProbe(inverse_l2=(1.0,)).run(StubEncoder(features), {"train": train, "test": test})
    assert set(result.left_out) == {"c"} and "train has no item with it" in result.left_out["c"]
    train._classes = [name.replace("a", "x").replace("b", "y") for name in train._classes]
    with pytest.raises(ValueError, match="none of the labels of 'table'"):
        MultilabelProbe(inverse_l2=(1.0,)).run(StubEncoder(features), {"train": train, "test": test})
