"""`Episode`: n classes of another source with k training items each, for few-shot fine-tuning.

Reference code: Pang-Yatian/Point-MAE at 7445a68 (datasets/generate_few_shot_data.py), whose ten folds are pickles and are not read; ours
are drawn from keys. `evaluate.Episodes` scores frozen features on episodes.
"""

from collections.abc import Sequence

import torch

from glpretrain.core import keys
from glpretrain.data.own import train_test_parts
from glpretrain.data.sources.base import Item, Source, UnreadableItemError, checked_index

_SEED = 0xE915


class Episode(Source):
    """The training items of an episode; its test items are `train_test_split()[1]`. A function of (way, shot, fold).

    Args:
        source: source of the items, with classes; its own training and test parts, or else a fixed fifth, are drawn from.
        way: number of classes.
        shot: number of training items of each class.
        fold: number of the draw.
        num_queries: number of test items of each class, at most.

    Raises:
        ValueError: a number is out of range, or a class that is drawn has too few items.
    """

    def __init__(self, source: Source, *, way: int, shot: int, fold: int = 0, num_queries: int = 20) -> None:
        if not 2 <= way <= len(source.classes) or min(shot, num_queries) < 1 or fold < 0:
            given = f"way={way}, shot={shot}, num_queries={num_queries} and fold={fold}"
            accepted = f"2 to {len(source.classes)} classes of {source.name}, at least 1 item, and folds from 0 on"
            raise ValueError(f"Episode: {given} given; accepted: {accepted}")
        key = torch.tensor(_SEED)
        for number in (way, shot, fold):
            key = keys.fold_in(key, number)
        drawn: list[int] = keys.permutation(keys.fold_in(key, 0), len(source.classes))[:way].tolist()
        train, test = train_test_parts(source)
        self.name = f"{source.name} {way}-way {shot}-shot {fold}"
        self.classes = [source.classes[label] for label in drawn]
        support = _found(train, drawn, count=shot, key=keys.fold_in(key, 1))
        if short := [name for name, own in zip(self.classes, support, strict=True) if len(own) < shot]:
            raise ValueError(f"Episode: shot={shot} given; {train.name} has fewer readable training items of {', '.join(short)}")
        queries = _found(test, drawn, count=num_queries, key=keys.fold_in(key, 2))
        self._train, self._test = _Some(train, self, support), _Some(test, self, queries)

    @property
    def modality(self) -> str:
        return self._train.modality

    def __len__(self) -> int:
        return len(self._train)

    def __getitem__(self, index: int) -> Item:
        return self._train[index]

    def train_test_split(self) -> tuple[Source, Source]:
        return self._train, self._test

    def _listing(self) -> tuple[object, ...]:
        return self._train.fingerprint(), self._test.fingerprint()


class _Some(Source):
    """Items of another source with other numbers of their classes.

    Args:
        source: source of the items.
        episode: what has the name and the classes.
        indices: dataset indices in `source`, for each class of the episode.
    """

    def __init__(self, source: Source, episode: Episode, indices: Sequence[Sequence[int]]) -> None:
        self.source, self.name, self.classes = source, episode.name, episode.classes
        self._indices = [index for own in indices for index in own]
        self._labels = [label for label, own in enumerate(indices) for _ in own]

    @property
    def modality(self) -> str:
        return self.source.modality

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Item:
        place = checked_index(index, len(self))
        return self.source[self._indices[place]]._replace(label=self._labels[place])

    def named(self, index: int) -> str:
        return self.source.named(self._indices[checked_index(index, len(self))])

    def _listing(self) -> tuple[object, ...]:
        return self.source.fingerprint(), self._indices, self._labels


def _found(source: Source, drawn: Sequence[int], *, count: int, key: torch.Tensor) -> list[list[int]]:
    """Dataset indices of up to `count` readable items of each of the labels `drawn`, in their order."""
    found: dict[int, list[int]] = {label: [] for label in drawn}
    for index in keys.permutation(key, len(source)).tolist():
        try:
            own = found.get(source.label_of(index))
        except UnreadableItemError:
            continue
        if own is not None and len(own) < count:
            own.append(index)
            if all(len(some) == count for some in found.values()):
                break
    return [found[label] for label in drawn]
