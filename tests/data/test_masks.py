"""Masks made where items are read: those of the keys, with the places that methods look for."""

import pytest
import torch

from glpretrain.core import keys as rng
from glpretrain.core.batch import ViewGroup
from glpretrain.data.masks import MASK, draw_masks
from glpretrain.masking import BlockMask, DINOv2Mask, Mask, RandomMask

GRID, COUNT, ITEMS = (6, 6), 2, 5
KEYS = rng.item_keys(seed=4, epoch=1, index=torch.arange(ITEMS))


@pytest.mark.parametrize("mask", [RandomMask(0.75), BlockMask([(0.1, 0.5)]), DINOv2Mask()], ids=lambda mask: type(mask).__name__)
def test_hidden_and_visible_tokens_are_those_of_the_mask(mask: Mask) -> None:
    group = ViewGroup(torch.zeros(COUNT, ITEMS, 1), **draw_masks(KEYS, mask=mask, grid=GRID, count=COUNT))
    for number in range(COUNT):
        assert torch.equal(group.mask[number], mask(rng.per_view(KEYS, MASK, count=COUNT)[number], GRID))
    counted = ViewGroup(group.items, mask=group.mask)
    assert torch.equal(group.hidden_places(), counted.hidden_places())
    marked = torch.zeros(COUNT * ITEMS * 36, dtype=torch.bool)
    marked[group.hidden_places()] = True
    assert torch.equal(marked.view_as(group.mask), group.mask) and 0 < int(marked.sum()) < marked.numel()
    assert (group.visible is not None) == isinstance(mask, RandomMask)
    if group.visible is not None:
        assert torch.equal(group.visible_tokens(), counted.visible_tokens())
        assert group.visible_tokens().shape == (COUNT * ITEMS, 9)
        assert not group.mask.flatten(0, 1).gather(1, group.visible_tokens()).any()


def test_no_mask_draws_nothing() -> None:
    assert draw_masks(KEYS, mask=None, grid=GRID, count=COUNT) == {}


def test_some_items_keep_their_own_tokens() -> None:
    group = ViewGroup(torch.zeros(COUNT, ITEMS, 1), **draw_masks(KEYS, mask=BlockMask([(0.1, 0.5)]), grid=GRID, count=COUNT))
    rows = torch.tensor([3, 1])
    some = group.of_items(rows)
    assert torch.equal(some.mask, group.mask[:, rows])
    assert torch.equal(some.hidden_places(), group.mask[:, rows].flatten().nonzero().squeeze(1))
