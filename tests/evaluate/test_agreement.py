"""Agreement: features that know the item find its copy, noise finds it by chance, and numbers are those of loops."""

import pytest
import torch
from evaluate_stubs import StubEncoder, half_width, labelled, noise, position_of
from torch.nn import functional

from glpretrain.core.types import EncoderOutput
from glpretrain.evaluate import Agreement
from glpretrain.evaluate.cls.agreement import agreement, changed


def source(count: int):
    return labelled([0] * count, num_classes=1, size=10)


def scored(features, count: int = 53, **settings):
    return Agreement(**settings).run(StubEncoder(features, size=10), {"test": source(count)}).scores


def output(cls):
    return EncoderOutput(cls, cls[:, None].expand(-1, 25, -1))


def test_features_that_know_the_item_score_a_hundred():
    found = scored(lambda items: output(noise(position_of(items), 8, seed=3)))
    assert found["found"].value == 100.0 and found["kept"].value == 100.0 and found["found"].n == 53


def test_noise_scores_chance_within_the_interval():
    turns = iter(range(1000))

    def drawn(items):
        return output(noise(position_of(items) + 1000 * next(turns), 8, seed=3))

    found = scored(drawn, 331)
    assert abs(found["found"].value - 100 / 331) < half_width(found["found"]) + 1.0
    assert abs(found["kept"].value - 100 * 10 / 330) < half_width(found["kept"]) + 0.5


def test_numbers_are_those_of_loops():
    own, copied = (functional.normalize(torch.sin(torch.arange(13 * 5.0).reshape(13, 5) * factor), dim=1) for factor in (1.3, 1.31))
    found, kept = agreement(own, copied, k=3)
    for item in range(13):
        by_copy = sorted(range(13), key=lambda other: -float(copied[item] @ own[other]))
        by_item = sorted((n for n in range(13) if n != item), key=lambda other: -float(own[item] @ own[other]))
        assert found[item] == float(by_copy[0] == item)
        assert kept[item].item() == pytest.approx(len({*by_item[:3]} & {*[n for n in by_copy if n != item][:3]}) / 3)


def test_a_copy_is_mirrored_and_shows_the_middle():
    ramp = torch.arange(20.0).expand(1, 1, 20, 20).contiguous()
    copy = changed(ramp)
    assert copy.shape == ramp.shape
    assert copy[0, 0, 10, 0].item() == pytest.approx(17.5, abs=0.5) and copy[0, 0, 10, -1].item() == pytest.approx(1.5, abs=0.5)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="k: 10 with 11 images; accepted: at least 12 images, or a smaller k"):
        scored(lambda items: output(noise(position_of(items), 8, seed=3)), 11)
    with pytest.raises(ValueError, match="k"):
        Agreement(k=0)
