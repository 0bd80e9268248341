"""Health: even features fill every direction, collapsed ones a single one, and every number is its definition written as loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluate_stubs import StubEncoder, half_width, label_of, labelled, noise, position_of
from scipy.special import gammaln, iv
from torch import Tensor
from torch.nn import functional

from glpretrain.core.types import EncoderOutput
from glpretrain.evaluate import DecodedItems, Features, Health, Result
from glpretrain.evaluate.health import cosine_between, decay, effective_rank, half_distance, singular_values, uniformity
from glpretrain.evaluate.metrics.intervals import jackknife_interval, mean_interval

GRID = (3, 5)


class Wide(StubEncoder):
    """A grid of 3 x 5 patches."""

    def __init__(self, features):
        super().__init__(features, size=6)

    @property
    def card(self):
        return replace(super().card, item_shape=(3, 6, 10))


def source(count: int):
    return labelled([index % 3 for index in range(count)], num_classes=3, size=10)


def even(items: Tensor) -> EncoderOutput:
    position = position_of(items)
    return EncoderOutput(noise(position, 8, seed=3), noise(position, 15, 8, seed=4))


def leaning(items: Tensor) -> EncoderOutput:
    """Directions of unequal strength, and a mean that is not zero."""
    scale = torch.logspace(0, -2, 8)
    cls, patches, _ = even(items)
    return EncoderOutput(cls * scale + 0.3, (patches + cls[:, None]) * scale + 0.3)


def constant(items: Tensor) -> EncoderOutput:
    return EncoderOutput(torch.ones(len(items), 8), torch.ones(len(items), 15, 8))


def run(features, items=None, **options) -> Result:
    return Health(features=Features(**options)).run(Wide(features), {"test": items or source(53)})


def scores(features, count: int = 53, **options) -> dict:
    return run(features, source(count), **options).scores


def rows(features, count: int = 53) -> tuple[Tensor, Tensor]:
    found = [output for _, output in Features().encode(Wide(features), DecodedItems(source(count)), resize="crop")]
    return torch.cat([output.cls for output in found]), torch.cat([output.patches for output in found])


def rank_by_numpy(matrix: Tensor) -> float:
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    share = values / values.sum() + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


def test_even_features_fill_every_direction():
    found = scores(even, 2000)
    # Singular values of a Gaussian matrix: square roots of the Marchenko-Pastur law, whose entropy is integrated numerically.
    for name, ratio in (("rank_cls", 8 / 2000), ("rank_patches", 8 / 30000)):
        low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
        value = np.linspace(low, high, 20001)[1:-1]
        density = np.sqrt((high - value) * (value - low)) / value
        mean = (density * np.sqrt(value)).sum() / density.sum()
        entropy = (density * np.sqrt(value) * np.log(np.sqrt(value))).sum() / density.sum()
        expected = 8 * mean * math.exp(-entropy / mean)
        assert found[name].value == pytest.approx(expected, abs=0.02)
        assert 7.9 < found[name].value < 8
    # E exp(4 cos - 4) on the sphere in D = 8 dimensions, by the Bessel function.
    expected = -4 + gammaln(4) + 3 * math.log(2 / 4) + math.log(iv(3, 4))
    for name in ("uniformity_cls", "uniformity_mean_patch"):
        assert abs(found[name].value - expected) < 2 * half_width(found[name])  # 4 standard deviations
        assert half_width(found[name]) < 0.05
    for name in ("cosine_between", "cosine_within"):
        assert abs(found[name].value) < 2 * half_width(found[name]) + 1e-3
    assert found["half_distance"].value == pytest.approx(0.5, abs=0.02)  # no neighbour is alike: a straight line from 1 to 0
    assert {score.n for score in found.values()} == {2000}


def test_collapsed_features_are_one_point():
    found = scores(constant)
    expected = {"rank_cls": 1, "rank_patches": 1, "uniformity_cls": 0, "uniformity_mean_patch": 0, "cosine_between": 1, "cosine_within": 1}
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-4), name  # 8 directions times the rank's 1e-7, times its logarithm
    assert found["half_distance"] == (4, 4, 4, 53)  # the longer side of the grid less one: it never falls
    assert all(half_width(score) == pytest.approx(0, abs=1e-5) for score in found.values())
    nothing = scores(lambda items: EncoderOutput(torch.zeros(len(items), 8), torch.zeros(len(items), 15, 8)))
    assert nothing["rank_cls"].value == pytest.approx(1, abs=1e-4)


def test_one_direction_per_class_is_as_many_directions_as_classes():
    def one_hot(items: Tensor) -> EncoderOutput:
        cls = functional.one_hot(label_of(items), 8).float()
        return EncoderOutput(cls, cls[:, None].expand(-1, 15, -1))

    found = scores(one_hot, 60)
    assert found["rank_cls"].value == pytest.approx(3, abs=1e-4)
    # Of 59 others 19 are the same point, 40 are at a right angle: squared distance 2.
    assert found["uniformity_cls"].value == pytest.approx(math.log((19 + 40 * math.exp(-4)) / 59), abs=1e-5)
    assert found["cosine_between"].value == pytest.approx(19 / 59) and found["cosine_within"].value == pytest.approx(1)


def test_ranks_agree_with_numpy():
    found, (cls, patches) = scores(leaning), rows(leaning)
    assert found["rank_cls"].value == pytest.approx(rank_by_numpy(cls), rel=1e-6)
    assert found["rank_patches"].value == pytest.approx(rank_by_numpy(patches.flatten(0, 1)), rel=1e-6)
    assert 1.5 < found["rank_cls"].value < 6
    few = rows(leaning, 5)[0]  # fewer rows than directions
    gram = few.double().T @ few.double()
    assert effective_rank(gram).item() == pytest.approx(rank_by_numpy(few), rel=1e-5)
    expected = torch.from_numpy(np.linalg.svd(cls.double().numpy(), compute_uv=False))
    torch.testing.assert_close(singular_values(cls.double().T @ cls.double()), expected, rtol=1e-8, atol=1e-8)


def test_uniformity_agrees_with_loops_over_pairs(monkeypatch: pytest.MonkeyPatch):
    found, (cls, patches) = scores(leaning), rows(leaning)
    for name, features in (("uniformity_cls", cls), ("uniformity_mean_patch", patches.mean(dim=1))):
        unit = functional.normalize(features, dim=1).double()
        potentials = [math.exp(-2 * (unit[i] - unit[j]).square().sum().item()) for i in range(53) for j in range(i)]
        assert found[name].value == pytest.approx(math.log(sum(potentials) / len(potentials)), abs=1e-5)
        # The official one-liner, for the mean over distinct pairs.
        assert found[name].value == pytest.approx(torch.pdist(unit).square().mul(-2).exp().mean().log().item(), abs=1e-5)
    monkeypatch.setattr("glpretrain.evaluate.health._TABLE_CELLS", 500)
    assert scores(leaning)["uniformity_cls"].value == pytest.approx(found["uniformity_cls"].value, abs=1e-6)


def test_cosines_of_patches_agree_with_loops():
    found, (_, patches) = scores(leaning, 7), rows(leaning, 7)
    unit = functional.normalize(patches, dim=2).double()
    within = [unit[b, n] @ unit[b, m] for b in range(7) for n in range(15) for m in range(15) if n != m]
    between = [unit[a, n] @ unit[b, m] for a in range(7) for b in range(7) for n in range(15) for m in range(15) if a != b]
    assert found["cosine_within"].value == pytest.approx(torch.stack(within).mean().item(), abs=1e-5)
    assert found["cosine_between"].value == pytest.approx(torch.stack(between).mean().item(), abs=1e-5)
    curve = [[] for _ in range(4)]
    for n in range(15):
        for m in range(15):
            distance = round(math.hypot(n // 5 - m // 5, n % 5 - m % 5))
            if 1 <= distance <= 4:
                curve[distance - 1].append((unit[:, n] * unit[:, m]).sum(dim=1))
    expected = torch.stack([torch.stack(part).mean(dim=0) for part in curve], dim=1)
    torch.testing.assert_close(decay(unit.float(), grid=GRID), expected.float(), rtol=1e-5, atol=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    whole = scores(leaning)
    monkeypatch.setattr("glpretrain.evaluate.health._TABLE_CELLS", 100)
    for name, score in scores(leaning, batch_size=5).items():
        assert score == pytest.approx(whole[name], abs=1e-5), name


def test_half_distance_of_known_curves():
    def of(*curve: float, within: float = 0.0) -> float:
        return half_distance(torch.tensor([2.0, 2 * within, *(2 * value for value in curve)], dtype=torch.float64)).item()

    assert of(0.8, 0.6, 0.4, 0.2) == pytest.approx(2.5)
    assert of(0.0, 0.0, 0.0, 0.0) == pytest.approx(0.5)
    assert of(0.9, 0.5, 0.9, 0.2) == pytest.approx(2)  # the first time
    assert of(0.9, 0.8, 0.7, 0.6) == 4
    assert of(0.9, 0.8, 0.7, 0.6, within=0.6) == pytest.approx(2)
    assert of(1.0, 1.0, 1.0, 1.0, within=1.0) == 4


def test_smooth_patches_have_a_longer_half_distance():
    def smoothed(steps: int):
        def features(items: Tensor) -> EncoderOutput:
            maps = even(items).patches.transpose(1, 2).unflatten(2, GRID)
            for _ in range(steps):
                maps = functional.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
            return EncoderOutput(even(items).cls, maps.flatten(2).transpose(1, 2))

        return scores(features, 200)["half_distance"]

    none, some, more = smoothed(0), smoothed(1), smoothed(2)
    assert none.value + half_width(none) < some.value - half_width(some) and some.value + half_width(some) < more.value - half_width(more)


def test_jackknife_of_a_mean_is_the_textbook_interval():
    values = torch.sin(torch.arange(23.0) * 1.7).double()
    sums = torch.stack([torch.ones(23).double(), values], dim=1)
    assert jackknife_interval(lambda total: total[:, 1] / total[:, 0], sums) == pytest.approx(mean_interval(values))
    assert jackknife_interval(lambda total: total[:, 1] / total[:, 0], sums[:1]) == math.inf


def test_intervals_are_as_wide_as_the_spread_over_samples():
    """40 samples of 60 items: the standard deviation of 40 numbers is itself known to 11 %, an interval from 20 groups to 16 %."""

    def drawn(number: int) -> dict:
        items = source(60 * 40)
        items.items = items.items[60 * number : 60 * number + 60]
        return run(leaning, items).scores

    found = [drawn(number) for number in range(40)]
    for name in found[0]:
        spread = 1.96 * torch.tensor([scores_[name].value for scores_ in found]).std().item()
        claimed = torch.tensor([half_width(scores_[name]) for scores_ in found]).mean().item()
        assert 0.6 < claimed / spread < 1.7, (name, claimed, spread)


def test_items_without_labels_count_and_a_run_can_be_repeated():
    items = labelled([-1] * 31, num_classes=0, size=10)
    first = run(even, items)
    assert first == run(even, items)
    assert first.scores["rank_cls"].n == 31 and set(Health.headlines) <= set(first.scores)


def test_different_items_are_all_pairs_of_different_items():
    vectors = torch.sin(torch.arange(7.0 * 5).reshape(7, 5) * 1.7).double()
    sums = torch.cat([torch.tensor([7.0]).double(), vectors.square().sum()[None], vectors.sum(dim=0)])
    expected = torch.stack([vectors[a] @ vectors[b] for a in range(7) for b in range(7) if a != b]).mean()
    assert cosine_between(sums).item() == pytest.approx(expected.item())


def test_pictures_show_the_numbers():
    figures = Health().pictures(Wide(leaning), {"test": source(53)})
    found = scores(leaning)
    cls, patches = rows(leaning)
    for line, features in zip(figures["spectrum"].axes[0].lines, (cls, patches.flatten(0, 1)), strict=True):
        values = torch.linalg.svdvals(features.double())
        assert line.get_ydata() == pytest.approx((values / values[0]).numpy(), abs=1e-6)
    labels = [line.get_label() for line in figures["spectrum"].axes[0].lines]
    assert labels[0] == f"cls, rank {found['rank_cls'].value:.1f} of 8"
    by_distance, within, between, half = figures["decay"].axes[0].lines
    curve = decay(functional.normalize(patches, dim=2), grid=GRID).mean(dim=0)
    assert by_distance.get_ydata() == pytest.approx([1, *curve.tolist()], abs=1e-5)
    assert within.get_ydata()[0] == pytest.approx(found["cosine_within"].value, abs=1e-5)
    assert between.get_ydata()[0] == pytest.approx(found["cosine_between"].value, abs=1e-5)
    assert half.get_xdata()[0] == pytest.approx(found["half_distance"].value, abs=1e-5)


def test_uniformity_interval_holds_no_pair_of_a_row_with_itself():
    assert uniformity(functional.normalize(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), dim=1)).value == pytest.approx(-8)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="has 1 item; accepted: at least 2"):
        Health().check({"test": source(1)})
    with pytest.raises(ValueError, match=r"features\.size: 2; accepted: at least two patches"):
        scores(even, 5, size=2)
    with pytest.raises(ValueError, match="not finite"):
        scores(lambda items: EncoderOutput(torch.full((len(items), 8), torch.nan), even(items).patches), 5)
    with pytest.raises(ValueError, match="8 patches; its grid has 3 x 5"):
        scores(lambda items: EncoderOutput(even(items).cls, even(items).patches[:, :8]), 5)
    broken = source(5)
    broken.unreadable = {0, 1, 2, 4}
    with pytest.raises(ValueError, match="1 item can be read"):
        run(even, broken)
