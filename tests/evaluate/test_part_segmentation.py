"""Parts and prompts on clouds: features that know the parts score 100, noise scores chance, plain loops agree."""

from collections.abc import Callable, Sequence

import pytest
import torch
from evaluate_stubs import TableSource, half_width, noise
from sklearn.metrics import jaccard_score
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.data.sources.base import Item
from glpretrain.encoders import PointTransformer
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate import PartSegmentation, PointPrompts, Result
from glpretrain.evaluate.points import part_segmentation
from glpretrain.evaluate.points.part_segmentation import instance_iou, part_shares
from glpretrain.evaluate.points.prompts import CloudPlaces, careful_click, point_iou, share_of_cells
from glpretrain.evaluate.points.tokens import at_points
from glpretrain.evaluate.reading import Decoded, batch_of

NUM_PARTS, POINTS, TOKENS = 4, 96, 24
SPACING = 10.0  # parts are blobs of radius 1 that far apart along x, so that no cell and no interpolation reaches into another


class Clouds(TableSource):
    """Items from a list, of points."""

    modality = "points"


def blobs(count: int, *, seed: int = 0) -> Clouds:
    """Two of four parts per cloud; the class says which two."""
    items = []
    for position in range(count):
        label = position % 3
        parts = torch.tensor([label, label + 1])[torch.arange(POINTS) % 2]  # [P]
        points = noise(torch.tensor([position]), POINTS, 3, seed=seed)[0]
        points = functional.normalize(points, dim=1)
        points[:, 0] += SPACING * parts
        items.append(Item(points, label, 1 + parts - label, None, parts))
    return Clouds(items, classes=["a", "b", "c"], mask_classes=[f"p{n}" for n in range(NUM_PARTS)])


class StubPoints(PointTransformer):
    """Tokens from a function of their centres, Float[B N 3] to Float[B N D]."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        Encoder.__init__(self)
        self.features, self.group_size, self.points_per_token = features, 4, POINTS // TOKENS
        self.probe = torch.nn.Linear(1, 1)

    card = EncoderCard("StubPoints", {}, "points", (POINTS, 3), (4,), 8, (0.0,) * 3, (1.0,) * 3)
    num_layers = 1

    def forward(self, items: Tensor | Sequence[Tensor], *, mask=None, keep=None, keys=None) -> EncoderOutput:
        patches = self.features(self.group(items).centres)
        return EncoderOutput(patches.mean(dim=1), patches)

    def backbone_state(self) -> dict[str, Tensor]:
        return {}


def part_of(centres: Tensor) -> Tensor:
    return (centres[..., 0] / SPACING).round().long()


def oracle(centres: Tensor) -> Tensor:
    return functional.one_hot(part_of(centres), 8).float()


def random(centres: Tensor) -> Tensor:
    key = (centres * 1e4).long().sum(dim=-1)
    return keys.normal(keys.item_keys(seed=5, epoch=0, index=key), 8)


FAST = {"learning_rates": [0.3], "l2": [1e-5], "num_steps": 200}


def parts(features, train: Clouds, test: Clouds, **options) -> Result:
    return PartSegmentation(**options).run(StubPoints(features), {"masked_train": train, "masked": test})


def prompted(features, clouds: Clouds, **options) -> Result:
    return PointPrompts(**options).run(StubPoints(features), {"masked": clouds})


def test_tokens_that_know_their_part_score_100():
    result = parts(oracle, blobs(12), blobs(10, seed=1), num_steps=200)
    for name in ("miou", "instance_miou", "accuracy", *(f"iou_p{n}" for n in range(NUM_PARTS))):
        assert result.scores[name].value == pytest.approx(100), name
    assert result.scores["miou"].n == 10 and set(result.chosen) == {"learning_rate", "l2"}
    prompts = prompted(oracle, blobs(16)).scores
    for name in ("miou", "miou_centre", "miou_fixed", "miou_oracle", "auc", "miou_classes"):
        assert prompts[name].value == pytest.approx(100), name
    assert prompts["miou"].n == 2 * 12  # two parts in each cloud that did not calibrate


def test_noise_knows_nothing_of_parts():
    scores = parts(random, blobs(30), blobs(30, seed=1), **FAST).scores
    # Half of the points of a class lie on each of its two parts: a restricted answer is right on one half, with an IoU near a third.
    assert 15 < scores["instance_miou"].value < 45 and scores["accuracy"].value < 45
    prompts = prompted(random, blobs(40)).scores
    # A part is half of the points: everything as the segment scores 50, a random half a third.
    assert 25 < prompts["miou"].value < 55 and abs(prompts["auc"].value - 50) < max(2 * half_width(prompts["auc"]), 3)


def test_results_repeat():
    first, second = (parts(random, blobs(9), blobs(6, seed=1), num_steps=50) for _ in range(2))
    assert first == second
    assert prompted(random, blobs(9)) == prompted(random, blobs(9))


def test_iou_at_every_threshold_is_scikit_learns():
    similarity = torch.sin(torch.arange(60.0)).reshape(3, 20)
    part = torch.arange(20) % 3 == 0
    thresholds = torch.tensor([-0.5, 0.0, 0.7])
    found = point_iou(similarity, part, thresholds=thresholds)
    for row in range(3):
        for column, threshold in enumerate(thresholds):
            expected = jaccard_score(part.numpy(), (similarity[row] > threshold).numpy(), zero_division=0)
            assert found[row, column].item() == pytest.approx(expected)


def test_instance_iou_is_that_of_a_plain_loop():
    logits = torch.sin(1.7 * torch.arange(3 * 11 * 4.0)).reshape(3, 11, 4)
    truth = (torch.arange(33).reshape(3, 11) * 7 % 5) - 1  # -1 to 3
    allowed = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0]]).bool()
    expected = []
    for cloud in range(3):
        known = truth[cloud] >= 0
        predicted = logits[cloud].masked_fill(~allowed[cloud], -torch.inf).argmax(dim=-1)
        ious = []
        for part in allowed[cloud].nonzero()[:, 0].tolist():
            a, b = (truth[cloud] == part) & known, (predicted == part) & known
            union = (a | b).sum().item()
            ious.append((a & b).sum().item() / union if union else 1.0)
        expected.append(sum(ious) / len(ious))
    torch.testing.assert_close(instance_iou(logits, truth, allowed=allowed), torch.tensor(expected))


def test_a_cloud_is_compared_over_the_parts_of_its_class(monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []

    def noting(logits: Tensor, truth: Tensor, *, allowed: Tensor) -> Tensor:
        seen.append(allowed)
        return instance_iou(logits, truth, allowed=allowed)

    monkeypatch.setattr(part_segmentation, "instance_iou", noting)
    parts(random, blobs(6), blobs(5, seed=1), **FAST)
    assert [allowed.nonzero()[:, 0].tolist() for allowed in torch.cat(seen)] == [[n % 3, n % 3 + 1] for n in range(5)]


def test_points_that_do_not_count_are_in_no_iou():
    points, centres = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0, 0]), torch.tensor([[0.5, 0, 0], [2.5, 0, 0], [4.5, 0, 0]])
    similarity, mask = torch.tensor([[1.0, 0.6, -0.4], [0.6, 1.0, 0.2], [-0.4, 0.2, 1.0]]), torch.arange(6) < 2
    places, known = CloudPlaces(points, centres, torch.arange(6) // 2), torch.arange(6) != 2
    found, all_points = (places.iou(similarity, torch.tensor([0, 2]), mask, known=counts) for counts in (known, known | True))
    some = CloudPlaces(points[known], centres, places.cell[known])
    expected = some.iou(similarity, torch.tensor([0, 2]), mask[known], known=torch.ones(5, dtype=torch.bool))
    assert torch.equal(found, expected) and not torch.equal(found, all_points)


def test_shares_are_those_of_the_points_nearest_to_a_centre():
    points = torch.tensor([[[0.0, 0, 0], [0.1, 0, 0], [5, 0, 0], [5.1, 0, 0], [5.2, 0, 0]]])
    semantic = torch.tensor([[0, 1, 1, -1, 1]])
    batch = batch_of(Decoded(points, torch.tensor([0]), None, semantic, torch.tensor([0]), torch.zeros(1, 32, dtype=torch.uint8), {}))
    found = part_shares(batch, torch.tensor([[[0.0, 0, 0], [5, 0, 0], [99, 0, 0]]]), num_parts=2)
    torch.testing.assert_close(found, torch.tensor([[[0.5, 0.5], [0, 2 / 3], [0, 0]]]))
    torch.testing.assert_close(share_of_cells(semantic[0] == 1, torch.tensor([0, 0, 1, 1, 1]), count=3), torch.tensor([0.5, 2 / 3, 0]))


def test_scores_at_centres_are_kept_there():
    centres = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]])
    scores = torch.tensor([[[1.0], [2], [3], [4]]])
    torch.testing.assert_close(at_points(scores, points=centres, centres=centres), scores, atol=1e-5, rtol=0)


def test_a_careful_click_is_far_from_the_other_parts():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]])
    assert careful_click(points, torch.tensor([True, True, True, False])) == 0
    assert careful_click(points, torch.ones(4, dtype=torch.bool)) in (1, 2)


def test_pictures_are_made():
    given = {"masked_train": blobs(9), "masked": blobs(12, seed=1)}
    assert set(PartSegmentation(**FAST).pictures(StubPoints(oracle), given)) == {"parts"}
    assert set(PointPrompts().pictures(StubPoints(oracle), given)) == {"similarity", "prompts"}


def test_what_is_missing_is_named():
    whole = blobs(6)
    bare = Clouds([item._replace(instances=None, semantic=None) for item in whole.items], classes=["a", "b", "c"])
    with pytest.raises(ValueError, match="has no masks"):
        PointPrompts().check({"masked": bare})
    with pytest.raises(ValueError, match="has no masks of classes"):
        PartSegmentation().check({"masked_train": whole, "masked": bare})
    unlabelled = Clouds([item._replace(label=-1) for item in whole.items], mask_classes=whole.mask_classes)
    without = parts(oracle, unlabelled, unlabelled, **FAST)
    assert "miou" in without.scores and "instance_miou needs the class" in without.left_out["instance_miou"]
    with pytest.raises(ValueError, match="min_patches: 0"):
        PointPrompts(min_patches=0)
    with pytest.raises(ValueError, match="num_steps: 0"):
        PartSegmentation(num_steps=0)
    with pytest.raises(ValueError, match="masked_train: 1 items are too few to choose among learning_rates"):
        parts(oracle, blobs(1), whole)
