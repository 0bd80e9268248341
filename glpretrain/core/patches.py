"""From images to patches: the grid of patches, cutting an image into patches, hiding some of them, and maps of tokens on another grid.

The numbers of a patch are in MAE's order (models_mae.py, `patchify`): row, column, channel.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core.types import EncoderCard


def patchify(images: Tensor, *, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches, row by row: Float[B C H W] to Float[B N P], P = height x width of a patch x C."""
    height, width = patch_size
    blocks = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [B C rows p columns q]
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def without_patches(images: Tensor, *, visible: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Float[B M C H W]: the normalised images Float[B C H W] under M masks each, with zeros, the mean colour, in place of hidden patches.

    Args:
        images: images whose sides divide into patches.
        visible: Bool[B M N], True: the patch stays.
        patch_size: height and width of a patch.
    """
    (height, width), (rows, columns) = patch_size, (images.shape[2] // patch_size[0], images.shape[3] // patch_size[1])
    pixels = visible.unflatten(2, (rows, columns)).repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)  # [B M H W]
    return images.unsqueeze(1) * pixels.unsqueeze(2)


def image_grid(card: EncoderCard, item_shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of tokens for an image of shape C H W.

    Where the card's arguments have a `patch_stride`, patches overlap, and what is left at the end of a side belongs to none.

    Raises:
        ValueError: the number of channels is another one, a side does not divide into patches, or it is shorter than one that overlaps.
    """
    name, channels, stride = card.arguments["name"], card.item_shape[0], card.arguments.get("patch_stride")
    if len(item_shape) != 3 or item_shape[0] != channels:
        raise ValueError(f"{name}: item shape {tuple(item_shape)} given; accepted: ({channels}, height, width)")
    if isinstance(stride, list | tuple):
        if any(length < patch for length, patch in zip(item_shape[1:], card.patch_size, strict=True)):
            raise ValueError(f"{name}: size {tuple(item_shape[1:])} given; accepted: at least a patch of {card.patch_size}")
        return strided_grid(item_shape[1:], patch_size=card.patch_size, stride=[int(step) for step in stride])
    for side, length, patch in zip(("height", "width"), item_shape[1:], card.patch_size, strict=True):
        if length % patch or length == 0:
            nearest = sorted({max(length // patch, 1) * patch, (length // patch + 1) * patch})
            raise ValueError(f"{name}: {side} {length} does not divide by the patch of {patch} pixels; nearest accepted: {nearest}")
    return item_shape[1] // card.patch_size[0], item_shape[2] // card.patch_size[1]


def strided_grid(size: Sequence[int], *, patch_size: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches that begin every `stride` inputs and lie within `size`."""
    rows, columns = ((length - patch) // step + 1 for length, patch, step in zip(size, patch_size, stride, strict=True))
    return rows, columns


def inputs_of_patches(tokens: Tensor, *, size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Bool[B H W]: the inputs of the marked tokens, Bool[B N], of images of `size` whose patches are on `grid`.

    Where patches overlap, each input belongs to one of them: the sides are divided evenly.
    """
    row, column = (torch.arange(side, device=tokens.device) * count // side for side, count in zip(size, grid, strict=True))
    return tokens.unflatten(1, tuple(grid))[:, row][:, :, column]  # [B H W]


def resize_tokens(tokens: Tensor, *, grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool = False) -> Tensor:
    """Tokens Float[B M D] of one grid on another, Float[B N D]: bicubic, corners not aligned (GPFM's kl_loss.py; DINOv3).

    Args:
        tokens: tokens, row by row.
        grid: rows and columns of the tokens, M in all.
        new_grid: rows and columns of the result, N in all.
        antialias: whether a smaller grid averages over all tokens that it stands for; otherwise over the nearest four along each axis.
    """
    if grid == new_grid:
        return tokens
    maps = tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # [B D h w]
    return F.interpolate(maps, size=new_grid, mode="bicubic", align_corners=False, antialias=antialias).flatten(2).transpose(1, 2)
