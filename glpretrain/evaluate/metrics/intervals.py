"""How sure a number is: 95 % intervals of rates, means and whatever is computed from sums over images.

Scores are made here as well, each with the ends of its interval. Things that come in groups (objects of one image, frames of one video)
tell less than as many independent ones: an interval treats the groups as what was drawn.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.evaluate.base import Score
from glpretrain.evaluate.rows import Rows

Z95 = 1.959964  # two-sided 95 % of the standard normal
_BOOTSTRAP_SEED = 60
_NUM_RESAMPLES = 200
_DRAWS = 1 << 19  # at a time: the keys that they are made from take some 60 bytes each


def rate_interval(rate: float, *, count: float) -> tuple[float, float]:
    """Ends of Wilson's 95 % interval of a rate in [0, 1]: unlike the plain normal one it stays inside, and has a width at 0 and 1."""
    shrinkage = 1 + Z95**2 / count
    centre = (rate + Z95**2 / (2 * count)) / shrinkage
    half_width = Z95 * math.sqrt(rate * (1 - rate) / count + Z95**2 / (4 * count**2)) / shrinkage
    return max(0.0, min(rate, centre - half_width)), min(1.0, max(rate, centre + half_width))


def mean_interval(values: Tensor, groups: Tensor | None = None) -> float:
    """Half-width of the normal 95 % interval of a mean.

    Args:
        values: Float[B], observations.
        groups: Int[B], which observations belong together and may resemble each other; None where all are independent.

    Returns:
        Infinity for a single value, or a single group.
    """
    residuals = values - values.mean()
    if groups is not None:
        residuals = residuals.new_zeros(int(groups.max()) + 1).index_add_(0, groups, residuals)[groups.unique()]
    count = len(residuals)
    return math.inf if count < 2 else Z95 * math.sqrt(residuals.square().sum().item() * count / (count - 1)) / len(values)


def interval_score(value: float, half_width: float, *, count: int, bounds: tuple[float, float] = (0.0, 100.0)) -> Score:
    """A score whose interval reaches equally far to both sides, as far as there are such values.

    Args:
        value: value of the score.
        half_width: half-width of the interval in the unit of the value; infinity where a single observation gives none.
        count: number of things that the score is computed from.
        bounds: smallest and largest value that the score can have.
    """
    if not math.isfinite(half_width):
        return Score(value, None, None, count)
    return Score(value, max(min(bounds[0], value), value - half_width), min(max(bounds[1], value), value + half_width), count)


def mean_of_scores(scores: Sequence[Score], *, count: int) -> Score:
    """The mean of independent scores of a few fixed classes or sets; each end lies as far away as the ends of all together say.

    Args:
        scores: scores that are averaged.
        count: number of things that they are computed from.
    """
    mean = sum(score.value for score in scores) / len(scores)
    below = [score.value - score.low for score in scores if score.low is not None]
    above = [score.high - score.value for score in scores if score.high is not None]
    if len(below) < len(scores):
        return Score(mean, None, None, count)
    return Score(mean, mean - math.hypot(*below) / len(scores), mean + math.hypot(*above) / len(scores), count)


def rate_score(hits: Tensor, groups: Tensor | None = None) -> Score:
    """The share of ones in Float[B] of zeros and ones, in percent, with Wilson's interval.

    Where some of them belong together (`groups`, Int[B]), the interval is that of as many independent ones as vary like these; of as many
    as there are groups where all are the same.
    """
    rate, count = hits.mean().item(), float(len(hits))
    if groups is not None:
        num_groups, error = len(groups.unique()), mean_interval(hits.double(), groups) / Z95
        known = 0.0 < rate < 1.0 and 0.0 < error < math.inf
        count = min(count, max(1.0, rate * (1 - rate) / error**2)) if known else float(num_groups)
    low, high = rate_interval(rate, count=count)
    return Score(100 * rate, 100 * low, 100 * high, len(hits))


def accuracy(predicted: Tensor, labels: Tensor, groups: Tensor | None = None) -> Score:
    """Share of Int[B] that equals Int[B], in percent; interval and `groups` as in `rate_score`."""
    return rate_score((predicted == labels).float(), groups)


def mean_score(values: Tensor, groups: Tensor | None = None) -> Score:
    """Mean of shares in [0, 1], Float[B], in percent; interval and `groups` as in `mean_interval`."""
    return interval_score(100 * values.mean().item(), 100 * mean_interval(values, groups), count=len(values))


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
    values = Rows(_NUM_RESAMPLES)
    for counts in drawn_counts(count):
        values.add(statistic((counts.to(parts.dtype) @ parts.flatten(1)).unflatten(1, parts.shape[1:])))
    return spread_interval(*values.tensors(1))


def drawn_counts(count: int, *, spread_over: int = 0) -> Iterator[Tensor]:
    """How often each of `count` observations is drawn when as many are drawn with replacement, 200 times.

    Args:
        count: number of observations, or of groups of them.
        spread_over: number of members of all groups, if each count is handed on to the members of its group.

    Yields:
        Float[R count] for some of the 200 times, all in one where observations are few.
    """
    at_once = max(1, _DRAWS // max(count, spread_over))
    for start in range(0, _NUM_RESAMPLES, at_once):
        shape = min(at_once, _NUM_RESAMPLES - start), count
        draws = keys.integers(torch.tensor(_BOOTSTRAP_SEED), 0, count, *shape, first=start * count)
        yield torch.zeros(shape).scatter_add_(1, draws, torch.ones(shape))


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
