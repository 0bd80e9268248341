"""The corruption of point clouds: all points of some groups move to the centre of their group, which keeps its place and loses its shape.

This corresponds to the zeros of GMML in images, because the coordinates relative to the centre become zero. The centres are those that a
point transformer chooses by farthest point sampling. A point that moves to a centre is as far from all other centres as the centre itself,
so the corrupted cloud has exactly the centres of the clean one, and its tokens have the same order. Methods that compare the two token by
token therefore work on points as on images. This corruption is our own, without a paper.
"""

import torch
from torch import Tensor

from glpretrain.core.clouds import farthest_points, nearest_points, squared_distances, take
from glpretrain.core.keys import fold_in, permutation, uniform
from glpretrain.masking import Corruption


class CollapsedGroups(Corruption):
    """Hides the shape of contiguous groups of points.

    For each item, the share of hidden groups is drawn uniformly between min(0.5, ratio) and ratio. They are the groups whose centres are
    nearest to `num_blocks` random centres. Every point moves to its nearest centre if this is the centre of a hidden group.

    Args:
        ratio: largest share of hidden groups, in (0, 1).
        num_blocks: largest number of regions that the hidden groups form.

    Raises:
        ValueError: a value is outside its range.
    """

    def __init__(self, ratio: float, *, num_blocks: int = 4) -> None:
        if not 0.0 < ratio < 1.0:
            raise ValueError(f"CollapsedGroups: ratio is {ratio}; expected a share in (0, 1)")
        if num_blocks < 1:
            raise ValueError(f"CollapsedGroups: num_blocks is {num_blocks}; expected at least 1")
        self.ratio = ratio
        self.num_blocks = num_blocks

    def __call__(self, views: Tensor, keys: Tensor, *, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """As `Corruption`, on clouds Float[B P 3] by the encoder's grid (N,), whose tokens are the groups. Centres are never moved."""
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
