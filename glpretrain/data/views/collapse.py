"""The corruption of clouds: the points of some groups fall onto the group's centre, so that its place stays and its shape is gone.

It is to a cloud what zeros are to an image (GMML): coordinates relative to the centre become zero. The centres are those that a point
transformer takes by farthest point sampling, and a point that falls onto one is as far from all others as the centre was. So the corrupted
cloud has exactly the centres of the clean one, and its tokens stand in the same order: methods that compare the two token by token
work on points as they do on images. Ours; no paper.
"""

import torch
from torch import Tensor

from glpretrain.core.clouds import farthest_points, nearest_points, squared_distances, take
from glpretrain.core.keys import fold_in, permutation, uniform
from glpretrain.masking import Corruption


class CollapsedGroups(Corruption):
    """Hides the shape of contiguous groups of points until a share of the groups is gone.

    Per item: a share uniform between min(0.5, ratio) and ratio of the centres, those nearest to one of `num_blocks` of them chosen by
    chance. Every point whose nearest centre is one of these falls onto it.

    Args:
        ratio: upper end of the share of groups, in (0, 1).
        num_blocks: how many regions they form at most.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(self, ratio: float, *, num_blocks: int = 4) -> None:
        if not 0.0 < ratio < 1.0:
            raise ValueError(f"CollapsedGroups: ratio is a share in (0, 1), not {ratio}")
        if num_blocks < 1:
            raise ValueError(f"CollapsedGroups: num_blocks is at least 1, not {num_blocks}")
        self.ratio = ratio
        self.num_blocks = num_blocks

    def __call__(self, views: Tensor, keys: Tensor, *, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Corrupt one view of each item.

        Args:
            views: Float[B P 3].
            keys: Int[B].
            grid: of the encoder, (N,): its tokens are the groups.

        Returns:
            Float[B P 3], and Bool[B P], True where a point was moved; the centres never are.
        """
        (num_groups,) = grid
        centre_index = farthest_points(views, count=num_groups)  # [B N]
        centres = take(views, centre_index)  # [B N 3]
        low = min(0.5, self.ratio)
        share = low + (self.ratio - low) * uniform(fold_in(keys, 0))
        count = torch.round(share * num_groups).clamp(min=1.0, max=num_groups - 1.0)  # [B]
        seeds = permutation(fold_in(keys, 1), num_groups)[:, : self.num_blocks]  # [B S]
        distance = squared_distances(centres, take(centres, seeds)).amin(dim=2)  # [B N]
        rank = distance.argsort(dim=1, stable=True).argsort(dim=1)  # [B N]
        hidden = rank < count.unsqueeze(1)
        cell = nearest_points(views, centres, count=1).squeeze(2)  # [B P]
        corruption = hidden.gather(1, cell) & (take(centres, cell) != views).any(dim=2)
        return torch.where(corruption.unsqueeze(2), take(centres, cell), views), corruption
