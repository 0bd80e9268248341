"""How sure a number is: half-widths of 95 % intervals of rates, means and whatever is computed from sums over images.

Scores that are a rate or a mean are made here as well, each with its interval.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.evaluate.base import Score

Z95 = 1.959964  # two-sided 95 % of the standard normal
_BOOTSTRAP_SEED = 60
_NUM_RESAMPLES = 200


def rate_interval(rate: float, *, count: int) -> float:
    """Half-width of Wilson's 95 % interval of a rate in [0, 1]: unlike the plain normal one it is not zero at 0 and 1."""
    centre = rate * (1 - rate) / count + Z95**2 / (4 * count**2)
    return Z95 * math.sqrt(centre) / (1 + Z95**2 / count)


def mean_interval(values: Tensor) -> float:
    """Half-width of the normal 95 % interval of a mean of independent observations, Float[B]; infinity for a single value."""
    count = len(values)
    return math.inf if count < 2 else Z95 * values.std().item() / math.sqrt(count)


def rate_score(hits: Tensor) -> Score:
    """The share of ones in Float[B] of zeros and ones, in percent, with Wilson's interval."""
    rate, count = hits.mean().item(), len(hits)
    return Score(100 * rate, 100 * rate_interval(rate, count=count), count)


def accuracy(predicted: Tensor, labels: Tensor) -> Score:
    """Share of Int[B] that equals Int[B], in percent, with Wilson's interval."""
    return rate_score((predicted == labels).float())


def mean_score(values: Tensor) -> Score:
    """Mean of shares in [0, 1], Float[B], in percent, with the interval of a mean."""
    return Score(100 * values.mean().item(), 100 * mean_interval(values), len(values))


def bootstrap_interval(statistic: Callable[[Tensor], Tensor], parts: Tensor) -> float:
    """Half-width of the normal 95 % interval of a statistic of a sum, the summands (images) being drawn with replacement 200 times.

    Args:
        statistic: function of Float[R *S] to Float[R]; NaN where it cannot be computed (a draw without the class), and then left out.
        parts: Float[B *S], one summand per independent observation.

    Returns:
        Infinity for a single summand.
    """
    count = len(parts)
    if count < 2:
        return math.inf
    values = statistic((drawn_counts(count).to(parts.dtype) @ parts.flatten(1)).unflatten(1, parts.shape[1:]))
    return spread_interval(values)


def drawn_counts(count: int) -> Tensor:
    """Float[200 count]: how often each of `count` observations is drawn when as many are drawn with replacement, 200 times."""
    draws = keys.integers(torch.tensor(_BOOTSTRAP_SEED), 0, count, _NUM_RESAMPLES, count)
    return torch.zeros(_NUM_RESAMPLES, count).scatter_add_(1, draws, torch.ones(draws.shape))


def spread_interval(values: Tensor) -> float:
    """Half-width of the normal 95 % interval of a statistic, from its values for each draw, Float[R]; NaN is left out."""
    values = values[values.isfinite()]
    return math.inf if len(values) < 2 else Z95 * values.std().item()


def jackknife_interval(statistic: Callable[[Tensor], Tensor], parts: Tensor) -> float:
    """Half-width of the normal 95 % interval of a smooth statistic of a sum, by leaving out one summand (a group of items) at a time.

    It is for statistics that repeated items would distort, such as a rank: the bootstrap draws items twice.

    Args:
        statistic: function of Float[R *S] to Float[R].
        parts: Float[R *S], sums over disjoint groups of about equal size.

    Returns:
        Infinity for a single group.
    """
    count = len(parts)
    if count < 2:
        return math.inf
    values = statistic(parts.sum(dim=0) - parts)
    return Z95 * math.sqrt((count - 1) * values.var(correction=0).item())
