"""What classifiers on frozen features share: standardised features, a held-out part that chooses a setting, few threads.

The classifiers themselves are left out; each stands with its protocol.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from glpretrain.core import keys
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.rows import LabelledFeatures, Rows

_SPLIT_SEED = 30
_NUM_NAMED = 5
_SMALL = 1 << 24  # 40,000 x 384: two threads took 1.6 times as long as one; 2,000 x 96: 6 times
_SCORES = 1 << 24  # scores of classes at a time
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
        ratio: share of them that chooses; at least one, but not the only one.
        seed: seed of the split.
    """
    order = keys.permutation(torch.tensor(seed), count)
    num_held_out = min(max(1, round(ratio * count)), count - 1)
    return order[:num_held_out], order[num_held_out:]


def dealt(labels: Tensor, groups: Tensor | None, *, seed: int) -> tuple[Tensor, Tensor]:
    """Items class by class in a fixed pseudo-random order, so that parts of them can be made that have every class in its share.

    Args:
        labels: Int[B], classes of the items.
        groups: Int[B], items that must stay together, such as frames of one video; None where each is by itself.
        seed: seed of the order.

    Returns:
        The place of each item's group among those of its class, Int[B] from 0, and how many there are, Int[B]. A group whose items are
        of several classes counts for one of these.
    """
    group = torch.arange(len(labels)) if groups is None else groups.unique(return_inverse=True)[1]
    of_group = torch.zeros(int(group.max()) + 1, dtype=labels.dtype).scatter_(0, group, labels)  # [G]
    order = keys.permutation(torch.tensor(seed), len(of_group))
    order = order[of_group[order].argsort(stable=True)]  # class by class
    counts = of_group.bincount()  # [classes]
    starts = (counts.cumsum(0) - counts)[of_group[order]]  # [G]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - starts
    return place[group], counts[of_group[group]]


def stratified_split(labels: Tensor, groups: Tensor | None, *, ratio: float) -> tuple[Tensor, Tensor]:
    """`held_out_split` with the same share of every class in both parts.

    Args:
        labels: Int[B], classes of the items.
        groups: see `dealt`.
        ratio: share of each class that chooses: at least one group of items, and none where the class has no other.

    Returns:
        Positions of the items that choose, Int[M], and of those that fit, Int[B-M].
    """
    place, count = dealt(labels, groups, seed=_SPLIT_SEED)
    chooses = place < (ratio * count).round().clamp(min=1).minimum(count - 1)
    return chooses.nonzero()[:, 0], (~chooses).nonzero()[:, 0]


def answerable(train: LabelledFeatures, test: LabelledFeatures, sources: Sources) -> tuple[LabelledFeatures, dict[str, str]]:
    """The items of `test` that a classifier which learns from `train` can be asked about: those whose class is there.

    Items that stand in both sources are counted and said once.

    Args:
        train: the items that a classifier learns from.
        test: the items that it could be asked about.
        sources: sources of both, by these roles.

    Returns:
        These items, and for `Result.left_out` the classes that only one source shows, each with the reason.

    Raises:
        ValueError: `train` shows one class only, or `test` none of its classes.
    """
    require_two_classes(train.labels, sources["train"])
    names, known = sources["test"].source.classes, torch.isin(test.labels, train.labels)
    left_out: dict[str, str] = {}
    if not known.all():
        strange = classes_named(test.labels[~known], names)
        left_out[strange] = f"train shows no item of it, so {int((~known).sum())} of {len(known)} items of test are not scored"
        if not known.any():
            raise ValueError(f"{strange}: {left_out[strange]}; give both sources the same classes")
    unseen = train.labels[~torch.isin(train.labels, test.labels)]
    if len(unseen):
        left_out[classes_named(unseen, names)] = "test shows no item of it, so the scores say nothing of it"
    if repeated := int(np.isin(sources["test"].identities(test.index), sources["train"].identities(train.index)).sum()):
        sources["test"].warn(f"test: {repeated} of {len(known)} items are in train as well; scores on them say little")
    return test.at(known), left_out


def require_two_classes(labels: Tensor, items: DecodedItems) -> None:
    """Refuse items, Int[B] of labels, among which there is nothing to tell apart.

    Raises:
        ValueError: they show one class only.
    """
    if len(shown := labels.unique()) < 2:
        name = items.source.classes[int(shown[0])]
        raise ValueError(f"source {items.name!r}: all {len(labels)} labelled items are of the class {name!r}; at least two are needed")


def classes_named(labels: Tensor, names: Sequence[str]) -> str:
    """The classes of Int[M] in a few words, each once: the first of them where they are many."""
    shown = [str(names[label]) for label in labels.unique().tolist()]
    others = f" and {len(shown) - _NUM_NAMED} others" if len(shown) > _NUM_NAMED else ""
    return f"class {', '.join(shown[:_NUM_NAMED])}{others}"


def choose_strength(
    train: LabelledFeatures,
    inverse_l2: Sequence[float],
    *,
    held_out_ratio: float,
    predict: Callable[[LabelledFeatures, Tensor, float], Tensor],
) -> float:
    """The candidate with the best accuracy on held-out training items, the strongest penalty on a tie.

    Args:
        train: the training items, of at least two classes.
        inverse_l2: candidates for scikit-learn's C; a single one is taken as it is.
        held_out_ratio: share of the training items that chooses.
        predict: fits on some items with a strength, and gives the classes of Float[B D], Int[B].

    Raises:
        ValueError: there are too few items to choose.
    """
    if len(inverse_l2) == 1:
        return inverse_l2[0]
    held_out, fitted = stratified_split(train.labels, train.groups, ratio=held_out_ratio)
    part, queries = train.at(fitted), train.at(held_out)
    if len(held_out) == 0:
        raise ValueError(f"train: {len(train.labels)} labelled items are too few to choose among inverse_l2 {list(inverse_l2)}; give one")
    rates = {value: (predict(part, queries.cls, value) == queries.labels).float().mean().item() for value in sorted(inverse_l2)}
    return max(rates, key=lambda value: rates[value])


def in_parts(predict: Callable[[Tensor], Tensor], rows: Tensor, *, num_scores: int) -> Tensor:
    """`predict(rows)`, for a bounded number of rows at a time.

    Args:
        predict: function of some rows Float[M D] to [M *S] on the CPU.
        rows: Float[B D].
        num_scores: how many numbers it computes for a row.
    """
    predicted = Rows(len(rows))
    for part in rows.split(max(1, _SCORES // num_scores)):
        predicted.add(predict(part))
    return predicted.tensors(1)[0]


@contextmanager
def small_products(features: Tensor) -> Iterator[None]:
    """One thread for the matrix products on Float[B D], unless they are large: L-BFGS makes so many that starting threads costs more."""
    with threadpool_limits(1 if features.numel() < _SMALL else None, user_api="blas"):
        yield
