"""Between images and patches: cut an image into patches, and put patches together to an image.

The numbers of a patch are in MAE's order (models_mae.py, `patchify`): row, column, channel.
"""

from torch import Tensor


def patchify(images: Tensor, *, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches, row by row.

    Args:
        images: Float[B C H W], or of another dtype.
        patch_size: height and width of a patch in pixels; they divide H and W.

    Returns:
        Float[B N P], where P counts the numbers of a patch: its height x its width x C.
    """
    height, width = patch_size
    blocks = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [B C rows p columns q]
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, *, patch_size: tuple[int, int], grid: tuple[int, int], num_channels: int) -> Tensor:
    """The inverse of `patchify`.

    Args:
        patches: Float[B N P].
        patch_size: height and width of a patch in pixels.
        grid: rows and columns of patches, N in all.
        num_channels: number of channels C of the image.

    Returns:
        Float[B C H W].
    """
    blocks = patches.unflatten(2, (*patch_size, num_channels)).unflatten(1, grid)  # [B rows columns p q C]
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
