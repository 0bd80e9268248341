"""Draws are functions of their key, uniform, and independent of the batch."""

import scipy.stats
import torch

from glpretrain.core import keys

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
