"""What is hidden from the student: masks over the token grid.

Everything is drawn for the whole batch at once, on the device of the keys, and is a pure function of each item's key.
Left out on purpose: what a hidden token becomes (the encoder knows its mask token) and what is asked of it (the objectives).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from glpretrain.core.keys import fold_in, permutation, uniform


class Mask(ABC):
    """Chooses the hidden tokens of each item."""

    @abstractmethod
    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Draw one mask per key.

        Args:
            keys: Int[B].
            grid: tokens along each axis, N of them in all.

        Returns:
            Bool[B N], True: hidden.

        Raises:
            ValueError: this mask cannot be drawn on such a grid.
        """


class RandomMask(Mask):
    """The same number of tokens hidden in every item, uniformly at random (MAE, sec. 3).

    As in MAE's code, int(N * (1 - ratio)) tokens stay and the rest is hidden.

    Args:
        ratio: share of hidden tokens, in [0, 1).

    Raises:
        ValueError: `ratio` is outside [0, 1).
    """

    def __init__(self, ratio: float) -> None:
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"RandomMask: ratio is a share in [0, 1), not {ratio}")
        self.ratio = ratio

    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """As `Mask`."""
        num_tokens = math.prod(grid)
        num_kept = int(num_tokens * (1.0 - self.ratio))
        if num_kept == 0:
            raise ValueError(f"RandomMask: ratio {self.ratio} keeps none of the {num_tokens} tokens of grid {tuple(grid)}; use a lower one")
        return permutation(keys, num_tokens) >= num_kept  # [B N]


class BlockMask(Mask):
    """Rectangles of random area and aspect until the ratio drawn for the item is reached (BEiT; iBOT, sec. 3.3 and its loader.py).

    Per item: one range of `ratios` with equal chance, a ratio r uniform in it, then rectangles. With m = r * N - hidden
    still to hide, a rectangle has an area uniform between (min(grid) // 3)^2 and m and an aspect log-uniform in [0.3, 1 / 0.3],
    is smaller than the grid along both axes, lies anywhere, and is accepted if it hides at least 1 and at most m further
    tokens. Ten rectangles refused in a row end the mask, which is why it can fall somewhat short of r.

    Args:
        ratios: ranges (low, high) within [0, 1]. iBOT's recipe, pred_ratio 0 0.3 with pred_ratio_var 0 0.2, is ((0, 0), (0.1, 0.5)).

    Raises:
        ValueError: no range, or one that is not 0 <= low <= high <= 1.
    """

    def __init__(self, ratios: Sequence[tuple[float, float]]) -> None:
        if not ratios:
            raise ValueError("BlockMask: ratios is empty; give at least one range (low, high)")
        for low, high in ratios:
            if not 0.0 <= low <= high <= 1.0:
                raise ValueError(f"BlockMask: ratios holds ({low}, {high}); a range needs 0 <= low <= high <= 1")
        self.ratios = tuple((float(low), float(high)) for low, high in ratios)

    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """As `Mask`."""
        _require_room(grid)
        least_area = (min(grid) // 3) ** 2
        return _cover_with_blocks(keys, grid, wanted=self._draw_ratios(keys) * math.prod(grid), least_area=least_area)

    def _draw_ratios(self, keys: Tensor) -> Tensor:
        ranges = torch.tensor(self.ratios, device=keys.device)
        draws = uniform(fold_in(keys, 0), 2)
        low, high = ranges[(draws[:, 0] * len(ranges)).long()].unbind(1)
        return low + (high - low) * draws[:, 1]


class DINOv2Mask(Mask):
    """Rectangles in a share of the views, until the ratio drawn for the view is reached (DINOv2's data/masking.py and collate.py).

    Differs from `BlockMask` in what a rectangle may be: its area is uniform between 4 tokens and what is missing, at most half of the
    grid, and r * N is rounded down. Ours: each view is hidden by its own draw; the official code takes exactly `prob` of a
    batch's views and one ratio from each of as many equal parts of the range.

    Args:
        prob: chance that a view is masked at all.
        ratio: smallest and largest r.

    Raises:
        ValueError: `prob` is no chance, or `ratio` not 0 <= low <= high <= 1.
    """

    _LEAST_AREA, _MAX_SHARE = 4, 0.5

    def __init__(self, prob: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5)) -> None:
        low, high = ratio
        if not 0.0 <= prob <= 1.0:
            raise ValueError(f"DINOv2Mask: prob is a chance in [0, 1], not {prob}")
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"DINOv2Mask: ratio is ({low}, {high}); it needs 0 <= low <= high <= 1")
        self.prob, self.ratio = prob, (float(low), float(high))

    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """As `Mask`."""
        _require_room(grid)
        num_tokens, (low, high) = math.prod(grid), self.ratio
        draws = uniform(fold_in(keys, 0), 2)
        wanted = torch.floor((low + (high - low) * draws[:, 1]) * num_tokens) * (draws[:, 0] < self.prob)
        return _cover_with_blocks(keys, grid, wanted=wanted, least_area=self._LEAST_AREA, most_area=self._MAX_SHARE * num_tokens)


def _require_room(grid: tuple[int, ...]) -> None:
    if len(grid) != 2 or min(grid) < 2:
        raise ValueError(f"block mask: grid {tuple(grid)} has no room for blocks; accepted are two axes of at least 2 tokens")


_LOG_ASPECT = math.log(1.0 / 0.3)
_MAX_REFUSED = 10
_CHECK_EVERY = 16  # rectangles between two looks at whether all are done: on a GPU each look waits for the device


def _cover_with_blocks(keys: Tensor, grid: tuple[int, int], *, wanted: Tensor, least_area: float, most_area: float = math.inf) -> Tensor:
    """Bool[B N]: rectangles until `wanted`, Float[B], tokens are hidden or ten in a row were refused; see `BlockMask`."""
    height, width = grid
    rows = torch.arange(height, device=keys.device)
    columns = torch.arange(width, device=keys.device)

    hidden = torch.zeros(len(keys), height, width, dtype=torch.bool, device=keys.device)
    num_hidden = torch.zeros_like(wanted)
    refused = torch.zeros_like(keys)
    for attempt in range((height * width + 1) * _MAX_REFUSED):
        step = attempt % _CHECK_EVERY
        if step == 0:
            unfinished = (num_hidden < wanted) & (refused < _MAX_REFUSED)
            if not unfinished.any():
                break
            draws = uniform(fold_in(keys, attempt + 1), _CHECK_EVERY, 4)  # [B attempts 4]
        missing = wanted - num_hidden
        most = missing.clamp(max=most_area)
        area = least_area + (most - least_area) * draws[:, step, 0]
        root_aspect = torch.exp((draws[:, step, 1] - 0.5) * _LOG_ASPECT)  # half of the logarithm, so the square root
        root_area = area.clamp(min=0.0).sqrt()
        h, w = torch.round(root_area * root_aspect), torch.round(root_area / root_aspect)
        top = torch.floor(draws[:, step, 2] * (height - h + 1))
        left = torch.floor(draws[:, step, 3] * (width - w + 1))
        block = inside(rows, start=top, size=h).unsqueeze(2) & inside(columns, start=left, size=w).unsqueeze(1)  # [B H W]
        gain = (block & ~hidden).sum(dim=(1, 2))
        unfinished = (missing > 0) & (refused < _MAX_REFUSED)
        accepted = unfinished & (h < height) & (w < width) & (gain > 0) & (gain <= most)
        hidden |= block & accepted.view(-1, 1, 1)
        num_hidden += gain * accepted
        refused = torch.where(accepted, 0, refused + unfinished)
    return hidden.flatten(1)


def visible_indices(mask: Tensor) -> Tensor:
    """Indices of the tokens that are not hidden, in ascending order.

    Args:
        mask: Bool[B N], as many hidden in every row.

    Returns:
        Int[B M].

    Raises:
        ValueError: the rows keep different numbers of tokens.
    """
    counts = (~mask).sum(dim=1)
    low, high = counts.aminmax()
    if low != high:
        raise ValueError(f"mask: items keep {int(low)} to {int(high)} tokens; dropping needs the same number in all, as RandomMask gives")
    return (~mask).nonzero()[:, 1].unflatten(0, (len(mask), int(low)))


def inside(position: Tensor, *, start: Tensor, size: Tensor) -> Tensor:
    """Bool[*S P]: whether each of the positions Int[P] is in [start, start + size), for start and size of shape [*S]."""
    start, size = start.unsqueeze(-1), size.unsqueeze(-1)
    return (position >= start) & (position < start + size)
