"""What classifiers on frozen features share: standardised features, a held-out part that chooses a setting, few threads.

The classifiers themselves are left out; each stands with its protocol.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from glpretrain.core import keys
from glpretrain.evaluate.features import LabelledFeatures

_SPLIT_SEED = 30
_SMALL = 1 << 24  # 40,000 x 384: two threads took 1.6 times as long as one; 2,000 x 96: 6 times
_MIN_STD = 1e-6  # a collapsed feature is not blown up beyond this


def standardiser(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Brings features to the mean 0 and the deviation 1 that they have over Float[*S D], whatever they are later computed of."""
    axes = tuple(range(rows.dim() - 1))
    mean, std = rows.mean(dim=axes), rows.std(dim=axes).clamp_min(_MIN_STD)
    return lambda features: (features - mean) / std


def held_out_split(count: int, *, ratio: float, seed: int = _SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Positions of the training items that choose, Int[M], and of those that fit, Int[count-M]: fixed and pseudo-random.

    Args:
        count: number of training items.
        ratio: share of them that chooses.
        seed: seed of the split.
    """
    order = keys.permutation(torch.tensor(seed), count)
    num_held_out = round(ratio * count)
    return order[:num_held_out], order[num_held_out:]


def choose_strength(
    train: LabelledFeatures,
    inverse_l2: Sequence[float],
    *,
    held_out_ratio: float,
    predict: Callable[[LabelledFeatures, Tensor, float], Tensor],
) -> float:
    """The candidate with the best accuracy on held-out training items, the strongest penalty on a tie.

    Args:
        train: the training items.
        inverse_l2: candidates for scikit-learn's C; a single one is taken as it is.
        held_out_ratio: share of the training items that chooses.
        predict: fits on some items with a strength, and gives the classes of Float[B D], Int[B].

    Raises:
        ValueError: there are too few items to choose.
    """
    if len(inverse_l2) == 1:
        return inverse_l2[0]
    held_out, fitted = held_out_split(len(train.labels), ratio=held_out_ratio)
    part, queries = train.at(fitted), train.at(held_out)
    if len(held_out) == 0 or len(part.labels.unique()) < 2:
        raise ValueError(f"train: {len(train.labels)} labelled items are too few to choose among inverse_l2 {list(inverse_l2)}; give one")
    rates = {value: (predict(part, queries.cls, value) == queries.labels).float().mean().item() for value in sorted(inverse_l2)}
    return max(rates, key=lambda value: rates[value])


@contextmanager
def small_products(features: Tensor) -> Iterator[None]:
    """One thread for the matrix products on Float[B D], unless they are large: L-BFGS makes so many that starting threads costs more."""
    with threadpool_limits(1 if features.numel() < _SMALL else None, user_api="blas"):
        yield
