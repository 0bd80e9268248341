"""Masks over the grid of tokens.

Masks are drawn for the whole batch at once, on the device of the keys, and each is a pure function of the key of its item.
Left out on purpose: what replaces a hidden token (the encoder has a mask token), and the losses on hidden tokens (objectives).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from glpretrain.core.keys import fold_in, permutation, uniform

RoundedDown = Literal["visible", "hidden"]


class Mask(ABC):
    """Chooses which tokens of each item are hidden."""

    @abstractmethod
    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Bool[B N], True where a token is hidden: one mask per key.

        Args:
            keys: Int[B].
            grid: number of tokens along each axis, N in all.

        Raises:
            ValueError: this mask cannot be drawn on such a grid.
        """


def check_ratio(ratio: float, *, mask: str) -> float:
    """The share of hidden tokens that a user gave to the mask of this name; outside [0, 1) it is refused with a ValueError."""
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"{mask}: ratio is a share in [0, 1), not {ratio}")
    return ratio


def num_visible(grid: tuple[int, ...], *, ratio: float, mask: str, rounded_down: RoundedDown = "visible") -> int:
    """Number of visible tokens, see `RandomMask`; none is refused with a ValueError."""
    num_tokens = math.prod(grid)
    visible = int(num_tokens * (1.0 - ratio)) if rounded_down == "visible" else num_tokens - int(num_tokens * ratio)
    if visible == 0:
        raise ValueError(f"{mask}: ratio {ratio} keeps none of the {num_tokens} tokens of grid {tuple(grid)}; use a lower one")
    return visible


def _check_range(prob: float, ratio: tuple[float, float], *, mask: str) -> None:
    low, high = ratio
    if not 0.0 <= prob <= 1.0:
        raise ValueError(f"{mask}: prob is a probability in [0, 1], not {prob}")
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"{mask}: ratio is ({low}, {high}); it needs 0 <= low <= high <= 1")


class RandomMask(Mask):
    """The same number of hidden tokens in every item, uniformly at random (MAE, sec. 3).

    Args:
        ratio: share of hidden tokens, in [0, 1).
        rounded_down: which number is rounded down where the share is no whole number of tokens. `visible`: int(N * (1 - ratio)) tokens
            stay visible and the rest is hidden (MAE's models_mae.py, random_masking). `hidden`: int(N * ratio) tokens are hidden
            (Point-MAE's models/Point_MAE.py at 7445a68, _mask_center_rand: 38 of 64 at 0.6, where MAE's rule gives 39).

    Raises:
        ValueError: the ratio is outside [0, 1), or `rounded_down` is another word.
    """

    def __init__(self, ratio: float, rounded_down: RoundedDown = "visible") -> None:
        if rounded_down not in ("visible", "hidden"):
            raise ValueError(f"RandomMask: rounded_down is 'visible' or 'hidden', not {rounded_down!r}")
        self.ratio = check_ratio(ratio, mask="RandomMask")
        self.rounded_down: RoundedDown = rounded_down

    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """As `Mask`."""
        visible = num_visible(grid, ratio=self.ratio, mask="RandomMask", rounded_down=self.rounded_down)
        return permutation(keys, math.prod(grid)) >= visible  # [B N]


class BlockMask(Mask):
    """Rectangles of random area and aspect ratio, until the share drawn for the item is hidden (BEiT; iBOT, sec. 3.3 and its loader.py).

    For each item: one range of `ratios` with equal probability, a ratio r uniform in it, then rectangles. While m = r * N - hidden tokens
    are still to be hidden, a rectangle has an area uniform between (min(grid) // 3)^2 and m and an aspect ratio log-uniform in
    [0.3, 1 / 0.3], is smaller than the grid along both axes, lies anywhere, and is accepted if it hides at least 1 and at most m further
    tokens. The mask ends when ten rectangles in a row were refused, so it can hide somewhat less than r.

    Args:
        ratios: ranges (low, high) within [0, 1]. iBOT's recipe, pred_ratio 0 0.3 with pred_ratio_var 0 0.2, is ((0, 0), (0.1, 0.5)).

    Raises:
        ValueError: there is no range, or one does not satisfy 0 <= low <= high <= 1.
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
        least_area = (min(grid) // 3) ** 2
        return _cover_with_blocks(keys, grid, wanted=self._draw_ratios(keys) * math.prod(grid), least_area=least_area)

    def _draw_ratios(self, keys: Tensor) -> Tensor:
        ranges = torch.tensor(self.ratios, device=keys.device)
        draws = uniform(fold_in(keys, 0), 2)
        low, high = ranges[(draws[:, 0] * len(ranges)).long()].unbind(1)
        return low + (high - low) * draws[:, 1]


class DINOv2Mask(Mask):
    """Rectangles in some of the views, until the share drawn for the view is hidden (DINOv2's data/masking.py and collate.py).

    The rectangles differ from those of `BlockMask`: the area is uniform between 4 tokens and the number still to be hidden, at most half
    of the grid, and r * N is rounded down. Ours: every view draws by itself whether it is masked; the official code masks exactly the share
    `prob` of the views of a batch, and draws their ratios from as many equal parts of the range (`DINOv3Mask` masks an exact share).

    Args:
        prob: probability that a view is masked at all.
        ratio: smallest and largest ratio r.

    Raises:
        ValueError: `prob` is outside [0, 1], or `ratio` does not satisfy 0 <= low <= high <= 1.
    """

    LEAST_AREA, MAX_SHARE = 4, 0.5

    def __init__(self, prob: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5)) -> None:
        _check_range(prob, ratio, mask="DINOv2Mask")
        self.prob, self.ratio = prob, (float(ratio[0]), float(ratio[1]))

    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """As `Mask`."""
        num_tokens, (low, high) = math.prod(grid), self.ratio
        draws = uniform(fold_in(keys, 0), 2)
        wanted = torch.floor((low + (high - low) * draws[:, 1]) * num_tokens) * (draws[:, 0] < self.prob)
        return _cover_with_blocks(keys, grid, wanted=wanted, least_area=self.LEAST_AREA, most_area=self.MAX_SHARE * num_tokens)


class DINOv3Mask(Mask):
    """The rectangles of `DINOv2Mask` in an exact share of a process's views, with exact and evenly spread numbers of hidden tokens
    (DINOv3's data/collate.py and data/masking.py at 6876159).

    Of V views int(prob * V) are masked, by draws. The i-th of these n, from 1 on, hides int(r * N) tokens, where r is the upper edge of
    the i-th of n equal parts of `ratio`: by rectangles, and where these end too early by single tokens. So a step always hides as many
    tokens, but which views are masked, and by how much, depends on the others of the batch.

    Args:
        prob: share of the views of a batch that are masked.
        ratio: smallest and largest ratio r.

    Raises:
        ValueError: `prob` is outside [0, 1], or `ratio` does not satisfy 0 <= low <= high <= 1.
    """

    def __init__(self, prob: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5)) -> None:
        _check_range(prob, ratio, mask="DINOv3Mask")
        self.prob, self.ratio = prob, (float(ratio[0]), float(ratio[1]))

    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """As `Mask`; all keys are of one batch."""
        num_tokens, (low, high), num_masked = math.prod(grid), self.ratio, int(self.prob * len(keys))
        edges = torch.linspace(low, high, num_masked + 1, device=keys.device)[1:]
        counts = torch.cat([torch.floor(edges * num_tokens), edges.new_zeros(len(keys) - num_masked)])
        wanted = torch.empty_like(counts)
        wanted[uniform(fold_in(keys, 0)).argsort()] = counts
        area = {"least_area": DINOv2Mask.LEAST_AREA, "most_area": DINOv2Mask.MAX_SHARE * num_tokens}
        hidden = _cover_with_blocks(keys, grid, wanted=wanted, **area)
        # Hidden tokens come first, and then the others in a random order.
        order = (uniform(fold_in(keys, _SINGLE), num_tokens) - hidden.float()).argsort(dim=1)
        places = torch.arange(num_tokens, device=keys.device).expand_as(order)
        return torch.empty_like(hidden).scatter_(1, order, places < wanted.unsqueeze(1))


class UniformMask(Mask):
    """A share of hidden tokens that is uniform in [0, 1], the tokens uniformly at random (locality alignment, UniformMaskSampler).

    For each item a threshold u and a number for each token are drawn, uniform in [0, 1); tokens whose number is above u are visible. A mask
    may hide every token or none, so it is for methods that multiply tokens by it, not for those that drop hidden ones.
    """

    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """As `Mask`."""
        draws = uniform(keys, 1 + math.prod(grid))
        return draws[:, 1:] <= draws[:, :1]  # [B N]


class BernoulliMask(Mask):
    """Every token is hidden or not by a draw of its own (locality alignment, BernoulliMaskSampler). A mask may hide every token or none.

    Args:
        ratio: probability that a token is hidden, in [0, 1); the official `mask_ratio` is the probability that it is visible.

    Raises:
        ValueError: the ratio is outside [0, 1).
    """

    def __init__(self, ratio: float = 0.5) -> None:
        self.ratio = check_ratio(ratio, mask="BernoulliMask")

    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """As `Mask`."""
        return uniform(keys, math.prod(grid)) >= 1.0 - self.ratio  # [B N]


class VisibleBlocks(Mask):
    """Rectangles of visible tokens, until their share is reached; the others are hidden (locality alignment, BlockwiseMaskSampler).

    A rectangle has an area a, a whole number uniform from `least_area` to int(visible_ratio * N) - 1, and an aspect ratio r uniform in
    [0.3, 1 / 0.3]; it is int(sqrt(a / r)) tokens high and a / height, rounded down, wide, both cut off at the grid, and lies anywhere.
    Rectangles may overlap. The official names call what is visible here masked.

    Args:
        visible_ratio: share of visible tokens that is reached, in (0, 1); the last rectangle may exceed it.
        least_area: smallest number of tokens of a rectangle.

    Raises:
        ValueError: a number out of range.
    """

    _LEAST_ASPECT, _MOST_ASPECT = 0.3, 1.0 / 0.3

    def __init__(self, visible_ratio: float = 0.4, least_area: int = 16) -> None:
        if not 0.0 < visible_ratio < 1.0:
            raise ValueError(f"VisibleBlocks: visible_ratio is a share in (0, 1), not {visible_ratio}")
        if least_area < 4:  # a narrower one may have no row
            raise ValueError(f"VisibleBlocks: least_area is a number of tokens from 4 on, not {least_area}")
        self.visible_ratio, self.least_area = visible_ratio, least_area

    def __call__(self, keys: Tensor, grid: tuple[int, ...]) -> Tensor:
        """As `Mask`."""
        num_tokens = math.prod(grid)
        most_area = int(self.visible_ratio * num_tokens)
        if len(grid) != 2 or most_area <= self.least_area:
            raise ValueError(
                f"VisibleBlocks: grid {tuple(grid)} given with visible_ratio {self.visible_ratio} and least_area {self.least_area};"
                " accepted: two axes, with more than least_area tokens in that share of the grid"
            )
        height, width = grid
        rows = torch.arange(height, device=keys.device)
        columns = torch.arange(width, device=keys.device)
        visible = torch.zeros(len(keys), height, width, dtype=torch.bool, device=keys.device)
        for attempt in count():  # ends: rectangles lie anywhere, so they cover every token some time
            if not self._is_missing(visible).any():
                break
            for draw in uniform(fold_in(keys, attempt), _CHECK_EVERY, 4).unbind(1):  # [B 4]
                area = torch.floor(self.least_area + (most_area - self.least_area) * draw[:, 0])
                aspect = self._LEAST_ASPECT + (self._MOST_ASPECT - self._LEAST_ASPECT) * draw[:, 1]
                h = torch.floor((area / aspect).sqrt()).clamp(max=height)
                w = torch.floor(area / h).clamp(max=width)
                top = torch.floor(draw[:, 2] * (height - h + 1))
                left = torch.floor(draw[:, 3] * (width - w + 1))
                block = inside(rows, start=top, size=h).unsqueeze(2) & inside(columns, start=left, size=w).unsqueeze(1)  # [B H W]
                visible |= block & self._is_missing(visible).view(-1, 1, 1)
        return ~visible.flatten(1)

    def _is_missing(self, visible: Tensor) -> Tensor:
        """Bool[B]: whether the share of visible tokens, of Bool[B H W], is not reached yet."""
        return visible.flatten(1).float().mean(dim=1) < self.visible_ratio


_LOG_ASPECT = math.log(1.0 / 0.3)
_MAX_REFUSED = 10
_SINGLE = 0x51E6  # purpose of the draws of single tokens, beyond all numbers of rectangles
_CHECK_EVERY = 16  # rectangles between two checks whether all masks are complete: on a GPU each check waits for the device


def _cover_with_blocks(keys: Tensor, grid: tuple[int, ...], *, wanted: Tensor, least_area: float, most_area: float = math.inf) -> Tensor:
    """Bool[B N]: rectangles until `wanted`, Float[B], tokens are hidden or ten in a row were refused; see `BlockMask`."""
    if len(grid) != 2 or min(grid) < 2:
        raise ValueError(f"block mask: grid {tuple(grid)} has no room for blocks; accepted are two axes of at least 2 tokens")
    height, width = grid
    rows = torch.arange(height, device=keys.device)
    columns = torch.arange(width, device=keys.device)

    hidden = torch.zeros(len(keys), height, width, dtype=torch.bool, device=keys.device)
    num_hidden = torch.zeros_like(wanted)
    refused = torch.zeros_like(keys)
    for attempt in count(1, _CHECK_EVERY):  # ends: an unfinished mask hides a token more, or gets closer to ten refused rectangles
        if not ((num_hidden < wanted) & (refused < _MAX_REFUSED)).any():
            break
        for draw in uniform(fold_in(keys, attempt), _CHECK_EVERY, 4).unbind(1):  # [B 4]
            missing = wanted - num_hidden
            most = missing.clamp(max=most_area)
            area = least_area + (most - least_area) * draw[:, 0]
            root_aspect = torch.exp((draw[:, 1] - 0.5) * _LOG_ASPECT)  # half of the logarithm, so the square root
            root_area = area.clamp(min=0.0).sqrt()
            h, w = torch.round(root_area * root_aspect), torch.round(root_area / root_aspect)
            top = torch.floor(draw[:, 2] * (height - h + 1))
            left = torch.floor(draw[:, 3] * (width - w + 1))
            block = inside(rows, start=top, size=h).unsqueeze(2) & inside(columns, start=left, size=w).unsqueeze(1)  # [B H W]
            gain = (block & ~hidden).sum(dim=(1, 2))
            unfinished = (missing > 0) & (refused < _MAX_REFUSED)
            accepted = unfinished & (h < height) & (w < width) & (gain > 0) & (gain <= most)
            hidden |= block & accepted.view(-1, 1, 1)
            num_hidden += gain * accepted
            refused = torch.where(accepted, 0, refused + unfinished)
    return hidden.flatten(1)


def inside(position: Tensor, *, start: Tensor, size: Tensor) -> Tensor:
    """Bool[*S P]: whether each position, Int[P], lies in [start, start + size); start and size have the shape [*S]."""
    start, size = start.unsqueeze(-1), size.unsqueeze(-1)
    return (position >= start) & (position < start + size)
