"""Colour operations and blur on values in [0, 1], drawn for every item separately. They are defined as in torchvision.

kornia's `adjust_brightness` adds and its `adjust_contrast` multiplies, whereas brightness multiplies in torchvision and contrast blends
with the mean grey. Therefore the blends are implemented here, and kornia supplies grey, the taps of a Gaussian, and solarize.
"""

import math

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import solarize
from kornia.filters import get_gaussian_kernel1d
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.data.views.spec import ViewSpec
from glpretrain.data.views.stain import jitter_stain

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
# Fixed places among the random numbers of a view, so that the numbers of one operation do not depend on whether another one is on.
_JITTER, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = range(4, 9)
_DRAWS = 9
_ORDER, _STAIN = 1, 2  # purposes of keys: the order of the four jitter operations, and the dyes


def require_rgb(spec: ViewSpec, *, channels: int) -> None:
    """Refuse, with a ValueError, operations that are defined for RGB only where there are not three channels."""
    if channels == 3:
        return
    if spec.strong is not None:
        raise ValueError(f"views: strong needs RGB items, but these have {channels} channels; leave strong out")
    needs = {"stain": spec.stain, "saturation": spec.saturation, "hue": spec.hue, "grayscale_prob": spec.grayscale_prob}
    for name, value in needs.items():
        if value > 0:
            raise ValueError(f"views: {name}={value} needs RGB items, but these have {channels} channels; set {name} to 0")


def _grey(images: Tensor) -> Tensor:
    """Float[B 1 H W]: the luma of RGB, or the mean over any other channels."""
    return rgb_to_grayscale(images) if images.shape[1] == 3 else images.mean(dim=1, keepdim=True)


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def blend(images: Tensor, *, brightness: Tensor | None = None, contrast: Tensor | None = None, saturation: Tensor | None = None) -> Tensor:
    """Blend every item with black (brightness), its mean grey (contrast) or its grey version (saturation, RGB only), and clamp it.

    Items with different operations share one pass, f * image + (1 - f) * other, in which only `other` differs. Images are Float[B C H W].
    The three factors are Float[B]; at most one of an item's may differ from 1.
    """
    factor = images.new_ones(images.shape[0], 1, 1, 1)
    other = images.new_zeros(())
    if brightness is not None:
        factor = factor * _per_sample(brightness)
    if contrast is not None or saturation is not None:
        grey = _grey(images)
        if contrast is not None:
            factor = factor * _per_sample(contrast)
            other = other + grey.mean(dim=(2, 3), keepdim=True) * _per_sample(1.0 - contrast)  # [B 1 1 1]
        if saturation is not None:
            factor = factor * _per_sample(saturation)
            other = other + grey * _per_sample(1.0 - saturation)  # [B 1 H W]
    return torch.addcmul(other, images, factor).clamp_(0.0, 1.0)


def shift_hue(images: Tensor, *, turns: Tensor) -> Tensor:
    """Rotate the hue of RGB, Float[B 3 H W], in HSV by Float[B] full turns, as kornia's `adjust_hue` does (there, a full turn is 2 pi).

    This is the most expensive of all operations. The closed form of RGB -> HSV -> RGB is 2.5 times faster than kornia's implementation.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    divisor = chroma.clamp_min(1e-12)  # for grey, all differences below are 0, and at the end chroma is too
    green_or_blue = torch.where(value == green, (blue - red).div_(divisor).add_(2.0), (red - green).div_(divisor).add_(4.0))
    sixths = torch.where(value == red, (green - blue).div_(divisor), green_or_blue)
    sixths += (6.0 * turns).view(-1, 1, 1)
    sixths -= 6.0 * torch.floor(sixths * (1.0 / 6.0))  # in [0, 6]
    missing = torch.stack(  # 0 where the channel equals `value`, 1 where it is the smallest
        (2.0 - (sixths - 3.0).abs_(), (sixths - 2.0).abs_() - 1.0, (sixths - 4.0).abs_() - 1.0), dim=1
    ).clamp_(0.0, 1.0)
    return torch.addcmul(value.unsqueeze(1), missing, chroma.unsqueeze(1), value=-1.0)


def blur_weights(sigma: Tensor, *, size: int, max_sigma: float, num_taps: int | None = None) -> Tensor:
    """Float[B size size], rows sum to 1: matrices of a Gaussian blur along one axis, with reflection at the borders.

    Args:
        sigma: Float[B], standard deviation in pixels; a value close to 0 gives the identity.
        size: number of pixels along the axis.
        max_sigma: largest possible sigma; the kernel reaches three times as far, or to the end of the axis.
        num_taps: number of taps of the kernel, odd; None lets `max_sigma` decide.
    """
    radius = min(math.ceil(3.0 * max_sigma) if num_taps is None else num_taps // 2, size - 1)
    taps = get_gaussian_kernel1d(2 * radius + 1, sigma.unsqueeze(-1))  # [B taps]
    pixel = torch.arange(size, device=sigma.device)
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    position = (pixel + offset.unsqueeze(1)).abs()  # [taps size], reflected at 0
    position = size - 1 - (size - 1 - position).abs()
    spread = (position.unsqueeze(-1) == pixel).to(taps.dtype)  # [taps size size]
    return torch.matmul(taps, spread.flatten(1)).unflatten(1, (size, size))


def _separable(images: Tensor, *, rows: Tensor, columns: Tensor) -> Tensor:
    """Float[B C h w]: images Float[B C H W] after one matrix along the height, Float[B h H], and one along the width, Float[B w W]."""
    B, C, H, W = images.shape
    across = torch.bmm(images.reshape(B, C * H, W), columns.transpose(1, 2)).unflatten(1, (C, H))  # [B C H w]
    return torch.matmul(rows.unsqueeze(1), across)  # [B C h w]


def gaussian_blur(images: Tensor, *, sigma: Tensor, max_sigma: float, num_taps: int | None = None) -> Tensor:
    """Blur every item of Float[B C H W] with its own sigma, Float[B] in pixels and at most `max_sigma`; for `num_taps` see `blur_weights`.

    Two matrix products take half the time of a grouped convolution on a CPU.
    """
    H, W = images.shape[-2:]
    rows = blur_weights(sigma, size=H, max_sigma=max_sigma, num_taps=num_taps)
    columns = rows if H == W else blur_weights(sigma, size=W, max_sigma=max_sigma, num_taps=num_taps)
    return _separable(images, rows=rows, columns=columns)


def _blend_in_order(images: Tensor, *, factors: dict[int, Tensor], place: Tensor) -> Tensor:
    """Blend with these factors, each item in the order that `place` gives (Int[B 4], a permutation)."""
    ranks = {a: torch.stack([place[:, b] < place[:, a] for b in factors]).sum(dim=0) for a in factors}
    for step in range(len(factors)):
        selected = {a: torch.where(ranks[a] == step, factor, 1.0) for a, factor in factors.items()}
        images = blend(images, brightness=selected.get(_BRIGHTNESS), contrast=selected.get(_CONTRAST), saturation=selected.get(_SATURATION))
    return images


def _jitter(images: Tensor, *, spec: ViewSpec, draws: Tensor, place: Tensor) -> Tensor:
    """The four jitter operations, in a random order for each item.

    Grouping the items by their order would wait for the device. Instead the hue, which is expensive, is shifted once for the whole batch.
    The blends that precede it in the order of an item are applied before, with factor 1 for all other items, and the others after it.
    """
    selected = draws[:, _JITTER] < spec.jitter_prob
    factors = {}
    for operation, strength in ((_BRIGHTNESS, spec.brightness), (_CONTRAST, spec.contrast), (_SATURATION, spec.saturation)):
        if strength > 0:
            low, high = max(0.0, 1.0 - strength), 1.0 + strength
            factors[operation] = torch.where(selected, low + (high - low) * draws[:, operation], 1.0)
    if spec.hue == 0:
        return _blend_in_order(images, factors=factors, place=place)
    turns = torch.where(selected, spec.hue * (2.0 * draws[:, _HUE] - 1.0), 0.0)
    precedes = {operation: place[:, operation] < place[:, _HUE] for operation in factors}
    before = {operation: torch.where(precedes[operation], factor, 1.0) for operation, factor in factors.items()}
    after = {operation: torch.where(precedes[operation], 1.0, factor) for operation, factor in factors.items()}
    images = _blend_in_order(images, factors=before, place=place)
    images = shift_hue(images, turns=turns)
    return _blend_in_order(images, factors=after, place=place)


def augment(images: Tensor, *, spec: ViewSpec, keys: Tensor) -> Tensor:
    """Apply all colour operations to Float[B C H W] in [0, 1]: stain, then jitter, grayscale, blur and solarize in DINO's order."""
    draws = rng.uniform(keys, _DRAWS)
    if spec.stain > 0:
        images = jitter_stain(images, strength=spec.stain, prob=spec.stain_prob, keys=rng.fold_in(keys, _STAIN))
    if spec.jitter_prob > 0:
        images = _jitter(images, spec=spec, draws=draws, place=rng.permutation(rng.fold_in(keys, _ORDER), 4))
    if spec.grayscale_prob > 0:
        images = torch.where(_per_sample(draws[:, _GRAYSCALE] < spec.grayscale_prob), rgb_to_grayscale(images), images)
    if spec.blur_prob > 0:
        low, high = spec.blur_sigma
        sigma = low + (high - low) * draws[:, _SIGMA]
        # With this sigma the taps are exactly 0 and 1, so items that are not blurred are unchanged.
        sigma = torch.where(draws[:, _BLUR] < spec.blur_prob, sigma, 1e-3)
        images = gaussian_blur(images, sigma=sigma, max_sigma=high, num_taps=spec.blur_taps)
    if spec.solarize_prob > 0:
        threshold = torch.where(draws[:, _SOLARIZE] < spec.solarize_prob, spec.solarize_threshold, 2.0)
        images = solarize(images, threshold)
    return images
