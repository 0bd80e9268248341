"""Draws are functions of their key, uniform, and independent of the batch."""

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glpretrain.core import keys

few = settings(deadline=None, max_examples=25, derandomize=True)
int64 = st.integers(-(2**63), 2**63 - 1)

KNOWN = [[-2572933416876984053, 6911614846390516078], [6507992360998728317, 3365118575011618298]]  # of this package, first release


def _keys(count: int, *, seed: int = 3, epoch: int = 0) -> torch.Tensor:
    return keys.item_keys(seed=seed, epoch=epoch, index=torch.arange(count))


def test_known_bits_never_change() -> None:
    """A resumed run of another version must see the same crops: these numbers are part of the format."""
    assert keys.bits(_keys(2), 2).tolist() == KNOWN


def test_draws_do_not_depend_on_the_batch() -> None:
    whole = keys.uniform(_keys(7), 5)
    single = torch.stack([keys.uniform(_keys(7)[i], 5) for i in range(7)])
    assert torch.equal(whole, single)


def test_seed_epoch_index_and_purpose_each_change_the_draw() -> None:
    base = keys.uniform(_keys(1))
    others = [_keys(1, seed=4), _keys(1, epoch=1), _keys(2)[1:], keys.fold_in(_keys(1), 0), keys.fold_in(_keys(1), 1)]
    assert len({float(value) for value in [base, *(keys.uniform(key) for key in others)]}) == 6


def test_uniform_passes_kolmogorov_smirnov_along_both_axes() -> None:
    along_items = keys.uniform(_keys(20_000))
    along_draws = keys.uniform(_keys(1), 20_000)[0]
    for draws in (along_items, along_draws):
        assert float(draws.min()) >= 0.0 and float(draws.max()) < 1.0
        assert scipy.stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3  # fixed seed: passes or fails for good


def test_neighbouring_keys_are_uncorrelated() -> None:
    draws = keys.uniform(_keys(20_000), 2)
    correlation = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0], draws[:-1, 1]]))
    assert correlation.fill_diagonal_(0.0).abs().max() < 4 / 20_000**0.5  # four standard errors


def test_normal_has_the_normal_distribution() -> None:
    assert scipy.stats.kstest(keys.normal(_keys(20_000)).numpy(), "norm").pvalue > 1e-3


def test_integers_cover_their_range_evenly() -> None:
    draws = keys.integers(_keys(14_000), 2, 9)
    counts = torch.bincount(draws, minlength=9)
    assert counts[:2].sum() == 0
    assert scipy.stats.chisquare(counts[2:].numpy()).pvalue > 1e-3


def test_permutations_are_permutations_and_all_occur() -> None:
    orders = keys.permutation(_keys(2_000), 4)
    assert torch.equal(orders.sort(dim=-1).values, torch.arange(4).expand(2_000, 4))
    counts = torch.unique(orders, dim=0, return_counts=True)[1]
    assert len(counts) == 24 and scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_a_long_permutation_is_made_in_parts_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [_keys(3), torch.tensor(7), _keys(6).reshape(2, 3)]
    whole = [keys.permutation(key, 1009) for key in given]
    monkeypatch.setattr(keys, "_TOGETHER", 97)
    assert all(torch.equal(keys.permutation(key, 1009), expected) for key, expected in zip(given, whole, strict=True))


# Properties -----------------------------------------------------------------------------------------------------------------


@few
@given(numbers=st.lists(int64, min_size=2, max_size=30, unique=True), other=int64)
def test_folding_is_a_permutation_of_the_keys_and_of_the_purposes(numbers: list[int], other: int) -> None:
    values, fixed = torch.tensor(numbers), torch.tensor(other)
    assert len(keys.fold_in(values, fixed).unique()) == len(numbers)
    assert len(keys.fold_in(fixed, values).unique()) == len(numbers)


@few
@given(key=int64, purpose=int64)
def test_a_number_and_a_tensor_of_it_fold_alike(key: int, purpose: int) -> None:
    assert torch.equal(keys.fold_in(torch.tensor(key), purpose), keys.fold_in(torch.tensor(key), torch.tensor(purpose)))


@few
@given(numbers=st.lists(int64, min_size=1, max_size=5), count=st.integers(1, 70))
def test_a_permutation_holds_every_number_once(numbers: list[int], count: int) -> None:
    order = keys.permutation(torch.tensor(numbers), count)
    assert torch.equal(order.sort(dim=-1).values, torch.arange(count).expand(len(numbers), count))


@few
@given(numbers=st.lists(int64, min_size=1, max_size=5), low=st.integers(-1000, 1000), width=st.integers(1, 2**23))
def test_draws_stay_in_their_range(numbers: list[int], low: int, width: int) -> None:
    key = torch.tensor(numbers)
    draws = keys.uniform(key, 50)
    assert (draws >= 0.0).all() and (draws < 1.0).all()
    assert torch.isfinite(keys.normal(key, 50)).all()
    whole = keys.integers(key, low, low + width, 50)
    assert (whole >= low).all() and (whole < low + width).all()


@few
@given(
    index=st.lists(st.integers(0, 2**40), min_size=2, max_size=12),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 10_000),
    cut=st.floats(0.0, 1.0),
    shift=st.integers(0, 11),
)
def test_an_item_has_the_same_draws_in_every_layout_of_the_batch(index: list[int], seed: int, epoch: int, cut: float, shift: int) -> None:
    items = torch.tensor(index)
    whole = keys.uniform(keys.item_keys(seed=seed, epoch=epoch, index=items), 3, 2)
    parts = items.tensor_split([round(cut * len(items))])
    split = torch.cat([keys.uniform(keys.item_keys(seed=seed, epoch=epoch, index=part), 3, 2) for part in parts])
    rolled = keys.uniform(keys.item_keys(seed=seed, epoch=epoch, index=items.roll(shift)), 3, 2)
    assert torch.equal(split, whole) and torch.equal(rolled, whole.roll(shift, dims=0))
