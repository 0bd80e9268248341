"""Masks: their distribution is that of the official code, and an item's mask is the item's own."""

import math

import pytest
import torch
from golden import load, noise, wave
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glpretrain.core import keys
from glpretrain.core.batch import visible_indices
from glpretrain.masking import (
    BernoulliMask,
    BlockMask,
    DINOv2Mask,
    DINOv3Mask,
    GroupCorruption,
    Mask,
    RandomMask,
    UniformMask,
    VisibleBlocks,
    tokens,
)

IBOT, GMML, DINOV2 = load("ibot_masks"), load("gmml_masks"), load("dinov2_masks")
DINOV3 = load("dinov3_masks")
IBOT_RATIOS = ((0.0, 0.0), (0.1, 0.5))
MASKS = [RandomMask(0.75), BlockMask(IBOT_RATIOS), DINOv2Mask(), UniformMask(), BernoulliMask(0.7), VisibleBlocks(0.4, least_area=4)]
MASK_EMBED = load("mask_embed_masks")


def _keys(count: int) -> Tensor:
    return keys.item_keys(seed=0, epoch=0, index=torch.arange(count))


def _assert_same_mean(samples: Tensor, reference: list[float], *, draws: int) -> None:
    """Means at most 4.5 standard errors apart: a false alarm in about 10^5 comparisons, and none later, the keys being fixed."""
    mean, deviation = reference
    error = math.sqrt(deviation**2 / draws + float(samples.var()) / len(samples))
    assert abs(float(samples.mean()) - mean) <= 4.5 * error + 1e-6, f"{float(samples.mean())} against {mean}, standard error {error}"


def _assert_same_frequencies(samples: Tensor, reference: list[list[float]], *, draws: int) -> None:
    """As above for every cell of a grid; p (1 - p) bounds the variance of a value in [0, 1], and one hit more or less is no evidence."""
    ours, theirs = samples.mean(dim=0), torch.tensor(reference)
    p = (ours * len(samples) + theirs * draws) / (len(samples) + draws)
    error = (p * (1 - p) * (1 / len(samples) + 1 / draws)).sqrt() + 1 / draws
    assert ((ours - theirs).abs() <= 4.5 * error).all(), f"{((ours - theirs) / error).abs().max()} standard errors"


# Distributions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", IBOT["cases"], ids=lambda case: f"{case['grid']} {case['pred_ratio']}")
def test_block_masks_are_distributed_as_ibots(case: dict) -> None:
    mask = BlockMask(case["ranges"])(_keys(1500), tuple(case["grid"])).unflatten(1, case["grid"])
    down, across = (mask[:, 1:] & mask[:, :-1]).sum(dim=(1, 2)), (mask[:, :, 1:] & mask[:, :, :-1]).sum(dim=(1, 2))
    _assert_same_mean(mask.float().mean(dim=(1, 2)), case["share"], draws=case["draws"])
    _assert_same_mean((~mask).flatten(1).all(dim=1).float(), case["unmasked"], draws=case["draws"])
    _assert_same_mean((down + across).float(), case["adjacent_pairs"], draws=case["draws"])
    _assert_same_frequencies(mask.float(), case["frequency"], draws=case["draws"])


@pytest.mark.parametrize("case", DINOV2["cases"], ids=lambda case: str(case["grid"]))
def test_block_masks_are_distributed_as_dinov2s(case: dict) -> None:
    mask = DINOv2Mask(prob=0.5, ratio=(0.1, 0.5))(_keys(3000), tuple(case["grid"])).unflatten(1, case["grid"])
    down, across = (mask[:, 1:] & mask[:, :-1]).sum(dim=(1, 2)), (mask[:, :, 1:] & mask[:, :, :-1]).sum(dim=(1, 2))
    share = mask.float().mean(dim=(1, 2))
    _assert_same_mean(share, case["share"], draws=case["draws"])
    _assert_same_mean(share[share > 0], case["share_of_masked"], draws=case["masked_draws"])
    _assert_same_mean((share == 0).float(), case["unmasked"], draws=case["draws"])
    _assert_same_mean((down + across).float(), case["adjacent_pairs"], draws=case["draws"])
    _assert_same_frequencies(mask.float(), case["frequency"], draws=case["draws"])


def test_a_dinov2_mask_hides_no_more_than_it_was_asked_for() -> None:
    mask = DINOv2Mask(prob=1.0, ratio=(0.3, 0.3))(_keys(500), (7, 11))
    assert int(mask.sum(dim=1).max()) == int(0.3 * 77) and (mask.sum(dim=1) > 0).all()
    for wrong, message in (({"prob": 1.5}, "prob is a probability"), ({"ratio": (0.5, 0.1)}, "0 <= low <= high <= 1")):
        with pytest.raises(ValueError, match=message):
            DINOv2Mask(**wrong)


@pytest.mark.parametrize("case", DINOV3["cases"], ids=lambda case: str(case["grid"]))
def test_masks_of_an_exact_share_of_the_views_have_the_counts_and_the_distribution_of_dinov3s(case: dict) -> None:
    batches = [DINOv3Mask(prob=0.5, ratio=(0.1, 0.5))(own, tuple(case["grid"])) for own in _keys(40 * case["views"]).split(case["views"])]
    assert all(sorted(mask.sum(dim=1).tolist()) == case["counts"] for mask in batches)
    mask = torch.cat(batches).unflatten(1, case["grid"])
    down, across = (mask[:, 1:] & mask[:, :-1]).sum(dim=(1, 2)), (mask[:, :, 1:] & mask[:, :, :-1]).sum(dim=(1, 2))
    _assert_same_mean((down + across).float(), case["adjacent_pairs"], draws=case["draws"])
    _assert_same_frequencies(mask.float(), case["frequency"], draws=case["draws"])
    masked = torch.stack(batches).any(dim=2)  # which views, in every batch
    assert ((masked.float().mean(dim=0) - 0.5).abs() < 4.5 * (0.25 / 40) ** 0.5).all()


def test_masks_of_an_exact_share_are_the_same_for_the_same_batch_and_refuse_wrong_shares() -> None:
    mask = DINOv3Mask(prob=0.4, ratio=(0.2, 0.6))
    assert torch.equal(mask(_keys(11), (5, 7)), mask(_keys(11), (5, 7)))
    assert sorted(mask(_keys(11), (5, 7)).sum(dim=1).tolist()) == [0] * 7 + [10, 14, 17, 21]  # 35 times 0.3, 0.4, 0.5 and 0.6
    assert not DINOv3Mask(prob=0.4)(_keys(2), (5, 7)).any()
    for wrong, message in (({"prob": -0.5}, "DINOv3Mask: prob is a probability"), ({"ratio": (0.5, 0.1)}, "0 <= low <= high <= 1")):
        with pytest.raises(ValueError, match=message):
            DINOv3Mask(**wrong)


@pytest.mark.parametrize("case", GMML["cases"], ids=lambda case: f"{case['size']} align {case['align']} ratio {case['ratio']}")
def test_group_corruption_is_distributed_as_gmmls(case: dict) -> None:
    count = 1500 if case["size"][0] < 224 else 150
    corrupt = GroupCorruption(case["ratio"], align=case["align"], replace_prob=0.0)
    corruption = corrupt(torch.ones(count, 1, *case["size"]), _keys(count))[1].float()
    patches = corruption.unflatten(2, (-1, case["patch"])).unflatten(1, (-1, case["patch"])).mean(dim=(2, 4))
    for name, values in {
        "share": corruption.mean(dim=(1, 2)),
        "touched": (patches > 0).float().mean(dim=(1, 2)),
        "hidden": (patches == 1).float().mean(dim=(1, 2)),
    }.items():
        _assert_same_mean(values, case[name], draws=case["draws"])
    _assert_same_frequencies(patches, case["frequency"], draws=case["draws"])


def test_the_mix_of_fills_is_gmmls() -> None:
    case = GMML["mixture"]
    views = torch.arange(1.0, 2001.0).view(-1, 1, 1, 1).expand(-1, 1, *case["size"])
    corrupted, corruption = GroupCorruption(case["ratio"], align=case["align"], replace_ratio=case["replace_ratio"])(views, _keys(2000))
    replaced = ~((corrupted[:, 0] == 0) & corruption).flatten(1).any(dim=1)
    _assert_same_mean(corruption.float().mean(dim=(1, 2)), case["share"], draws=case["draws"])
    _assert_same_mean(replaced.float(), case["replaced"], draws=case["draws"])


def test_random_mask_hides_every_token_equally_often() -> None:
    mask = RandomMask(0.6)(_keys(3000), (3, 5))
    assert (mask.sum(dim=1) == 9).all()
    deviation = math.sqrt(0.6 * 0.4 / 3000)
    assert ((mask.float().mean(dim=0) - 0.6).abs() < 4.5 * deviation).all()


@pytest.mark.parametrize(("rounded_down", "hidden"), [("visible", 39), ("hidden", 38)])
def test_random_mask_rounds_as_mae_or_as_point_mae(rounded_down: str, hidden: int) -> None:
    assert (RandomMask(0.6, rounded_down=rounded_down)(_keys(3), (64,)).sum(dim=1) == hidden).all()


# An item's mask is its own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: type(mask).__name__)
@pytest.mark.parametrize("grid", [(6, 6), (7, 11)])
def test_an_item_alone_gets_the_mask_it_gets_in_a_batch(mask: Mask, grid: tuple[int, int]) -> None:
    together = mask(_keys(13), grid)
    alone = torch.cat([mask(key, grid) for key in _keys(13).split(1)])
    assert together.shape == (13, grid[0] * grid[1]) and torch.equal(together, alone)
    assert len(together.unique(dim=0)) > 3  # half of the block masks are empty


@pytest.mark.parametrize("ratio", [0.5, 0.97], ids=["one pass", "several passes"])
def test_an_item_alone_gets_the_corruption_it_gets_in_a_batch(ratio: float) -> None:
    corrupt = GroupCorruption(ratio, fill="noise", replace_prob=0.0)
    views = wave(7, 2, 30, 20)
    corrupted, corruption = corrupt(views, _keys(7))
    alone = [corrupt(view, key) for view, key in zip(views.split(1), _keys(7).split(1), strict=True)]
    assert torch.equal(corrupted, torch.cat([c for c, _ in alone])) and torch.equal(corruption, torch.cat([c for _, c in alone]))


def test_contiguous_even_shares_of_a_batch_are_corrupted_as_the_whole() -> None:
    corrupt, views, key = GroupCorruption(0.5), wave(8, 3, 20, 20), _keys(8)
    whole = corrupt(views, key)
    for begin in (0, 4):
        share = corrupt(views[begin : begin + 4], key[begin : begin + 4])
        assert torch.equal(share[0], whole[0][begin : begin + 4]) and torch.equal(share[1], whole[1][begin : begin + 4])


def test_odd_shares_of_a_batch_differ_in_the_items_whose_neighbour_is_another_one() -> None:
    corrupt, views, key = GroupCorruption(0.5, replace_prob=1.0), wave(6, 3, 20, 20), _keys(6)
    whole = corrupt(views, key)
    shares = [corrupt(views[begin : begin + 3], key[begin : begin + 3]) for begin in (0, 3)]
    corrupted, corruption = (torch.cat(parts) for parts in zip(*shares, strict=True))
    assert torch.equal(corruption, whole[1])  # where pixels are replaced is the same
    differ = (corrupted != whole[0]).flatten(1).any(dim=1)
    assert differ.tolist() == [False, False, True, True, True, False]  # 2 and 3 are neighbours in the whole batch, 3 and 4 in the share


# Counts -------------------------------------------------------------------------------------------------------------------

few = settings(deadline=None, max_examples=25, derandomize=True)
grids = st.tuples(st.integers(2, 12), st.integers(2, 12))
seeds = st.integers(0, 2**32)


@few
@given(ratio=st.floats(0.0, 0.75), grid=grids, seed=seeds)
def test_a_random_mask_hides_exactly_its_share(ratio: float, grid: tuple[int, int], seed: int) -> None:
    key, num_tokens = keys.item_keys(seed=seed, epoch=0, index=torch.arange(3)), math.prod(grid)
    mask = RandomMask(ratio)(key, grid)
    assert (mask.sum(dim=1) == num_tokens - int(num_tokens * (1.0 - ratio))).all()
    visible = visible_indices(mask)
    assert torch.equal(torch.ones_like(mask).scatter(1, visible, False), mask)
    assert torch.equal(visible.sort(dim=1).values, visible)


@few
@given(low=st.floats(0.0, 1.0), width=st.floats(0.0, 1.0), grid=grids, seed=seeds)
def test_block_masks_never_hide_more_than_the_largest_ratio(low: float, width: float, grid: tuple[int, int], seed: int) -> None:
    high = low + width * (1.0 - low)
    key, most = keys.item_keys(seed=seed, epoch=0, index=torch.arange(3)), high * math.prod(grid) + 1e-4  # the ratio is float32
    for mask in (BlockMask([(low, min(high, 1.0))]), DINOv2Mask(1.0, (low, min(high, 1.0)))):
        assert (mask(key, grid).sum(dim=1) <= most).all()


# What is put in place of the pixels -----------------------------------------------------------------------------------------


def test_replaced_pixels_are_the_neighbours_and_all_others_stay() -> None:
    views = wave(5, 3, 20, 20)
    corrupted, corruption = GroupCorruption(0.5, replace_prob=1.0)(views, _keys(5))
    where = corruption.unsqueeze(1)
    assert torch.equal(corrupted, torch.where(where, views[[1, 0, 3, 2, 3]], views))
    assert (corruption.float().mean(dim=(1, 2)) >= 0.3).all() and corruption.float().mean() < 0.4  # replace_ratio, not ratio


def test_zeros_are_zeros_and_noise_is_standard_normal() -> None:
    views = 5.0 + wave(64, 3, 20, 20)
    zeros, corruption = GroupCorruption(0.5, replace_prob=0.0)(views, _keys(64))
    noise, same = GroupCorruption(0.5, replace_prob=0.0, fill="noise")(views, _keys(64))
    where = corruption.unsqueeze(1).expand_as(views)
    assert (
        torch.equal(corruption, same) and torch.equal(zeros, torch.where(where, 0.0, views)) and torch.equal(noise[~where], views[~where])
    )
    values = noise[where]  # about 39,000: standard error 0.005 of the mean, 0.004 of the standard deviation
    assert abs(float(values.mean())) < 0.025 and abs(float(values.std()) - 1.0) < 0.02


@pytest.mark.parametrize("fill", ["zeros", "noise"])
def test_corrupted_views_keep_their_type(fill: str) -> None:
    assert GroupCorruption(0.5, fill=fill)(wave(2, 3, 20, 20).bfloat16(), _keys(2))[0].dtype == torch.bfloat16


def test_aligned_corruption_hides_whole_patches() -> None:
    corruption = GroupCorruption(0.5, align=8)(wave(5, 1, 48, 32), _keys(5))[1]
    patches = corruption.float().unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).mean(dim=(2, 4))
    assert ((patches == 0) | (patches == 1)).all()


def test_the_share_lies_between_its_bounds_or_overshoots_by_one_block() -> None:
    share = GroupCorruption(0.95, replace_prob=0.0)(torch.ones(60, 1, 24, 24), _keys(60))[1].float().mean(dim=(1, 2))
    assert share.min() >= 0.5 and share.max() <= 0.95 + 0.3**2 and share.max() > 0.9


# Kept tokens and refusals -------------------------------------------------------------------------------------------------


def test_kept_tokens_and_hidden_tokens_are_all_tokens() -> None:
    mask = RandomMask(0.75)(_keys(3), (6, 6))
    indices = visible_indices(mask)
    assert indices.shape == (3, 9) and torch.equal(indices, indices.sort(dim=1).values)
    assert torch.equal(mask.scatter(1, indices, True), torch.ones(3, 36, dtype=torch.bool)) and not mask.gather(1, indices).any()


def test_rows_that_keep_different_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 2 tokens"):
        visible_indices(torch.tensor([[True, False], [False, False]]))


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_random_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio is a share"):
        RandomMask(ratio)


def test_random_mask_names_the_ways_to_round() -> None:
    with pytest.raises(ValueError, match="rounded_down is 'visible' or 'hidden', not 'up'"):
        RandomMask(0.6, rounded_down="up")


@pytest.mark.parametrize("ratios", [[], [(0.5, 0.1)], [(0.0, 1.5)]])
def test_block_ratios_that_are_no_ranges_are_refused(ratios: list) -> None:
    with pytest.raises(ValueError, match="BlockMask: ratios"):
        BlockMask(ratios)


@pytest.mark.parametrize("grid", [(6,), (1, 6), (6, 1), (2, 3, 4)])
def test_block_mask_on_a_grid_without_room_is_refused(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no room for blocks"):
        BlockMask(IBOT_RATIOS)(_keys(2), grid)


@pytest.mark.parametrize(
    "arguments",
    [{"ratio": 0.0}, {"ratio": 1.0}, {"replace_ratio": 1.2}, {"align": 0}, {"max_side": 0.0}, {"fill": "mean"}, {"replace_prob": 1.5}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_corruption_argument_outside_its_range_is_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"GroupCorruption: {next(iter(arguments))}"):
        GroupCorruption(**({"ratio": 0.5} | arguments))


@pytest.mark.parametrize(
    ("align", "side", "message"), [(8, 20, "does not divide"), (16, 48, "leaves no block"), (8, 32, "blocks reach 0.56 of a view")]
)
def test_sizes_that_blocks_cannot_corrupt_are_refused(align: int, side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupCorruption(0.7, align=align)(torch.ones(2, 3, side, side), _keys(2))


# MaskEmbed's samplers, from the same draws ----------------------------------------------------------------------------------


def shares(name: str, *shape: int) -> Tensor:
    """The numbers in [0, 1] that the generator of the official samplers was replaced by, in turn."""
    return ((noise(100000, name=name)[: math.prod(shape)].double() + 1) / 2).float().reshape(shape)


@pytest.mark.parametrize("name", ["uniform", "bernoulli"])
@pytest.mark.parametrize("number", range(4))
def test_masks_of_single_tokens_are_mask_embeds_from_the_same_draws(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MASK_EMBED[name][number]
    num_masks = 1 + case["antithetical"] + case["null"]
    first = torch.tensor(case["masks"], dtype=torch.bool)[::num_masks]  # the others are made of it, or hide nothing
    width = 7 if name == "uniform" else 6
    monkeypatch.setattr(tokens, "uniform", lambda keys, *shape: shares(name, 5 * num_masks, width)[::num_masks])
    mask = UniformMask() if name == "uniform" else BernoulliMask(1.0 - case["mask_ratio"])
    assert torch.equal(~mask(_keys(5), (2, 3)), first)


@pytest.mark.parametrize("case", MASK_EMBED["blockwise"], ids=lambda case: str(case["target_ratio"]))
def test_blocks_of_visible_tokens_are_mask_embeds_from_the_same_draws(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.stack([shares(f"blocks {item}", 320, 4) for item in range(12)])  # [B draws 4]
    calls: list[int] = []

    def drawn(keys: Tensor, count: int, *rest: int) -> Tensor:
        calls.append(count)
        return table[:, sum(calls) - count : sum(calls)]

    monkeypatch.setattr(tokens, "uniform", drawn)
    visible = ~VisibleBlocks(case["target_ratio"])(_keys(12), (8, 8))
    assert visible.int().tolist() == case["masks"] and len(calls) < 20


def test_the_share_of_a_uniform_mask_is_uniform() -> None:
    share = UniformMask()(_keys(4000), (10, 10)).float().mean(dim=1)
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75])
    for edge in edges:  # 4.5 standard errors of a share of 4,000
        assert float(((share >= edge) & (share < edge + 0.25)).float().mean()) == pytest.approx(0.25, abs=0.031)


def test_visible_blocks_that_cannot_be_placed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"VisibleBlocks: grid \(6, 6\) given with visible_ratio 0.4 and least_area 16"):
        VisibleBlocks()(_keys(2), (6, 6))
    with pytest.raises(ValueError, match="visible_ratio is a share in"):
        VisibleBlocks(1.0)
    with pytest.raises(ValueError, match="least_area is a number of tokens from 4 on, not 3"):
        VisibleBlocks(0.4, least_area=3)
