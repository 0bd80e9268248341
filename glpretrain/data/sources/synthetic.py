"""Items that are made and not read: what the embedded sources have in common."""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.data.sources.base import Source

_TRAIN, _TEST = 2400, 1200  # of `train_test_split`


class SyntheticSource(Source):
    """Labelled items with masks that are made and not read, as many as are wanted: each is a function of seed, split and index.

    Args:
        length: number of items.
        split: `train` or `test`.
        seed: of all items.

    Raises:
        ValueError: `length` is too small, or `split` is unknown.
    """

    def __init__(self, length: int, *, split: Literal["train", "test"], seed: int) -> None:
        if length < 1:
            raise ValueError(f"{type(self).__name__}: length is {length}; expected at least 1")
        if split not in ("train", "test"):
            raise ValueError(f"{type(self).__name__}: split is {split!r}; expected 'train' or 'test'")
        self.length, self.split, self.seed = length, split, seed

    @property
    def has_masks(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.length

    def train_test_split(self) -> tuple[Source, Source]:
        return self.part(min(self.length, _TRAIN), split="train"), self.part(_TEST, split="test")

    @abstractmethod
    def part(self, length: int, *, split: Literal["train", "test"]) -> Source:
        """Other items of the same kind."""

    def key(self, index: int) -> Tensor:
        """See `item_key`."""
        return item_key(self.seed, self.split, index)


def item_key(seed: int, split: Literal["train", "test"], index: int) -> Tensor:
    """Key of everything that is drawn for one item, Int[]."""
    return keys.item_keys(seed=seed, epoch=("train", "test").index(split), index=torch.tensor(index))
