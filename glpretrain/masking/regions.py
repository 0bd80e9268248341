"""Masks that know the face: which tokens are hidden depends on the region map of each item (FSFM).

A region map has an id per pixel, `FACE_REGIONS` names them; a token touches every region of which it holds a pixel. All masks of one
kind hide the same number of tokens whatever the map, also where regions are missing or fill the frame. Drawn for the whole
batch at once, on the device of the keys, without waiting for it. In shapes, R counts groups of regions. Left out:
where maps come from (`glpretrain.data.sources.images`).
"""

import math
from abc import ABC, abstractmethod
from functools import reduce
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from glpretrain.core.distributed import all_reduce_sum
from glpretrain.core.keys import fold_in, integers, permutation

# Ids of a region map: those of LaPa, which the official code's parser writes.
FACE_REGIONS = (
    "background",
    "skin",
    "right_brow",
    "left_brow",
    "right_eye",
    "left_eye",
    "nose",
    "upper_lip",
    "inner_mouth",
    "lower_lip",
    "hair",
)
_BOUNDARY = "boundary"
# In the order of the official code: a token belongs to the first group that it touches. The boundary of the face are tokens that
# touch skin and also hair or background.
_GROUPS: dict[str, tuple[str, ...]] = {
    "brows": ("right_brow", "left_brow"),
    "eyes": ("right_eye", "left_eye"),
    "nose": ("nose",),
    "mouth": ("upper_lip", "inner_mouth", "lower_lip"),
    _BOUNDARY: (),
    "hair": ("hair",),
    "skin": ("skin",),
    "background": ("background",),
}
_NUM_COVERED = 6  # the first six may be the region that is hidden whole; skin and background never are
_PARTS = (0, 1, 2, 3, 5)  # brows, eyes, nose, mouth, hair
_REGION, _SHARE, _FILL = range(3)


class Hidden(NamedTuple):
    """What a region mask hides."""

    mask: Tensor  # Bool[B N]  True: hidden
    region_mask: Tensor | None  # Bool[B N]  True: hidden as a part of the region that is hidden whole; None where there is no such region


class RegionMask(ABC):
    """Chooses the hidden tokens of each item by its region map.

    As `RandomMask`, int(N * (1 - ratio)) tokens stay and the rest is hidden.

    Args:
        ratio: share of hidden tokens, in [0, 1).

    Raises:
        ValueError: `ratio` is outside [0, 1).
    """

    has_region_mask: ClassVar[bool]  # whether one region is hidden whole

    def __init__(self, ratio: float = 0.75) -> None:
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"{type(self).__name__}: ratio is a share in [0, 1), not {ratio}")
        self.ratio = ratio

    def __call__(self, keys: Tensor, grid: tuple[int, ...], *, regions: Tensor) -> Hidden:
        """Draw one mask per key.

        Args:
            keys: Int[B].
            grid: tokens along both axes, N of them in all.
            regions: Int[B H W], index into `FACE_REGIONS` per pixel, -1 where there is no region.

        Raises:
            ValueError: the grid does not divide the map, or no token would stay.
        """
        num_tokens = math.prod(grid)
        num_kept = int(num_tokens * (1.0 - self.ratio))
        if num_kept == 0:
            raise ValueError(f"{type(self).__name__}: ratio {self.ratio} keeps none of the {num_tokens} tokens of grid {tuple(grid)}")
        return self._draw(keys, touched(regions, grid=grid), num_hidden=num_tokens - num_kept)

    @abstractmethod
    def _draw(self, keys: Tensor, touches: Tensor, *, num_hidden: int) -> Hidden:
        """Of Int[B] keys and Bool[B R N], which group of regions each token touches."""


def _check_region_per(mask: RegionMask, region_per: str) -> None:
    if region_per not in ("batch", "item"):
        raise ValueError(f"{type(mask).__name__}: region_per is 'batch' or 'item', not {region_per!r}")


def _covered(keys: Tensor, touches: Tensor, *, region_per: Literal["batch", "item"]) -> Tensor:
    """Bool[B N]: tokens that touch the region that is hidden whole, uniformly brows, eyes, nose, mouth, boundary of the face or hair."""
    key = fold_in(keys, _REGION)
    if region_per == "batch":
        # The sum over all items of all processes, modulo 2^64: no process decides, and the order of the items does not matter.
        key = all_reduce_sum(key.sum()).expand_as(key)
    region = integers(key, 0, _NUM_COVERED)  # [B]
    return touches.gather(1, region.view(-1, 1, 1).expand(-1, 1, touches.shape[2]))[:, 0]


class CRFRPMask(RegionMask):
    """Cover a random facial region, then hide of every other region the same share (FSFM, CRFR-P).

    With F the tokens that touch the covered region and q what is still to hide over what is left, round(q * size) tokens of each
    other group are hidden, in the order of the groups and without the tokens of an earlier one; what rounding leaves over is hidden or
    shown again at random, outside F. Where F alone is too large, a random part of it is shown and counts as covered no more.

    Args:
        ratio: share of hidden tokens.
        region_per: `batch` covers one region in all items of a step, as the official code does (each of its processes draws its own;
            here all processes share one), `item` one in each.
    """

    has_region_mask = True

    def __init__(self, ratio: float = 0.75, *, region_per: Literal["batch", "item"] = "batch") -> None:
        super().__init__(ratio)
        _check_region_per(self, region_per)
        self.region_per = region_per

    def _draw(self, keys: Tensor, touches: Tensor, *, num_hidden: int) -> Hidden:
        covered = _covered(keys, touches, region_per=self.region_per)
        orders = [permutation(fold_in(keys, purpose), touches.shape[2]) for purpose in (_SHARE, _FILL)]
        return cover_and_share(touches, covered=covered, share_order=orders[0], fill_order=orders[1], num_hidden=num_hidden)


class CRFRRMask(RegionMask):
    """Cover a random facial region, then hide tokens anywhere else (CRFR-R; its code is not public, this is our reading of the name).

    Args:
        ratio: share of hidden tokens.
        region_per: as in `CRFRPMask`.
    """

    has_region_mask = True

    def __init__(self, ratio: float = 0.75, *, region_per: Literal["batch", "item"] = "batch") -> None:
        super().__init__(ratio)
        _check_region_per(self, region_per)
        self.region_per = region_per

    def _draw(self, keys: Tensor, touches: Tensor, *, num_hidden: int) -> Hidden:
        covered = _covered(keys, touches, region_per=self.region_per)
        order = permutation(fold_in(keys, _FILL), touches.shape[2])
        return cover_and_share(touches[:, :0], covered=covered, share_order=order, fill_order=order, num_hidden=num_hidden)


class FRPMask(RegionMask):
    """The same share of every region (FRP, facial region proportional; our reading of the name): CRFR-P without a covered region."""

    has_region_mask = False

    def _draw(self, keys: Tensor, touches: Tensor, *, num_hidden: int) -> Hidden:
        orders = [permutation(fold_in(keys, purpose), touches.shape[2]) for purpose in (_SHARE, _FILL)]
        nothing = torch.zeros_like(touches[:, 0])
        hidden = cover_and_share(touches, covered=nothing, share_order=orders[0], fill_order=orders[1], num_hidden=num_hidden)
        return Hidden(mask=hidden.mask, region_mask=None)


class FaskingMask(RegionMask):
    """Brows, eyes, nose, mouth and hair first, skin and background with what is left (after MARLIN's Fasking; our reading of Fasking-I)."""

    has_region_mask = False

    def _draw(self, keys: Tensor, touches: Tensor, *, num_hidden: int) -> Hidden:
        order = permutation(fold_in(keys, _FILL), touches.shape[2])  # [B N]
        is_part = torch.stack([touches[:, group] for group in _PARTS]).any(dim=0).gather(1, order)  # [B N], in the random order
        place = torch.where(is_part, is_part.cumsum(dim=1), is_part.sum(dim=1, keepdim=True) + (~is_part).cumsum(dim=1))
        return Hidden(mask=torch.zeros_like(is_part).scatter(1, order, place <= num_hidden), region_mask=None)


def touched(regions: Tensor, *, grid: tuple[int, ...]) -> Tensor:
    """Which groups of regions each token touches.

    Args:
        regions: Int[B H W].
        grid: rows and columns of tokens.

    Returns:
        Bool[B R N], groups in the order in which they own tokens.

    Raises:
        ValueError: the grid does not divide the map.
    """
    _, *size = regions.shape
    if len(grid) != 2 or any(side % count for side, count in zip(size, grid, strict=True)):
        raise ValueError(f"region mask: a map of {' x '.join(map(str, size))} pixels does not divide into a grid of {tuple(grid)} tokens")
    # One bit per region: what a token touches is the union of its pixels' bits, and 16 bits a pixel are a quarter of the traffic of 64.
    ids = regions.to(torch.int16, copy=True).bitwise_and_(15)  # -1 becomes 15, whose bit is nobody's
    bits = torch.bitwise_left_shift(ids.new_ones(()), ids)
    bits = reduce(torch.bitwise_or, bits.unflatten(1, (grid[0], -1)).unbind(2))  # [B rows W]
    bits = reduce(torch.bitwise_or, bits.unflatten(2, (grid[1], -1)).unbind(3)).flatten(1)  # [B N]
    boundary = (bits & _bits_of("skin") != 0) & (bits & _bits_of("hair", "background") != 0)
    groups = [boundary if group == _BOUNDARY else bits & _bits_of(*names) != 0 for group, names in _GROUPS.items()]
    return torch.stack(groups, dim=1)


def _bits_of(*names: str) -> int:
    return sum(1 << FACE_REGIONS.index(name) for name in names)


def cover_and_share(touches: Tensor, *, covered: Tensor, share_order: Tensor, fill_order: Tensor, num_hidden: int) -> Hidden:
    """CRFR-P for given draws.

    Args:
        touches: Bool[B R N], which groups each token touches; of none, the rest is hidden at random.
        covered: Bool[B N], the region that is hidden whole.
        share_order: Int[B N], the tokens in the order in which groups hide theirs.
        fill_order: Int[B N], the tokens in the order in which they make up for what rounding leaves over.
        num_hidden: tokens to hide in each item.
    """
    num_tokens = covered.shape[1]
    num_covered = covered.sum(dim=1)
    missing = num_hidden - num_covered  # [B], not above 0 where the region alone is enough
    share = missing.float() / (num_tokens - num_covered).clamp(min=1).float()

    own = torch.zeros_like(touches)  # [B R N], each token with the first group that it touches
    seen = covered
    for group in range(touches.shape[1]):
        own[:, group] = touches[:, group] & ~seen
        seen = seen | touches[:, group]
    quota = torch.round(own.sum(dim=2) * share.unsqueeze(1)) * (missing > 0).unsqueeze(1)  # [B R], halves to even
    ordered = own.gather(2, share_order.unsqueeze(1).expand_as(own))
    taken = (ordered & (ordered.cumsum(dim=2, dtype=torch.int16) <= quota.unsqueeze(2))).any(dim=1)  # [B N]
    mask = covered | torch.zeros_like(covered).scatter(1, share_order, taken)

    surplus = mask.sum(dim=1) - num_hidden  # [B], of tokens to show again, below 0 of tokens still to hide
    protected = covered & (missing > 0).unsqueeze(1)
    candidates = torch.where((surplus < 0).unsqueeze(1), ~mask, mask & ~protected).gather(1, fill_order)
    changed = candidates & (candidates.cumsum(dim=1, dtype=torch.int16) <= surplus.abs().unsqueeze(1))
    mask = mask ^ torch.zeros_like(mask).scatter(1, fill_order, changed)
    return Hidden(mask=mask, region_mask=torch.where((missing > 0).unsqueeze(1), covered, mask))
