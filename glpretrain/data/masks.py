"""The masks of a batch, made where its items are read: what is hidden is counted there, so that no step waits for a GPU to count it.

Left out: masks that follow the regions of a picture, which the device draws from the views (`module`); they hide as many tokens in each.
"""

import torch
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.core.batch import first_visible
from glpretrain.masking import Mask

MASK = 0x3A5C  # purpose that an item's key is folded with


def draw_masks(keys: Tensor, *, mask: Mask | None, grid: tuple[int, ...], count: int) -> dict[str, Tensor]:
    """`mask`, `hidden` and, where all views keep as many tokens, `visible` of a `ViewGroup`; nothing without a mask.

    Args:
        keys: Int[B], keys of the items.
        mask: how tokens are hidden.
        grid: number of tokens along each axis.
        count: number of views of each item.
    """
    if mask is None:
        return {}
    # One call for all views: block-wise masks cost per attempt, not per item.
    drawn = mask(rng.per_view(keys, MASK, count=count).flatten(), grid)  # [(V B) N]
    found = {"mask": drawn.unflatten(0, (count, len(keys))), "hidden": drawn.flatten().nonzero().squeeze(1)}
    kept = torch.unique((~drawn).sum(dim=1))
    if len(kept) == 1:
        found["visible"] = first_visible(drawn, count=int(kept)).unflatten(0, (count, len(keys)))
    return found
