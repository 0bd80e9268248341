"""Masks over the regions of a face: which tokens are hidden depends on the region map of each item (FSFM).

A region map has one id per pixel, an index into `FACE_REGIONS`; a token touches every region of which it contains a pixel. Masks of one
kind hide the same number of tokens for every map, also where regions are missing or fill the frame. They are drawn for the whole batch at
once, on the device of the keys, without waiting for it. In shapes, R counts groups of regions. Left out: where the maps come from
(`glpretrain.data.sources.images`).
"""

import math
from abc import ABC, abstractmethod
from functools import reduce
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from glpretrain.core.distributed import all_reduce_sum
from glpretrain.core.keys import fold_in, integers, permutation
from glpretrain.masking.tokens import check_ratio, num_visible

# Names of the ids in a region map. The ids are those of LaPa, which the parser of the official code writes.
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
# In the order of the official code: a token belongs to the first group that it touches. A token of the boundary of the face touches skin
# and also hair or background.
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
_NUM_COVERED = 6  # one of the first six may be the region that is hidden whole; skin and background never are
_PARTS = (0, 1, 2, 3, 5)  # brows, eyes, nose, mouth, hair
_REGION, _SHARE, _FILL, _GROUP = range(4)  # purposes of the keys
RegionPer = Literal["batch", "item"] | int


class Hidden(NamedTuple):
    """The tokens that a region mask hides."""

    mask: Tensor  # Bool[B N]  True: hidden
    region_mask: Tensor | None  # Bool[B N]  True: hidden as part of the region that is hidden whole; None where there is no such region


class RegionMask(ABC):
    """Chooses which tokens of each item are hidden, by its region map.

    As for `RandomMask`, int(N * (1 - ratio)) tokens stay visible and the rest is hidden.

    Args:
        ratio: share of hidden tokens, in [0, 1); any other is a ValueError.
    """

    has_region_mask: ClassVar[bool]  # whether one region is hidden whole

    def __init__(self, ratio: float = 0.75) -> None:
        self.ratio = check_ratio(ratio, mask=type(self).__name__)

    def __call__(self, keys: Tensor, grid: tuple[int, ...], *, regions: Tensor) -> Hidden:
        """Draw one mask per key.

        Args:
            keys: Int[B].
            grid: rows and columns of tokens, N in all.
            regions: Int[B H W], index into `FACE_REGIONS` of every pixel, -1 where there is no region.

        Raises:
            ValueError: the map does not divide into the grid, or no token would be visible.
        """
        num_hidden = math.prod(grid) - self.num_visible(grid)
        return self._draw(keys, touched(regions, grid=grid), num_hidden=num_hidden)

    def num_visible(self, grid: tuple[int, ...]) -> int:
        """Number of tokens that stay visible in every item; none is refused with a ValueError."""
        return num_visible(grid, ratio=self.ratio, mask=type(self).__name__)

    @abstractmethod
    def _draw(self, keys: Tensor, touches: Tensor, *, num_hidden: int) -> Hidden:
        """Draw the masks from Int[B] keys and from Bool[B R N], the groups of regions that each token touches."""


def _check_region_per(region_per: RegionPer, *, mask: str) -> RegionPer:
    if region_per not in ("batch", "item") and not (type(region_per) is int and region_per >= 1):
        raise ValueError(f"{mask}: region_per is 'batch', 'item' or a number of items, not {region_per!r}")
    return region_per


def _covered(keys: Tensor, touches: Tensor, *, region_per: RegionPer) -> Tensor:
    """Bool[B N]: the tokens of the region that is hidden whole, which is one of brows, eyes, nose, mouth, boundary of the face and hair."""
    key = fold_in(keys, _REGION)
    if region_per != "item":
        # The sum over the items of all processes, modulo 2^64, so that the order of the items and their processes do not matter.
        total, num_items = all_reduce_sum(torch.stack([key.sum(), key.new_tensor(len(key))])).unbind()
        key = total.expand_as(key)
        if region_per != "batch":
            num_groups = ((num_items + region_per // 2) // region_per).clamp(min=1)  # rounded
            key = fold_in(key, integers(fold_in(keys, _GROUP), 0, num_groups))
    region = integers(key, 0, _NUM_COVERED)  # [B]
    return touches.gather(1, region.view(-1, 1, 1).expand(-1, 1, touches.shape[2]))[:, 0]


class CRFRPMask(RegionMask):
    """Cover a random facial region, then hide the same share of every other region (FSFM, CRFR-P).

    F are the tokens that touch the covered region, and q is the share of the remaining tokens that is still to be hidden. Of each other
    group, without the tokens of an earlier one, round(q * size) tokens are hidden. The difference that rounding leaves is hidden or shown
    again at random, outside F. Where F alone is too large, a random part of it is shown and no longer counts as covered.

    Args:
        ratio: share of hidden tokens.
        region_per: `batch` covers one region in all items of a step, in all processes; `item` one in each; a number covers one in each
            group of so many items. The official code draws one per batch of a loader, which is a process and a micro-batch: 64 items by
            default, and 256 in its README. Here an item draws its group, so that groups have this size on average.
    """

    has_region_mask = True

    def __init__(self, ratio: float = 0.75, *, region_per: RegionPer = "batch") -> None:
        super().__init__(ratio)
        self.region_per: RegionPer = _check_region_per(region_per, mask=type(self).__name__)

    def _draw(self, keys: Tensor, touches: Tensor, *, num_hidden: int) -> Hidden:
        covered = _covered(keys, touches, region_per=self.region_per)
        orders = [permutation(fold_in(keys, purpose), touches.shape[2]) for purpose in (_SHARE, _FILL)]
        return cover_and_share(touches, covered=covered, share_order=orders[0], fill_order=orders[1], num_hidden=num_hidden)


class CRFRRMask(RegionMask):
    """Cover a random facial region, then hide random tokens anywhere else (CRFR-R; our reading of the name, its code is not public).

    Args:
        ratio: share of hidden tokens.
        region_per: see `CRFRPMask`.
    """

    has_region_mask = True

    def __init__(self, ratio: float = 0.75, *, region_per: RegionPer = "batch") -> None:
        super().__init__(ratio)
        self.region_per: RegionPer = _check_region_per(region_per, mask=type(self).__name__)

    def _draw(self, keys: Tensor, touches: Tensor, *, num_hidden: int) -> Hidden:
        covered = _covered(keys, touches, region_per=self.region_per)
        order = permutation(fold_in(keys, _FILL), touches.shape[2])
        return cover_and_share(touches[:, :0], covered=covered, share_order=order, fill_order=order, num_hidden=num_hidden)


class FRPMask(RegionMask):
    """Hide the same share of every region (FRP, facial region proportional; our reading of the name): CRFR-P without a covered region."""

    has_region_mask = False

    def _draw(self, keys: Tensor, touches: Tensor, *, num_hidden: int) -> Hidden:
        orders = [permutation(fold_in(keys, purpose), touches.shape[2]) for purpose in (_SHARE, _FILL)]
        nothing = torch.zeros_like(touches[:, 0])
        hidden = cover_and_share(touches, covered=nothing, share_order=orders[0], fill_order=orders[1], num_hidden=num_hidden)
        return Hidden(mask=hidden.mask, region_mask=None)


class FaskingMask(RegionMask):
    """Hide brows, eyes, nose, mouth and hair first, then skin and background (after MARLIN's Fasking; our reading of Fasking-I)."""

    has_region_mask = False

    def _draw(self, keys: Tensor, touches: Tensor, *, num_hidden: int) -> Hidden:
        order = permutation(fold_in(keys, _FILL), touches.shape[2])  # [B N]
        is_part = torch.stack([touches[:, group] for group in _PARTS]).any(dim=0).gather(1, order)  # [B N], in the random order
        place = torch.where(is_part, is_part.cumsum(dim=1), is_part.sum(dim=1, keepdim=True) + (~is_part).cumsum(dim=1))
        return Hidden(mask=torch.zeros_like(is_part).scatter(1, order, place <= num_hidden), region_mask=None)


def touched(regions: Tensor, *, grid: tuple[int, ...]) -> Tensor:
    """Bool[B R N]: groups of regions that each token touches in maps Int[B H W]; a token belongs to its first group in this order.

    Raises:
        ValueError: the map does not divide into the grid.
    """
    _, *size = regions.shape
    if len(grid) != 2 or any(side % count for side, count in zip(size, grid, strict=True)):
        raise ValueError(f"region mask: a map of {' x '.join(map(str, size))} pixels does not divide into a grid of {tuple(grid)} tokens")
    # One bit per region: the regions of a token are the union of its pixels' bits. 16 bits per pixel need a quarter of the traffic of 64.
    ids = regions.to(torch.int16, copy=True).bitwise_and_(15)  # -1 becomes 15, a bit that no region has
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
        touches: Bool[B R N], the groups that each token touches; with R = 0, all other tokens are hidden at random.
        covered: Bool[B N], the region that is hidden whole.
        share_order: Int[B N], order in which the tokens of a group are hidden.
        fill_order: Int[B N], order in which tokens are hidden or shown again to make up for rounding.
        num_hidden: number of tokens to hide in each item.
    """
    num_tokens = covered.shape[1]
    num_covered = covered.sum(dim=1)
    missing = num_hidden - num_covered  # [B], 0 or less where the region alone is enough
    share = missing.float() / (num_tokens - num_covered).clamp(min=1).float()

    own = torch.zeros_like(touches)  # [B R N], each token in the first group that it touches
    seen = covered
    for group in range(touches.shape[1]):
        own[:, group] = touches[:, group] & ~seen
        seen = seen | touches[:, group]
    quota = torch.round(own.sum(dim=2) * share.unsqueeze(1)) * (missing > 0).unsqueeze(1)  # [B R], halves to even
    ordered = own.gather(2, share_order.unsqueeze(1).expand_as(own))
    taken = (ordered & (ordered.cumsum(dim=2, dtype=torch.int16) <= quota.unsqueeze(2))).any(dim=1)  # [B N]
    mask = covered | torch.zeros_like(covered).scatter(1, share_order, taken)

    surplus = mask.sum(dim=1) - num_hidden  # [B], number of tokens to show again, negative where some are still to be hidden
    protected = covered & (missing > 0).unsqueeze(1)
    candidates = torch.where((surplus < 0).unsqueeze(1), ~mask, mask & ~protected).gather(1, fill_order)
    changed = candidates & (candidates.cumsum(dim=1, dtype=torch.int16) <= surplus.abs().unsqueeze(1))
    mask = mask ^ torch.zeros_like(mask).scatter(1, fill_order, changed)
    return Hidden(mask=mask, region_mask=torch.where((missing > 0).unsqueeze(1), covered, mask))
