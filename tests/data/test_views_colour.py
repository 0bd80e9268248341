"""Colour and blur: pixels and parameters as torchvision has them, each sample with its own."""

import itertools
import math
from collections import Counter

import pytest
import torch
from kornia.enhance import adjust_hue
from scipy.stats import kstest
from torchvision.transforms.v2 import functional as F

from glpretrain.core import keys as rng
from glpretrain.data.views import ViewSpec, colour
from glpretrain.data.views.colour import augment, blend, gaussian_blur, require_rgb, shift_hue

FACTORS = torch.tensor([0.0, 0.6, 1.0, 1.4, 3.0])


def images(*shape: int) -> torch.Tensor:
    ramp = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(ramp**1.3)).reshape(shape).float()


def hard_colours() -> torch.Tensor:
    """Float[1 3 5 25]: every corner and edge of the RGB cube on a grid of five levels: ties, greys, black and white."""
    levels = torch.linspace(0, 1, 5)
    return torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 5, 25).contiguous()


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("source", [images(5, 3, 7, 11), hard_colours().expand(5, -1, -1, -1)], ids=["waves", "cube"])
def test_blends_agree_with_torchvision(name, source):
    theirs = {"brightness": F.adjust_brightness, "contrast": F.adjust_contrast, "saturation": F.adjust_saturation}[name]
    ours = blend(source, **{name: FACTORS})
    for item, factor, result in zip(source, FACTORS.tolist(), ours, strict=True):
        # Their luma is .2989 .587 .114 and sums to .9999, kornia's .299 .587 .114; times the largest factor.
        torch.testing.assert_close(result, theirs(item, factor), rtol=0, atol=3e-4)


def test_contrast_of_one_channel_agrees_with_torchvision():
    source = images(5, 1, 7, 11)
    for item, factor, result in zip(source, FACTORS.tolist(), blend(source, contrast=FACTORS), strict=True):
        torch.testing.assert_close(result, F.adjust_contrast(item, factor), rtol=0, atol=1e-5)


def test_one_pass_serves_items_with_different_operations():
    source = images(3, 3, 7, 11)
    one = torch.ones(3)
    brightness, contrast, saturation = (torch.where(torch.arange(3) == i, 0.7, one) for i in range(3))
    together = blend(source, brightness=brightness, contrast=contrast, saturation=saturation)
    for i, name in enumerate(("brightness", "contrast", "saturation")):
        torch.testing.assert_close(together[i], blend(source, **{name: torch.full((3,), 0.7)})[i])


@pytest.mark.parametrize("source", [images(5, 3, 7, 11), hard_colours().expand(5, -1, -1, -1)], ids=["waves", "cube"])
def test_hue_agrees_with_torchvision_and_kornia(source):
    turns = torch.tensor([-0.5, -0.1, 0.0, 0.03, 0.5])
    ours = shift_hue(source, turns=turns)
    torch.testing.assert_close(ours, adjust_hue(source, 2 * math.pi * turns), rtol=0, atol=1e-5)
    for item, turn, result in zip(source, turns.tolist(), ours, strict=True):
        torch.testing.assert_close(result, F.adjust_hue(item, turn), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "num_taps"), [((24, 24), None), ((17, 29), None), ((17, 29), 9)])
def test_blur_agrees_with_torchvision(shape, num_taps):
    source = images(3, 2, *shape)
    sigma = torch.tensor([0.1, 0.9, 2.0])
    ours = gaussian_blur(source, sigma=sigma, max_sigma=2.0, num_taps=num_taps)
    for item, width, result in zip(source, sigma.tolist(), ours, strict=True):
        theirs = F.gaussian_blur(item.expand(2, *shape)[:1], [num_taps or 13] * 2, [width, width])
        torch.testing.assert_close(result[:1], theirs, rtol=0, atol=1e-5)


def test_blur_of_a_view_smaller_than_its_kernel_keeps_a_flat_image():
    flat = torch.full((2, 3, 4, 5), 0.7)
    torch.testing.assert_close(gaussian_blur(flat, sigma=torch.tensor([0.5, 2.0]), max_sigma=2.0), flat)


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


def test_every_sample_jitters_in_its_own_order_and_all_orders_occur_alike():
    source = images(4000, 3, 2, 3)
    settings = spec(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.4, jitter_prob=1.0)
    result = augment(source, spec=settings, keys=KEYS)
    draws = rng.uniform(KEYS, colour._DRAWS)
    place = rng.permutation(rng.fold_in(KEYS, colour._ORDER), 4)
    for i in range(100):
        factors = 0.2 + 1.6 * draws[i, :3]
        turns = (0.4 * (2 * draws[i, 3] - 1)).item()
        order = place[i].argsort().tolist()
        # Their luma sums to .9999; up to two blends with it, and hue multiplies the differences of dull colours.
        torch.testing.assert_close(result[i], reference_jitter(source[i], factors=factors, turns=turns, order=order), rtol=0, atol=2e-3)
    counts = Counter(tuple(row) for row in place.tolist())
    assert set(counts) == set(itertools.permutations(range(4)))
    assert max(counts.values()) < 4000 / 24 + 5 * math.sqrt(4000 / 24)  # five standard deviations


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
