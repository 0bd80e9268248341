"""Region masks: the official code's for equal draws, exact counts on any map, and what each strategy promises."""

import math

import pytest
import torch
from golden import load, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glpretrain.core import keys
from glpretrain.masking import FACE_REGIONS, CRFRPMask, CRFRRMask, FaskingMask, FRPMask, RegionMask
from glpretrain.masking.regions import cover_and_share, touched

GOLDEN = load("fsfm_masks")
STRATEGIES = [CRFRPMask(), CRFRPMask(region_per="item"), CRFRRMask(), FRPMask(), FaskingMask()]
BROWS, EYES, NOSE, MOUTH, BOUNDARY, HAIR, SKIN, BACKGROUND = range(8)


def _name(mask: RegionMask) -> str:
    return f"{type(mask).__name__} {getattr(mask, 'region_per', '')}".strip()


def _keys(count: int) -> Tensor:
    return keys.item_keys(seed=0, epoch=0, index=torch.arange(count))


def _golden_maps(side: int) -> Tensor:
    """Int[8 side side], the maps that the official code was given."""
    rows = []
    for item, block in enumerate((4, 8, 16, 32, 8, 8, 8, 8)):
        values = noise(side // block, side // block, name=f"map {item}").double()
        ids = ((values + 1) / 2 * 11).long().clamp(max=10)
        changed = {4: ids % 2, 5: torch.full_like(ids, 10), 6: (ids < 8).long(), 7: torch.where(values < 0.8, 6, ids)}
        rows.append(changed.get(item, ids).repeat_interleave(block, dim=0).repeat_interleave(block, dim=1))
    return torch.stack(rows)


def _hexadecimal(mask: Tensor) -> list[str]:
    weights = torch.tensor([8, 4, 2, 1])
    return ["".join(f"{digit:x}" for digit in row) for row in (mask.unflatten(1, (-1, 4)) * weights).sum(dim=2).tolist()]


def _maps(count: int, *, cells: int = 14, side: int = 2) -> Tensor:
    """Int[B cells*side cells*side]: random ids, in every second item only some of them, in every fifth a single one, -1 among them."""
    key = _keys(count)
    ids = keys.integers(keys.fold_in(key, 1), -1, len(FACE_REGIONS), cells, cells)
    few = keys.integers(keys.fold_in(key, 2), 1, 6).view(-1, 1, 1)
    number = torch.arange(count).view(-1, 1, 1)
    ids = torch.where(number % 2 == 1, ids % (few + 1) * 2, ids)
    ids = torch.where(number % 5 == 0, number // 5 % 12 - 1, ids).clamp(max=10)
    return ids.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)


# The official code -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['side']} pixels, region {case['region']}")
def test_equal_draws_give_the_official_masks(case: dict) -> None:
    side, cells = case["side"], case["side"] // case["patch"]
    touches = touched(_golden_maps(side), grid=(cells, cells))
    orders = [noise(8, cells * cells, name=f"{what} {cells * cells}").argsort(dim=1) for what in ("share", "fill")]
    covered = touches[:, case["region"]]
    hidden = cover_and_share(touches, covered=covered, share_order=orders[0], fill_order=orders[1], num_hidden=cells * cells * 3 // 4)
    assert _hexadecimal(hidden.mask) == case["masks"]
    assert _hexadecimal(hidden.region_mask) == case["covered"]


# Counts ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", STRATEGIES, ids=_name)
def test_counts_are_exact_on_ten_thousand_maps(mask: RegionMask) -> None:
    hidden = mask(_keys(10_000), (14, 14), regions=_maps(10_000))
    assert (hidden.mask.sum(dim=1) == 147).all()
    if mask.has_region_mask:
        assert not (hidden.region_mask & ~hidden.mask).any()
    else:
        assert hidden.region_mask is None


@pytest.mark.parametrize("mask", [type(mask)(0.6) for mask in STRATEGIES], ids=_name)
@pytest.mark.parametrize("grid", [(3, 5), (7, 7)])
def test_a_share_that_does_not_divide_keeps_as_many_as_mae(mask: RegionMask, grid: tuple[int, int]) -> None:
    hidden = mask(_keys(50), grid, regions=_maps(50, cells=35)[:, : 2 * grid[0], : 2 * grid[1]])
    assert ((~hidden.mask).sum(dim=1) == int(math.prod(grid) * (1 - 0.6))).all()


# What a strategy promises --------------------------------------------------------------------------------------------------------


def test_tokens_touch_the_regions_of_their_pixels() -> None:
    regions = torch.zeros(1, 4, 6, dtype=torch.long)
    regions[0, 0, 1], regions[0, 3, 3], regions[0, 1, 4:] = 6, 1, -1
    regions[0, :2, 4:] = -1
    touches = touched(regions, grid=(2, 3))[0]  # [R N]
    assert touches[NOSE].tolist() == [True, False, False, False, False, False]
    assert touches[SKIN].tolist() == touches[BOUNDARY].tolist() == [False, False, False, False, True, False]
    assert touches[BACKGROUND].tolist() == [True, True, False, True, True, True]  # the third token has no region at all
    assert not touches[:, 2].any()


@pytest.mark.parametrize("mask", [mask for mask in STRATEGIES if mask.has_region_mask], ids=_name)
def test_the_covered_region_is_hidden_whole(mask: RegionMask) -> None:
    regions, key = _maps(400), _keys(400)
    hidden, touches = mask(key, (14, 14), regions=regions), touched(regions, grid=(14, 14))
    whole = (touches[:, :6] == hidden.region_mask.unsqueeze(1)).all(dim=2)  # [B 6]
    too_large = hidden.region_mask.sum(dim=1) == 147  # a part of it was shown again
    assert (whole.any(dim=1) | too_large).all()
    if mask.region_per == "batch":
        assert (whole | too_large.unsqueeze(1)).all(dim=0).any()
    else:
        usual = torch.arange(400) % 10 == 2  # all regions are there
        counts = whole[usual & (whole.sum(dim=1) == 1)].sum(dim=0)
        assert (counts > 0).all()


def test_the_region_of_a_batch_changes_from_batch_to_batch_and_not_with_its_order() -> None:
    mask, regions = CRFRPMask(), _maps(3)[2:].expand(12, -1, -1)
    seen = {tuple(mask(_keys(12 * batch + 12)[-12:], (14, 14), regions=regions).region_mask[0].tolist()) for batch in range(60)}
    assert len(seen) > 1
    regions, key = _maps(12), _keys(12)
    forward, backward = mask(key, (14, 14), regions=regions), mask(key.flip(0), (14, 14), regions=regions.flip(0))
    assert torch.equal(forward.mask.flip(0), backward.mask) and torch.equal(forward.region_mask.flip(0), backward.region_mask)


def _drawn(count: int, *, region_per: int | str, order: Tensor | None = None) -> Tensor:
    """Int[count]: the regions that are covered in items with the same map, whose six regions are single tokens."""
    regions = torch.ones(1, 28, 28, dtype=torch.long)
    for token, region in enumerate((2, 4, 6, 7, 0, 10)):
        regions[:, 2 * token, :2] = region  # beside skin, which makes the fifth one the boundary of the face
    keyed = _keys(count) if order is None else _keys(count)[order]
    covered = CRFRPMask(0.5, region_per=region_per)(keyed, (14, 14), regions=regions.expand(count, -1, -1)).region_mask
    return covered[:, 0::14].float().argmax(dim=1)


def test_a_number_of_items_shares_a_region_and_what_an_item_gets_depends_on_neither_order_nor_place() -> None:
    """600 items in groups of 100 draw one of 6 groups each, which draw one of 6 regions: few regions have many items each."""
    drawn = _drawn(600, region_per=100)
    order = torch.arange(600).roll(7).flip(0)
    assert torch.equal(_drawn(600, region_per=100, order=order), drawn[order])
    # A group holds 100 items give or take five standard deviations of its share; a region holds a whole number of groups.
    sizes = drawn.bincount(minlength=6)
    assert 1 < int((sizes > 0).sum()) <= 6 and all(size == 0 or size > 100 - 5 * 600**0.5 * (5 / 36) ** 0.5 for size in sizes.tolist())
    assert torch.equal(_drawn(600, region_per=601), _drawn(600, region_per=10_000)) and len(_drawn(600, region_per=601).unique()) == 1


def test_groups_are_many_where_items_are_many() -> None:
    """With 4000 items in groups of 10, all regions have their sixth, give or take five standard deviations over 400 groups."""
    shares = _drawn(4000, region_per=10).bincount(minlength=6) / 4000
    assert float((shares - 1 / 6).abs().max()) < 5 * (5 / 36 / 400 * (1 + 1 / 10)) ** 0.5


@pytest.mark.parametrize("mask", [CRFRPMask(region_per="item"), CRFRRMask(region_per="item"), FRPMask(), FaskingMask()], ids=_name)
def test_an_item_alone_gets_the_mask_it_gets_in_a_batch(mask: RegionMask) -> None:
    regions, key = _maps(23), _keys(23)
    together = mask(key, (14, 14), regions=regions).mask
    alone = [mask(one, (14, 14), regions=own).mask for one, own in zip(key.split(1), regions.split(1), strict=True)]
    assert torch.equal(together, torch.cat(alone)) and len(together.unique(dim=0)) == 23


@pytest.mark.parametrize("mask", [CRFRPMask(), FRPMask()], ids=_name)
def test_every_other_group_hides_its_share(mask: RegionMask) -> None:
    """In the mean over many draws on one map; a group of few tokens rounds, so by at most one token."""
    regions = torch.zeros(1, 28, 28, dtype=torch.long)
    regions[:, 4:26, 4:24], regions[:, :6] = 1, 10
    regions[:, 10:12, 8:20], regions[:, 14:18, 12:16], regions[:, 20:22, 10:18] = 5, 6, 8
    hidden = mask(_keys(2000), (14, 14), regions=regions.expand(2000, -1, -1))
    touches = touched(regions, grid=(14, 14))[0]
    covered = torch.zeros(196, dtype=torch.bool) if hidden.region_mask is None else hidden.region_mask[0]
    share, seen = (147 - covered.sum()) / (196 - covered.sum()), covered
    for group in touches:
        own = group & ~seen
        seen = seen | group
        if own.any():
            assert abs(float(hidden.mask[:, own].float().mean() - share)) <= 1.0 / int(own.sum())
            assert (hidden.mask[:, own].float().mean(dim=0).std() < 0.05) or own.sum() == 1  # none of its tokens is preferred


def test_random_rest_prefers_no_token() -> None:
    hidden = CRFRRMask()(_keys(4000), (14, 14), regions=torch.full((4000, 28, 28), -1))  # no region: nothing is covered
    assert not hidden.region_mask.any()
    assert ((hidden.mask.float().mean(dim=0) - 0.75).abs() < 4.5 * math.sqrt(0.75 * 0.25 / 4000)).all()


def test_fasking_hides_parts_first() -> None:
    regions = torch.ones(1, 28, 28, dtype=torch.long)
    regions[:, :14], regions[:, 20:22] = 10, 9
    hidden = FaskingMask()(_keys(1), (14, 14), regions=regions).mask.view(14, 14)
    assert hidden[:7].all() and hidden[10].all() and not hidden[11:].all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CRFRPMask(1.0), "CRFRPMask: ratio is a share in [0, 1), not 1.0"),
        (lambda: CRFRPMask(region_per="face"), "CRFRPMask: region_per is 'batch', 'item' or a number of items, not 'face'"),
        (lambda: CRFRRMask(region_per=0), "CRFRRMask: region_per is 'batch', 'item' or a number of items, not 0"),
        (lambda: FRPMask(0.9)(_keys(1), (2, 2), regions=_maps(1)), "FRPMask: ratio 0.9 keeps none of the 4 tokens of grid (2, 2)"),
        (
            lambda: FRPMask()(_keys(1), (3, 4), regions=_maps(1)),
            "region mask: a map of 28 x 28 pixels does not divide into a grid of (3, 4)",
        ),
    ],
)
def test_mistakes_are_named(make, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value).startswith(message)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    ratio=st.floats(0.0, 0.9),
    grid=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    seed=st.integers(0, 2**32),
    ids=st.lists(st.integers(-1, len(FACE_REGIONS) - 1), min_size=1, max_size=11),
)
def test_every_strategy_hides_exactly_its_share_of_any_map(ratio: float, grid: tuple[int, int], seed: int, ids: list[int]) -> None:
    key = keys.item_keys(seed=seed, epoch=0, index=torch.arange(4))
    rows, columns = grid
    regions = torch.tensor(ids)[keys.integers(keys.fold_in(key, 9), 0, len(ids), 2 * rows, 3 * columns)]
    expected = rows * columns - int(rows * columns * (1.0 - ratio))
    for strategy in (CRFRPMask, CRFRRMask, FRPMask, FaskingMask):
        hidden = strategy(ratio)(key, grid, regions=regions)
        assert (hidden.mask.sum(dim=1) == expected).all()
        assert hidden.region_mask is None or not (hidden.region_mask & ~hidden.mask).any()
