"""Retrieval: truth scores 100, noise its expectation, torchmetrics and scikit-learn agree, ties and the query itself do not count."""

import math

import pytest
import torch
from evaluate_stubs import NUM_CLASSES, StubEncoder, chance, half_width, labelled, masked, noise, noisy, output, truth
from matplotlib.colors import to_hex
from sklearn.metrics import average_precision_score
from torch.nn import functional
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

from glpretrain.evaluate import DecodedItems, Features, Result, Retrieval
from glpretrain.evaluate.cls import retrieval
from glpretrain.evaluate.cls.retrieval import rank
from glpretrain.evaluate.rows import LabelledFeatures


def table(count: int, *, start: int = 0):
    source = labelled([index % NUM_CLASSES for index in range(start + count)], num_classes=NUM_CLASSES)
    source.items = source.items[start:]
    return source


def run(features, queries, gallery=None, **options) -> Result:
    """Without a gallery, among the other queries."""
    return Retrieval(**options).run(StubEncoder(features), {"test": queries} | ({} if gallery is None else {"train": gallery}))


def features(count: int, *, dim: int = 6, levels: int = 1000, start: int = 0) -> LabelledFeatures:
    """Coarse numbers (few levels) make ties."""
    cls = (noise(torch.arange(start, start + count), dim, seed=7) * levels).round() / levels
    return LabelledFeatures(functional.normalize(cls, dim=1), torch.arange(count) ** 2 % 7, torch.arange(count))


@pytest.mark.parametrize("gallery", [None, table(60)])
def test_truth_scores_100(gallery):
    scores = run(truth, table(43, start=60), gallery).scores
    for name in ("map", "recall1", "recall5", "recall10"):
        assert scores[name].value == pytest.approx(100) and scores[name].n == 43, name
    assert 0 < half_width(scores["recall1"]) < 10


@pytest.mark.parametrize("gallery", [None, table(200)])
def test_noise_scores_its_expectation(gallery):
    scores = run(chance, table(400, start=200), gallery).scores
    others, relevant = (399, 79) if gallery is None else (200, 40)
    harmonic = sum(1 / rank_ for rank_ in range(1, others + 1))
    # Mean over random orders of the average precision, and one less the chance that k draws without replacement all miss.
    expected = {"map": ((relevant - 1) / (others - 1) * (others - harmonic) + harmonic) / others}
    expected |= {f"recall{k}": 1 - math.comb(others - relevant, k) / math.comb(others, k) for k in (1, 5, 10)}
    for name, value in expected.items():
        # 4 standard deviations, twice over for mAP: its queries share one gallery.
        assert abs(scores[name].value - 100 * value) < (4 if name == "map" else 2) * half_width(scores[name]), name


def test_agrees_with_torchmetrics():
    queries, gallery = features(31), features(97, start=31)
    found = rank(queries, gallery, leave_one_out=False)
    cosines = queries.cls @ gallery.cls.T
    cosines = (1 + cosines) / 2  # torchmetrics takes a score below zero for no answer
    relevant = queries.labels[:, None] == gallery.labels
    indexes = torch.arange(31)[:, None].expand(-1, 97)
    expected = RetrievalMAP(empty_target_action="error")(cosines.flatten(), relevant.flatten(), indexes.flatten())
    assert found.average_precision.mean().item() == pytest.approx(expected.item(), abs=1e-6)
    for k in (1, 2, 5, 10):  # any relevant item among k is what torchmetrics calls the hit rate
        expected = RetrievalHitRate(top_k=k)(cosines.flatten(), relevant.flatten(), indexes.flatten())
        assert (found.first_hit <= k).float().mean().item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("levels", [1, 1000])
def test_agrees_with_scikit_learn_with_ties(levels: int):
    queries, gallery = features(31, dim=3, levels=levels), features(97, dim=3, levels=levels, start=31)
    found = rank(queries, gallery, leave_one_out=False)
    cosines = queries.cls @ gallery.cls.T
    assert (cosines[0].unique().numel() < 60) == (levels == 1)
    for average, row, label in zip(found.average_precision, cosines, queries.labels, strict=True):
        expected = average_precision_score((gallery.labels == label).numpy(), row.numpy())
        assert average.item() == pytest.approx(expected, abs=1e-6)


def test_the_query_itself_is_not_found():
    items = features(29)
    found = rank(items, items, leave_one_out=True, num_nearest=28)
    for query in range(29):
        others = [other for other in range(29) if other != query]
        cosines = items.cls[others] @ items.cls[query]
        order = [others[place] for place in cosines.argsort(descending=True)]
        hits = [items.labels[other] == items.labels[query] for other in order]
        assert found.nearest[query].tolist() == order
        precisions = [sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit]
        assert found.average_precision[query].item() == pytest.approx((sum(precisions) / len(precisions)).item(), abs=1e-6)
        assert found.first_hit[query] == hits.index(True) + 1


def test_collapsed_features_score_the_share_of_the_class():
    found = run(lambda items: output(torch.ones(len(items), 8)), table(50), table(100))
    assert found.scores["map"].value == pytest.approx(20)


def test_chunks_and_the_order_of_the_gallery_change_nothing(monkeypatch: pytest.MonkeyPatch):
    queries, gallery = features(31), features(97, start=31)
    whole = rank(queries, gallery, leave_one_out=False)
    monkeypatch.setattr(retrieval, "_TABLE_CELLS", 300)
    parts = rank(queries, gallery.at(torch.arange(97).flip(0)), leave_one_out=False)
    torch.testing.assert_close(parts.average_precision, whole.average_precision)
    assert torch.equal(parts.first_hit, whole.first_hit)


def test_queries_without_an_item_of_their_class_are_left_out():
    queries = labelled([0, 1, 1, 2, 3], num_classes=4)
    gallery = labelled([0, 0, 1, 2] * 3, num_classes=4)
    assert run(truth, queries, gallery).scores["map"] == (100, 100, 100, 4)
    with pytest.raises(ValueError, match="no query has an item of its class in the gallery"):
        run(truth, labelled([0, 1, 2, 3], num_classes=4), k=(1,))


def test_a_run_can_be_repeated_and_unlabelled_items_are_left_out():
    source = table(60)
    source.items[7] = source.items[7]._replace(label=-1)
    first = run(noisy, source)
    assert first == run(noisy, source)
    assert first.scores["map"].n == 59


def test_picture_frames_the_nearest_in_green_and_red():
    queries, gallery = table(40, start=60), table(60)
    (figure,) = Retrieval().pictures(StubEncoder(noisy), {"test": queries, "train": gallery}).values()
    assert len(figure.axes) == 6 * 6
    voters = Features().labelled(StubEncoder(noisy), DecodedItems(gallery)).cls
    colours = set()
    for row in range(6):
        shown = [axis.images[0].get_array() for axis in figure.axes[6 * row : 6 * row + 6]]
        query, *nearest = ((255 * picture).round() for picture in shown)  # float32, in [0, 1]
        label, position = int(query[0, 0, 0]), int(query[0, 0, 2])  # what `labelled` wrote into the pixels
        item = torch.full((1, 3, 4, 4), 0.0)
        item[:, 0], item[:, 2] = label, position
        cosines = functional.normalize(voters, dim=1) @ functional.normalize(noisy(item).cls, dim=1)[0]
        assert [int(image[0, 0, 2]) for image in nearest] == cosines.topk(5).indices.tolist()
        for axis, image in zip(figure.axes[6 * row + 1 : 6 * row + 6], nearest, strict=True):
            colour = to_hex(axis.spines["left"].get_edgecolor())
            assert colour == ("#009e73" if image[0, 0, 0] == label else "#d55e00")
            colours.add(colour)
    assert len(colours) == 2


def test_bad_input_is_named():
    source = table(9)
    some = Retrieval(k=(1, 9)).run(StubEncoder(noisy), {"test": source})
    assert set(some.scores) == {"map", "recall1"}
    assert some.left_out == {"recall9": "k: [1, 9]; accepted: 1 and other numbers up to 8, the items that are searched"}
    assert "recall9" in Retrieval(k=(1, 9)).run(StubEncoder(noisy), {"test": source, "train": source}).scores
    with pytest.raises(ValueError, match=r"k: \[5\]; accepted: 1 and"):
        Retrieval(k=(5,))
    with pytest.raises(ValueError, match="has no classes"):
        Retrieval(k=(1,)).check({"test": masked([torch.zeros(4, 4, dtype=torch.long)])})
    with pytest.raises(ValueError, match="not finite"):
        run(lambda items: output(torch.full((len(items), 8), torch.nan)), source, k=(1,))
    with pytest.raises(ValueError, match="no item has a label"):
        run(chance, labelled([-1] * 9, num_classes=NUM_CLASSES), k=(1,))
