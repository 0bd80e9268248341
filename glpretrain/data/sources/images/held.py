"""Pictures that a program holds (of PIL, arrays, tensors) as the tensors that sources give of files.

Left out: size and normalisation, which are those of the encoder (`glpretrain.modalities`).
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glpretrain.core.listing import expanded
from glpretrain.data.sources.images.arrays import ValueRange, from_array, levels_of
from glpretrain.data.sources.images.decoding import MOST_SIDE, decode, pixels_of

_HALF_LEVEL = 0.5 / 255
_HELD = Path("transform")  # in place of a file, in messages
_OTHER_FORMS = {(1, 3), (2, 1), (2, 3), (3, 1), (4, 1), (4, 3)}  # channels of a picture, and those that it is converted to


def pictures(held: object) -> list[object]:
    """The single pictures in a list, or in an array or a tensor with an axis for them."""
    if isinstance(held, list | tuple):
        return list(held)
    return list(held) if isinstance(held, np.ndarray | Tensor) and held.ndim == 4 else [held]


def picture_values(held: object, *, channels: int, value_range: ValueRange | None = None) -> Tensor:
    """One picture as UInt8[C H W]. Opacity is dropped, and grey and colour are converted as in files.

    Args:
        held: the path of a file; an image of PIL; an array [H W] or [H W C]; a tensor [H W] or [C H W]. Arrays and tensors have whole
            numbers from 0 to 255 in uint8, or floating-point numbers from 0 to 1, which are rounded to those.
        channels: number of channels C.
        value_range: as for `ImageFolder`, for files; and for images of PIL and arrays of whole numbers of more than 8 bits.

    Raises:
        ValueError: it is something else, or has other numbers or another number of channels.
    """
    levels = levels_of(value_range, channels=channels, owner="transform")
    if isinstance(held, str | Path):
        return decode(expanded(held), channels=channels, side=MOST_SIDE, levels=levels)
    if isinstance(held, Image.Image):
        in_bytes = levels is None or not held.mode.startswith(("I", "F"))
        return pixels_of(held, channels=channels) if in_bytes else from_array(np.array(held), _HELD, channels=channels, levels=levels)
    if isinstance(held, np.ndarray) and levels is not None and held.dtype.kind in "iu" and held.dtype != np.uint8:
        return from_array(held, _HELD, channels=channels, levels=levels)
    if isinstance(held, np.ndarray):
        if held.dtype.kind not in "uf":
            raise ValueError(f"transform: an array of {held.dtype} given; accepted: uint8, or floating-point numbers from 0 to 1")
        tensor = torch.from_numpy(np.array(held, order="C"))  # a copy, since it may not be writable
        values = tensor.permute(2, 0, 1) if tensor.dim() == 3 else tensor
    elif isinstance(held, Tensor):
        values = held.detach()
    else:
        raise ValueError(f"transform: {type(held).__name__} given; accepted: path, PIL image, array (H W C), tensor (C H W), list of these")
    values = _bytes(values[None] if values.dim() == 2 else values)
    if values.dim() != 3 or 0 in values.shape:
        raise ValueError(f"transform: shape {tuple(held.shape)} given; accepted: arrays (H W C) and tensors (C H W), one or a batch")
    given = values.shape[0]
    if given == channels:
        return values
    if (given, channels) not in _OTHER_FORMS:
        raise ValueError(
            f"transform: {given} channels in shape {tuple(held.shape)} given; the backbone takes {channels}; arrays are (H W C), tensors"
            " (C H W)"
        )
    colours = values[:1] if given == 2 else values[:3]  # without opacity
    if len(colours) == channels:
        return colours
    array = colours[0].numpy() if len(colours) == 1 else colours.permute(1, 2, 0).contiguous().numpy()
    return pixels_of(Image.fromarray(array), channels=channels)


def _bytes(values: Tensor) -> Tensor:
    """UInt8 of the same shape, on the CPU."""
    values = values.cpu()
    if values.dtype == torch.uint8:
        return values
    if not values.is_floating_point():
        raise ValueError(f"transform: numbers of {values.dtype} given; accepted: uint8, or floating-point numbers from 0 to 1")
    low, high = (values.min().item(), values.max().item()) if values.numel() else (0.0, 0.0)
    if not -_HALF_LEVEL <= low <= high <= 1 + _HALF_LEVEL:
        raise ValueError(f"transform: pixels from {low:.4g} to {high:.4g} given; accepted: 0 to 1, or uint8; they are normalised here")
    return (255 * values.float()).round().to(torch.uint8)
