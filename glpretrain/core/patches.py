"""From images to patches: the grid of patches of an image, and cutting an image into patches.

The numbers of a patch are in MAE's order (models_mae.py, `patchify`): row, column, channel.
"""

from collections.abc import Sequence

from torch import Tensor

from glpretrain.core.types import EncoderCard


def patchify(images: Tensor, *, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches, row by row: Float[B C H W] to Float[B N P], P = height x width of a patch x C."""
    height, width = patch_size
    blocks = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [B C rows p columns q]
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def image_grid(card: EncoderCard, item_shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of tokens for an image of shape C H W.

    Raises:
        ValueError: the number of channels is another one, or a side does not divide into patches.
    """
    name, channels = card.arguments["name"], card.item_shape[0]
    if len(item_shape) != 3 or item_shape[0] != channels:
        raise ValueError(f"{name}: item shape {tuple(item_shape)} given; accepted: ({channels}, height, width)")
    for side, length, patch in zip(("height", "width"), item_shape[1:], card.patch_size, strict=True):
        if length % patch or length == 0:
            nearest = sorted({max(length // patch, 1) * patch, (length // patch + 1) * patch})
            raise ValueError(f"{name}: {side} {length} does not divide by the patch of {patch} pixels; nearest accepted: {nearest}")
    return item_shape[1] // card.patch_size[0], item_shape[2] // card.patch_size[1]
