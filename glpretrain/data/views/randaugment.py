"""RandAugment of timm (`rand-m9-mstd0.5-inc1`): fifteen operations on 8-bit RGB, drawn for every item separately, in workers.

Operations and magnitudes are those of Mugs' copy of timm's code (sail-sg/mugs @ 10ab634, `src/RandAugment.py`); for magnitudes in
[0, 10] the current timm has the same. Known differences: positions are interpolated bilinearly (there, bilinearly or bicubically at
random), and posterizing to 0 bits, which is the result of magnitude 10, gives black as in Pillow at that time (the current Pillow raises
an error).

kornia is not used, because its operations work on floats and are defined differently (equalize loops over images, sharpness and
posterize round differently, warps blend the fill colour into the border).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from glpretrain.core import keys as rng
from glpretrain.data.views.spec import MAX_MAGNITUDE, NUM_OPERATIONS, Strong

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "ColorIncreasing",
    "SharpnessIncreasing",
    "Rotate",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
assert len(OPERATIONS) == NUM_OPERATIONS
_POINTWISE = OPERATIONS[:8]
_COLOR, _SHARPNESS = 8, 9
_ROTATE, _SHEAR_X, _SHEAR_Y, _TRANSLATE_X, _TRANSLATE_Y = range(10, 15)
_ORDER, _APPLIED, _MAGNITUDE, _SIGN = range(4)  # purposes of keys


def _apply_where(images: Tensor, *, where: Tensor, change: Callable[..., Tensor], per_item: dict[str, Tensor]) -> Tensor:
    """Images [B C H W] of which those that Bool[B] selects are changed by a function of them and of their own part of `per_item`."""
    rows = where.nonzero().squeeze(1)
    if len(rows) == 0:
        return images
    changed = change(images.index_select(0, rows), **{name: values[rows] for name, values in per_item.items()})
    return changed if len(rows) == len(images) else images.index_copy(0, rows, changed)


def _grey(images: Tensor) -> Tensor:
    """Int32[B 1 H W]: the luma of UInt8[B 3 H W] as Pillow computes it, equal to the last bit."""
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """UInt8: `blend(other, images, factor)` of Pillow, which truncates."""
    return (other + factor * (images - other)).clamp_(0.0, 255.0).to(torch.uint8)


def tables(images: Tensor, *, operation: Tensor, magnitude: Tensor, factor: Tensor) -> Tensor:
    """UInt8[B 3 256]: lookup tables of pointwise operations, the new value for each value of each channel.

    Args:
        images: UInt8[B 3 H W].
        operation: Int[B], index into `OPERATIONS`, below 8.
        magnitude: Float[B] in [0, 10].
        factor: Float[B], factor of Contrast and Brightness.
    """
    B, C, H, W = images.shape
    device = images.device
    value = torch.arange(256, device=device)
    index = images.flatten(2).to(torch.int64)
    histogram = torch.zeros(B, C, 256, dtype=torch.int64, device=device)
    histogram.scatter_add_(2, index, torch.ones((), dtype=torch.int64, device=device).expand_as(index))

    present = histogram > 0
    low = present.to(torch.uint8).argmax(dim=2, keepdim=True)  # [B C 1]
    high = 255 - present.flip(2).to(torch.uint8).argmax(dim=2, keepdim=True)
    stretched = torch.div(255 * (value - low), (high - low).clamp_min(1), rounding_mode="floor")
    stretched = torch.where(high > low, stretched, value)

    step = torch.div(H * W - histogram.gather(2, high), 255, rounding_mode="floor")  # [B C 1]
    before = histogram.cumsum(dim=2) - histogram + torch.div(step, 2, rounding_mode="floor")
    equalized = torch.where((step > 0) & (high > low), torch.div(before, step.clamp_min(1), rounding_mode="floor"), value)

    share = (magnitude / MAX_MAGNITUDE).view(-1, 1, 1)
    lost = 8 - (4 - (4 * share).to(torch.int64))  # bits
    threshold = 256 - (256 * share).to(torch.int64)
    added = (110 * share).to(torch.int64)
    total = _grey(images).sum(dim=(1, 2, 3), dtype=torch.int64).view(-1, 1, 1)
    mean = torch.div(2 * total + H * W, 2 * H * W, rounding_mode="floor")  # rounded
    factor = factor.view(-1, 1, 1)
    of_operation = (  # in the order of `OPERATIONS`
        stretched,
        equalized,
        255 - value,
        (value >> lost) << lost,
        torch.where(value < threshold, value, 255 - value),
        torch.where(value < 128, value + added, value),
        (mean + factor * (value - mean)).to(torch.int64),
        (factor * value).to(torch.int64),
    )
    chosen = value.expand(B, C, 256)
    for number, table in enumerate(of_operation):
        chosen = torch.where((operation == number).view(-1, 1, 1), table, chosen)
    return chosen.clamp(0, 255).to(torch.uint8)


def _pointwise(images: Tensor, *, operation: Tensor, magnitude: Tensor, factor: Tensor) -> Tensor:
    chosen = tables(images, operation=operation, magnitude=magnitude, factor=factor)
    return chosen.gather(2, images.flatten(2).to(torch.int64)).view_as(images)


def _color(images: Tensor, *, factor: Tensor) -> Tensor:
    return _blend(images.to(torch.float32), _grey(images).to(torch.float32), factor.view(-1, 1, 1, 1))


def _sharpness(images: Tensor, *, factor: Tensor) -> Tensor:
    """Blend with the filter SMOOTH of Pillow: eight neighbours and five times the pixel. Pixels at the border are unchanged."""
    values = images.to(torch.float32)
    inner = values[..., 1:-1, 1:-1]
    smooth = values.clone()
    around = F.avg_pool2d(values, 3, stride=1, divisor_override=1)  # a sum of nine
    smooth[..., 1:-1, 1:-1] = torch.floor((around + 4.0 * inner) / 13.0 + 0.5)
    return _blend(values, smooth, factor.view(-1, 1, 1, 1))


def affine(operation: Tensor, *, level: Tensor, aspect: Tensor) -> Tensor:
    """Float[B 2 3]: affine maps from output to input points in the unit square of an item, source = matrix @ (x, y, 1).

    Args:
        operation: Int[B], index into `OPERATIONS`; the map is the identity unless the operation moves pixels.
        level: Float[B], signed share of the largest magnitude.
        aspect: Float[B], true width / height.
    """
    one, zero = torch.ones_like(level), torch.zeros_like(level)
    angle = torch.where(operation == _ROTATE, level * (torch.pi / 6.0), 0.0)  # 30 degrees
    cos, sin = torch.cos(angle), torch.sin(angle)
    # Pixel coordinates are those of the unit square times (width, height), so the terms that mix the axes contain the aspect ratio.
    right = -sin / aspect + torch.where(operation == _SHEAR_X, 0.3 * level, 0.0) / aspect
    down = sin * aspect + torch.where(operation == _SHEAR_Y, 0.3 * level, 0.0) * aspect
    rotates = operation == _ROTATE
    x = torch.where(rotates, 0.5 - 0.5 * (cos + right), torch.where(operation == _TRANSLATE_X, 0.45 * level, zero))
    y = torch.where(rotates, 0.5 - 0.5 * (down + cos), torch.where(operation == _TRANSLATE_Y, 0.45 * level, zero))
    scale = cos * one
    return torch.stack((scale, right, x, down, scale, y), dim=-1).unflatten(-1, (2, 3))


def _move(images: Tensor, *, operation: Tensor, level: Tensor, aspect: Tensor, fill: Sequence[int]) -> Tensor:
    """Warp bilinearly, as Pillow does. Points outside the image get the fill colour, which is not blended with the image."""
    H, W = images.shape[-2:]
    matrix = affine(operation, level=level, aspect=aspect)
    x = (torch.arange(W, device=images.device) + 0.5) / W
    y = (torch.arange(H, device=images.device) + 0.5) / H
    matrix = matrix[:, None, None]  # [B 1 1 2 3]
    source = matrix[..., 0] * x.view(1, 1, W, 1) + matrix[..., 1] * y.view(1, H, 1, 1) + matrix[..., 2]  # [B H W 2]
    moved = F.grid_sample(images.to(torch.float32), 2.0 * source - 1.0, mode="bilinear", padding_mode="border", align_corners=False)
    # Pillow truncates; the margin keeps whole numbers from which float32 is slightly below.
    moved = moved.add_(1e-3).clamp_(0.0, 255.0).to(torch.uint8)
    outside = ((source < 0.0) | (source >= 1.0)).any(dim=-1)  # [B H W]
    for channel, value in zip(moved.unbind(1), fill, strict=True):
        channel.masked_fill_(outside, value)
    return moved


def apply(images: Tensor, *, operation: Tensor, magnitude: Tensor, negative: Tensor, aspect: Tensor, fill: Sequence[int]) -> Tensor:
    """Apply one operation to each item of UInt8[B 3 H W].

    Args:
        images: UInt8[B 3 H W].
        operation: Int[B], index into `OPERATIONS`; -1 leaves an item unchanged.
        magnitude: Float[B] in [0, 10].
        negative: Bool[B], whether an operation rotates, shears, shifts or blends in the opposite direction.
        aspect: Float[B], true width / height.
        fill: fill colour of points outside the image, one value per channel.
    """
    level = torch.where(negative, -magnitude, magnitude) / MAX_MAGNITUDE
    factor = 1.0 + 0.9 * level
    pointwise = (operation >= 0) & (operation < len(_POINTWISE))
    moving = {"operation": operation, "level": level, "aspect": aspect}
    magnitudes = {"operation": operation, "magnitude": magnitude, "factor": factor}
    images = _apply_where(images, where=pointwise, change=_pointwise, per_item=magnitudes)
    images = _apply_where(images, where=operation == _COLOR, change=_color, per_item={"factor": factor})
    images = _apply_where(images, where=operation == _SHARPNESS, change=_sharpness, per_item={"factor": factor})
    return _apply_where(images, where=operation >= _ROTATE, change=partial(_move, fill=fill), per_item=moving)


def draw(keys: Tensor, *, strong: Strong) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the operations of each item, for keys Int[B].

    Returns:
        Int[B num_ops] index into `OPERATIONS`, -1 for none; Float[B num_ops] magnitudes; Bool[B num_ops], True: in the negative direction.
    """
    operations = rng.permutation(rng.fold_in(keys, _ORDER), NUM_OPERATIONS)[:, : strong.num_ops]
    applied = rng.uniform(rng.fold_in(keys, _APPLIED), strong.num_ops) < strong.op_prob
    noise = rng.normal(rng.fold_in(keys, _MAGNITUDE), strong.num_ops)
    magnitude = (strong.magnitude + strong.magnitude_std * noise).clamp(0.0, MAX_MAGNITUDE)
    return torch.where(applied, operations, -1), magnitude, rng.uniform(rng.fold_in(keys, _SIGN), strong.num_ops) < 0.5


def rand_augment(
    image: Tensor, *, operations: Tensor, magnitudes: Tensor, negative: Tensor, flipped: bool, mean: Sequence[float]
) -> Tensor:
    """Augment a picture as a whole, before it is cropped.

    Args:
        image: UInt8[3 H W].
        operations: Int[num_ops], see `draw`.
        magnitudes: Float[num_ops].
        negative: Bool[num_ops].
        flipped: whether the crop will be flipped. The operations then see the flipped picture, because a shear moves one edge more than the
            other; the result has the orientation of the input.
        mean: mean of items in [0, 1] per channel; it is the fill colour of points outside the image.

    Returns:
        UInt8[3 H W].
    """
    fill = [min(255, round(255 * value)) for value in mean]
    aspect = torch.tensor([image.shape[2] / image.shape[1]])
    levels = image.flip(2)[None] if flipped else image[None]
    for step in range(len(operations)):
        now = slice(step, step + 1)
        levels = apply(levels, operation=operations[now], magnitude=magnitudes[now], negative=negative[now], aspect=aspect, fill=fill)
    return levels[0].flip(2) if flipped else levels[0]
