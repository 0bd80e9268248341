"""Corruptions, which replace parts of the views: their contract, and groups of pixels (GMML).

Like masks (`tokens`), they are drawn for the whole batch at once, on the device of the keys, as a pure function of each item's key.
"""

from abc import ABC, abstractmethod
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from glpretrain.core.keys import fold_in, integers, normal, uniform
from glpretrain.masking.tokens import inside

_BLOCKS_PER_PASS = 62  # bits of an int64 without its sign, and one bit that says that no block covers a cell


class Corruption(ABC):
    """Replaces groups of inputs (pixels, points) of a view."""

    @abstractmethod
    def __call__(self, views: Tensor, keys: Tensor, *, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Corrupt one view of each item.

        Args:
            views: Float[B *item], normalised.
            keys: Int[B].
            grid: number of tokens along each axis.

        Returns:
            Float[B *item], the views with groups replaced, and Bool[B *inputs], True where an input was replaced.

        Raises:
            ValueError: views of this shape cannot be corrupted in this way.
        """


class GroupCorruption(Corruption):
    """Replaces groups of pixels until a share of them is replaced (GMML, Atito et al. 2022; the routine shared by the SiT and GMML code).

    For each item: with probability `replace_prob` the blocks show the same place of another item, with r = `replace_ratio`; otherwise they
    get `fill`, with r = `ratio`. The share to reach is uniform between min(0.5, r) and r. Blocks overlap freely, their union counts, and
    the last one may exceed the share. A block starts anywhere but in the last `align` rows and columns. Its sides are uniform in
    [align, max_side * side) and cut at the border; starts are rounded down to multiples of `align`, sides to the nearest multiple.

    Ours: the other item is the neighbour in the batch (position p ^ 1; the last item of an odd batch takes the one before it). Batches are
    shuffled, so a neighbour is as random as any other item. It is never the item itself (the reference code allows that), and it stays the
    same when a batch is cut into contiguous even shares for several processes. In a batch of one, the replaced pixels keep their values.
    Sizes that `align` does not divide are refused.

    Args:
        ratio: upper end of the share of pixels that get `fill`, in (0, 1).
        align: 1, or the patch size, so that whole patches are hidden.
        max_side: upper bound of the sides of a block, as a share of the side of the view.
        fill: zeros, which are the mean of a normalised view, or standard normal noise.
        replace_ratio: upper end of the share of pixels that the neighbour's pixels replace, in (0, 1).
        replace_prob: probability that an item is corrupted with its neighbour's pixels.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        ratio: float,
        *,
        align: int = 1,
        max_side: float = 0.3,
        fill: Literal["zeros", "noise"] = "zeros",
        replace_ratio: float = 0.3,
        replace_prob: float = 0.5,
    ) -> None:
        for name, value in {"ratio": ratio, "replace_ratio": replace_ratio}.items():
            if not 0.0 < value < 1.0:
                raise ValueError(f"GroupCorruption: {name} is a share in (0, 1), not {value}")
        if align < 1:
            raise ValueError(f"GroupCorruption: align is at least 1 pixel, not {align}")
        if not 0.0 < max_side <= 1.0:
            raise ValueError(f"GroupCorruption: max_side is a share in (0, 1], not {max_side}")
        if fill not in ("zeros", "noise"):
            raise ValueError(f"GroupCorruption: fill is 'zeros' or 'noise', not {fill!r}")
        if not 0.0 <= replace_prob <= 1.0:
            raise ValueError(f"GroupCorruption: replace_prob is a probability in [0, 1], not {replace_prob}")
        self.ratio = ratio
        self.align = align
        self.max_side = max_side
        self.fill = fill
        self.replace_ratio = replace_ratio
        self.replace_prob = replace_prob

    def __call__(self, views: Tensor, keys: Tensor, *, grid: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """As `Corruption`, on images Float[B C H W]; the grid does not matter for pixels and may be left out.

        Raises:
            ValueError: `align` does not divide the size, or the blocks can never cover the share.
        """
        B, C, H, W = views.shape
        replaced = uniform(fold_in(keys, 0)) < self.replace_prob  # [B]
        ratio = torch.where(replaced, self.replace_ratio, self.ratio)
        share = ratio - (ratio - ratio.clamp(max=0.5)) * uniform(fold_in(keys, 1))
        cells = self._cover(fold_in(keys, 2), share=share, size=(H, W))
        corruption = cells.repeat_interleave(self.align, dim=1).repeat_interleave(self.align, dim=2)  # [B H W]

        position = torch.arange(B, device=keys.device)
        neighbour = torch.where((position ^ 1) < B, position ^ 1, position - 1).clamp(min=0)
        filling = views.new_zeros(()) if self.fill == "zeros" else normal(fold_in(keys, 3), C, H, W).to(views.dtype)
        filling = torch.where(replaced.view(B, 1, 1, 1), views[neighbour], filling)
        return torch.where(corruption.unsqueeze(1), filling, views), corruption

    def _cover(self, keys: Tensor, *, share: Tensor, size: tuple[int, int]) -> Tensor:
        """Bool[B H/align W/align]: the union of the fewest blocks, in the order of their draws, that covers the share Float[B] of each
        item.

        62 blocks are laid at once: block k is bit k of one integer per row and of one integer per column. The lowest bit that is set in the
        row and in the column of a cell names the first block on it. The union of the first k blocks are the cells where it is below 2^k.
        """
        self._require_reach(size)
        grid = (size[0] // self.align, size[1] // self.align)
        wanted = share * (grid[0] * grid[1])
        hidden = torch.zeros(len(keys), *grid, dtype=torch.bool, device=keys.device)
        for number in count():  # ends: a share that blocks can reach is reached at some time, nearly always in the first pass
            key = fold_in(keys, number)
            down, along = self._block_bits(fold_in(key, 0), size[0]), self._block_bits(fold_in(key, 1), size[1])
            shared = down.unsqueeze(2) & along.unsqueeze(1)  # [B H W]
            first = torch.where(hidden, 0, torch.where(shared == 0, 1 << _BLOCKS_PER_PASS, shared & -shared))
            # Bisection: how many of the unions of the first 0, 1, ..., 62 blocks are too small; 63 where all are.
            too_small = torch.zeros_like(keys)
            for step in (32, 16, 8, 4, 2, 1):
                union = (first < _power_of_two(too_small + step - 1)).sum(dim=(1, 2))
                too_small += step * (union < wanted)
            hidden = first < _power_of_two(too_small.clamp(max=_BLOCKS_PER_PASS))
            if not (too_small > _BLOCKS_PER_PASS).any():
                break
        return hidden

    def _block_bits(self, keys: Tensor, side: int) -> Tensor:
        """Int[B side/align]: bit k is set in the cells of this axis that block k covers."""
        start = integers(fold_in(keys, 0), 0, side - self.align, _BLOCKS_PER_PASS) // self.align
        pixels = integers(fold_in(keys, 1), self.align, int(side * self.max_side), _BLOCKS_PER_PASS).minimum(side - start * self.align)
        extent = torch.round(pixels / self.align)
        lies = inside(torch.arange(side // self.align, device=keys.device), start=start, size=extent)  # [B blocks side/align]
        bits = 1 << torch.arange(_BLOCKS_PER_PASS, device=keys.device)
        return torch.where(lies, bits.unsqueeze(1), 0).sum(dim=1)

    def _require_reach(self, size: tuple[int, int]) -> None:
        reach = 1.0
        for side in size:
            if side % self.align:
                raise ValueError(f"GroupCorruption: align {self.align} does not divide a view of {size[0]} x {size[1]} pixels")
            if int(side * self.max_side) <= self.align:
                raise ValueError(
                    f"GroupCorruption: max_side {self.max_side} of {side} pixels leaves no block; it must exceed align {self.align}"
                )
            largest = round((int(side * self.max_side) - 1) / self.align)
            last_start = (side - self.align - 1) // self.align
            reach *= min(1.0, (last_start + largest) * self.align / side)
        ratio = max(self.ratio, self.replace_ratio)
        if ratio > reach:
            raise ValueError(
                f"GroupCorruption: with align {self.align} and max_side {self.max_side} blocks reach {reach:.2f} of a view of "
                f"{size[0]} x {size[1]} pixels, less than the ratio {ratio}; lower the ratio or align, or raise max_side"
            )


def _power_of_two(exponent: Tensor) -> Tensor:
    """Int[B 1 1] of Int[B]."""
    return (torch.ones_like(exponent) << exponent).view(-1, 1, 1)
