"""Colour and blur: pixels and parameters as torchvision has them, each sample with its own."""

import itertools
import math
from collections import Counter

import pytest
import torch
from kornia.enhance import adjust_hue
from scipy.stats import kstest
from torchvision.transforms.v2 import functional as F
from view_parts import augment

from glpretrain.core import keys as rng
from glpretrain.data.views import ViewSpec, colour
from glpretrain.data.views.colour import blend, gaussian_blur, gaussian_taps, require_rgb, shift_hue

BLENDS = ("brightness", "contrast", "saturation")
FACTORS = torch.tensor([0.0, 0.6, 1.0, 1.4, 3.0])


def images(*shape: int) -> torch.Tensor:
    ramp = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(ramp**1.3)).reshape(shape).float()


def hard_colours() -> torch.Tensor:
    """Float[1 3 5 25]: every corner and edge of the RGB cube on a grid of five levels: ties, greys, black and white."""
    levels = torch.linspace(0, 1, 5)
    return torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 5, 25).contiguous()


def blends(name: str, factors: torch.Tensor) -> torch.Tensor:
    """Float[B 3]: the factors of the image, of its luma and of the mean of its luma."""
    rest, zero = 1.0 - factors, torch.zeros_like(factors)
    others = {"brightness": (zero, zero), "contrast": (zero, rest), "saturation": (rest, zero)}[name]
    return torch.stack((factors, *others), dim=1)


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize("source", [images(5, 3, 7, 11), hard_colours().expand(5, -1, -1, -1)], ids=["waves", "cube"])
def test_blends_agree_with_torchvision(name, source):
    theirs = {"brightness": F.adjust_brightness, "contrast": F.adjust_contrast, "saturation": F.adjust_saturation}[name]
    ours = blend(source, factors=blends(name, FACTORS))
    for item, factor, result in zip(source, FACTORS.tolist(), ours, strict=True):
        # Their luma is .2989 .587 .114 and sums to .9999, kornia's .299 .587 .114; times the largest factor.
        torch.testing.assert_close(result, theirs(item, factor), rtol=0, atol=3e-4)


def test_contrast_of_one_channel_agrees_with_torchvision():
    source = images(5, 1, 7, 11)
    for item, factor, result in zip(source, FACTORS.tolist(), blend(source, factors=blends("contrast", FACTORS)), strict=True):
        torch.testing.assert_close(result, F.adjust_contrast(item, factor), rtol=0, atol=1e-5)


def test_one_pass_serves_items_with_different_operations():
    source, factors = images(3, 3, 7, 11), torch.full((3,), 0.7)
    together = blend(source, factors=torch.stack([blends(name, factors)[0] for name in BLENDS]))
    for i, name in enumerate(BLENDS):
        torch.testing.assert_close(together[i], blend(source, factors=blends(name, factors))[i])


@pytest.mark.parametrize("source", [images(5, 3, 7, 11), hard_colours().expand(5, -1, -1, -1)], ids=["waves", "cube"])
def test_hue_agrees_with_torchvision_and_kornia(source):
    turns = torch.tensor([-0.5, -0.1, 0.0, 0.03, 0.5])
    ours = shift_hue(source, turns=turns)
    torch.testing.assert_close(ours, adjust_hue(source, 2 * math.pi * turns), rtol=0, atol=1e-5)
    for item, turn, result in zip(source, turns.tolist(), ours, strict=True):
        torch.testing.assert_close(result, F.adjust_hue(item, turn), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "num_taps"), [((24, 24), None), ((17, 29), None), ((17, 29), 9), ((50, 33), 5)])
def test_blur_agrees_with_torchvision(shape, num_taps):
    source = images(3, 2, *shape)
    sigma = torch.tensor([0.1, 0.9, 2.0])
    taps = gaussian_taps(sigma, radius=torch.full((3,), (num_taps or 13) // 2))
    ours = gaussian_blur(source, taps=torch.cat((taps, taps), dim=1))
    for item, width, result in zip(source, sigma.tolist(), ours, strict=True):
        theirs = F.gaussian_blur(item.expand(2, *shape)[:1], [num_taps or 13] * 2, [width, width])
        torch.testing.assert_close(result[:1], theirs, rtol=0, atol=1e-5)


def test_blur_of_a_view_smaller_than_its_kernel_keeps_a_flat_image():
    flat = torch.full((7, 3, 4, 5), 0.7)
    torch.testing.assert_close(augment(flat, spec=ViewSpec((4, 5), (0.5, 1.0), blur_prob=1.0), keys=KEYS[:7]), flat)


def spec(**settings) -> ViewSpec:
    return ViewSpec(16, (0.5, 1.0), **settings)


KEYS = rng.item_keys(seed=0, epoch=0, index=torch.arange(4000))


def test_grayscale_and_solarize_agree_with_torchvision_and_hit_their_share():
    source = hard_colours().expand(4000, -1, -1, -1)
    item = source[0]
    for settings, theirs in (
        ({"grayscale_prob": 0.2}, F.rgb_to_grayscale(item, num_output_channels=3)),
        ({"solarize_prob": 0.2}, F.solarize(item, 0.5)),
    ):
        result = augment(source, spec=spec(**settings), keys=KEYS)
        changed = (result != source).flatten(1).any(1)
        assert abs(changed.float().mean().item() - 0.2) < 0.025  # four standard deviations
        torch.testing.assert_close(result[changed], theirs.expand_as(result[changed]), rtol=0, atol=1.1e-4)  # their luma sums to .9999


def test_brightness_factors_are_uniform_and_hit_their_share():
    source = torch.full((4000, 1, 2, 2), 0.25)
    factor = augment(source, spec=spec(brightness=0.4, jitter_prob=0.75), keys=KEYS)[:, 0, 0, 0] / 0.25
    jittered = factor[factor != 1.0]
    assert abs(len(jittered) / 4000 - 0.75) < 0.028  # four standard deviations
    assert kstest(jittered.double().numpy(), "uniform", args=(0.6, 0.8)).pvalue > 1e-3


def test_a_strength_above_one_does_not_make_negative_factors():
    source = torch.full((4000, 1, 2, 2), 0.25)
    factor = augment(source, spec=spec(brightness=2.0, jitter_prob=1.0), keys=KEYS)[:, 0, 0, 0] / 0.25
    assert kstest(factor.double().numpy(), "uniform", args=(0.0, 3.0)).pvalue > 1e-3


def test_hue_shifts_are_uniform():
    source = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(4000, 3, 1, 1)
    result = augment(source, spec=spec(hue=0.1, jitter_prob=1.0), keys=KEYS).squeeze(3).squeeze(2)
    turns = (result[:, 1] - result[:, 2]) / 6  # from pure red, a sixth of a turn moves one channel from 0 to 1
    assert kstest(turns.double().numpy(), "uniform", args=(-0.1, 0.2)).pvalue > 1e-3


def test_a_view_is_blurred_with_the_taps_of_its_settings():
    source = images(23, 3, 16, 16)
    nine, all_taps = (augment(source, spec=spec(blur_prob=1.0, blur_taps=taps), keys=KEYS[:23]) for taps in (9, None))
    assert not torch.equal(nine, all_taps)
    assert torch.equal(augment(source, spec=spec(blur_prob=1.0, blur_taps=13), keys=KEYS[:23]), all_taps)
    for taps in (0, 8):
        with pytest.raises(ValueError, match=f"ViewSpec: blur_taps is {taps}; expected an odd number, or none"):
            spec(blur_taps=taps)


def test_blur_hits_its_share_and_leaves_the_others_alone():
    source = images(1, 2, 16, 16).expand(4000, -1, -1, -1)
    result = augment(source, spec=spec(blur_prob=0.5, blur_sigma=(0.5, 2.0)), keys=KEYS)
    changed = (result != source).flatten(1).any(1)
    assert abs(changed.float().mean().item() - 0.5) < 0.032  # four standard deviations


def reference_jitter(item: torch.Tensor, *, factors: torch.Tensor, turns: float, order: list[int]) -> torch.Tensor:
    for operation in order:
        if operation == 3:
            item = F.adjust_hue(item, turns)
        else:
            item = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[operation](item, factors[operation].item())
    return item


@pytest.mark.parametrize("hue", [0.0, 0.4])
def test_every_sample_jitters_in_its_own_order_and_all_orders_occur_alike(hue):
    source = images(4000, 3, 2, 3)
    settings = spec(brightness=0.8, contrast=0.8, saturation=0.8, hue=hue, jitter_prob=0.9, grayscale_prob=0.2)
    result = augment(source, spec=settings, keys=KEYS)
    draws = rng.uniform(KEYS, colour._DRAWS)
    place = rng.permutation(rng.fold_in(KEYS, colour._ORDER), 4)
    jittered, grey = draws[:, colour._JITTER] < 0.9, draws[:, colour._GRAYSCALE] < 0.2
    for i in range(400):
        factors = 0.2 + 1.6 * draws[i, :3]
        turns = (hue * (2 * draws[i, 3] - 1)).item()
        order = place[i].argsort().tolist()
        expected = reference_jitter(source[i], factors=factors, turns=turns, order=order) if jittered[i] else source[i]
        expected = F.rgb_to_grayscale(expected, num_output_channels=3) if grey[i] else expected
        # Their luma sums to .9999; up to three blends with it, and hue multiplies the differences of dull colours.
        torch.testing.assert_close(result[i], expected, rtol=0, atol=2e-3)
    counts = Counter(tuple(row) for row in place.tolist())
    assert set(counts) == set(itertools.permutations(range(4)))
    assert max(counts.values()) < 4000 / 24 + 5 * math.sqrt(4000 / 24)  # five standard deviations


def test_blends_are_one_as_long_as_nothing_can_be_clamped():
    """Factors of at most 1 keep values in [0, 1]: one pass, however many they are. A larger one ends a pass unless it comes last."""
    order, active = torch.tensor([[0, 1, 2, 3]]).expand(5, -1), torch.tensor([[True, True, True, False]]).expand(5, -1)
    factors = torch.tensor([[0.5, 0.7, 0.9], [0.5, 0.7, 1.9], [1.5, 0.7, 0.9], [1.5, 1.7, 1.9], [0.5, 0.7, 1.9]])
    grey = torch.tensor([True, False, True, False, True])
    blends, used = colour._composed(factors, active=active, order=order, grey=grey)
    assert used.sum(dim=0).tolist() == [1, 1, 2, 3, 2] and not used[:3].any()
    source = images(5, 3, 7, 11)
    result = source.clone()
    for one, rows in zip(blends.float(), used, strict=True):
        result[rows] = blend(result[rows], factors=one[rows])
    for i in range(5):
        expected = reference_jitter(source[i], factors=factors[i], turns=0.0, order=[0, 1, 2])
        expected = F.rgb_to_grayscale(expected, num_output_channels=3) if grey[i] else expected
        torch.testing.assert_close(result[i], expected, rtol=0, atol=1e-3)


def test_only_views_that_drew_an_operation_are_computed():
    settings = spec(brightness=0.4, hue=0.1, jitter_prob=0.5, blur_prob=0.25, solarize_prob=0.1)
    changes = colour.draw_colours([settings], keys=KEYS[None], selected=torch.arange(4000)[None] < 3000)
    counts = Counter()
    for change in changes:
        counts[change.operation] += len(change.rows)
        assert len(change.rows) == 0 or change.rows.max() < 3000
    for operation, share in (("hue", 0.5), ("blur", 0.25), ("solarize", 0.1)):
        assert abs(counts[operation] / 3000 - share) < 4 * math.sqrt(share / 3000)
    assert counts["blend"] == counts["hue"]  # brightness alone: one blend, before the hue or after it


def test_switching_an_operation_off_leaves_the_others_alone():
    source = images(13, 1, 8, 8)
    with_blur = spec(brightness=0.4, blur_prob=1e-9)
    torch.testing.assert_close(
        augment(source, spec=with_blur, keys=KEYS[:13]), augment(source, spec=spec(brightness=0.4), keys=KEYS[:13]), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["saturation", "hue", "grayscale_prob"])
def test_operations_that_need_rgb_refuse_other_channels(name):
    with pytest.raises(ValueError, match=rf"{name}=0.1 needs RGB items, but these have 5 channels; set {name} to 0"):
        require_rgb(spec(**{name: 0.1}), channels=5)
    require_rgb(spec(**{name: 0.1}), channels=3)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_operations_take_any_number_of_channels(channels):
    settings = spec(brightness=0.4, contrast=0.4, blur_prob=0.5, solarize_prob=0.5)
    result = augment(images(7, channels, 16, 16), spec=settings, keys=KEYS[:7])
    assert result.shape == (7, channels, 16, 16)
    assert (result >= 0).all()
    assert (result <= 1).all()
