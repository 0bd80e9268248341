"""Changing some items of a batch without waiting for the device."""

from collections.abc import Callable

import torch
from torch import Tensor


def apply_where(images: Tensor, *, where: Tensor, change: Callable[..., Tensor], per_item: dict[str, Tensor]) -> Tensor:
    """Change the selected items and leave the others as they are.

    On a CPU only those are computed. Elsewhere all are, because picking them out would wait for the device.

    Args:
        images: of any type, [B C H W].
        where: Bool[B].
        change: from images and, by keyword, what belongs to each item to images of the same shape and type, item by item.
        per_item: the keywords of `change`, each with B first.

    Returns:
        As `images`.
    """
    if images.device.type != "cpu":
        return torch.where(where.view(-1, 1, 1, 1), change(images, **per_item), images)
    rows = where.nonzero().squeeze(1)
    if len(rows) == 0:
        return images
    changed = change(images.index_select(0, rows), **{name: values[rows] for name, values in per_item.items()})
    return changed if len(rows) == len(images) else images.index_copy(0, rows, changed)
