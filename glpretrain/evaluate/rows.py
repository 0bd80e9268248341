"""One row of features per item: rows of labelled items, how they are collected, and which are refused.

How items are encoded is left out (`features`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from glpretrain.evaluate.items import DecodedItems
from glpretrain.evaluate.metrics.roc import numbered
from glpretrain.evaluate.reading import ItemBatch

Element = TypeVar("Element")


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """One row per item that has a label."""

    cls: Tensor  # Float[B D]
    labels: Tensor  # Int[B]
    index: Tensor  # Int[B]  dataset index
    groups: Tensor | None = None  # Int[B]  which rows belong together, such as frames of one video; None where all are independent

    def at(self, positions: Tensor) -> "LabelledFeatures":
        """Some of the rows, by position or by Bool[B]."""
        groups = None if self.groups is None else self.groups[positions]
        return LabelledFeatures(self.cls[positions], self.labels[positions], self.index[positions], groups)

    def to(self, device: torch.device) -> "LabelledFeatures":
        """The same rows on a device."""
        groups = None if self.groups is None else self.groups.to(device)
        return LabelledFeatures(self.cls.to(device), self.labels.to(device), self.index.to(device), groups)

    def with_cls(self, cls: Tensor) -> "LabelledFeatures":
        """The same items with other rows, Float[B D]."""
        return replace(self, cls=cls)


class Rows:
    """Rows that come a part at a time, in tensors that are made once: small ones between large ones that are freed would keep the memory of
    these from being used again.

    Args:
        at_most: number of rows at most.
    """

    def __init__(self, at_most: int) -> None:
        self._at_most, self._count = at_most, 0
        self._columns: list[Tensor] = []

    def add(self, *columns: Tensor) -> None:
        """Add [B *S] to each column; all calls give the same number of them."""
        if not self._columns:
            self._columns = [column.new_empty(self._at_most, *column.shape[1:]) for column in columns]
        start, self._count = self._count, self._count + len(columns[0])
        for whole, part in zip(self._columns, columns, strict=True):
            whole[start : self._count] = part

    def tensors(self, num_columns: int) -> list[Tensor]:
        """The columns; empty ones where nothing was added."""
        return [column[: self._count] for column in self._columns] or [torch.empty(0, dtype=torch.int64)] * num_columns


def labelled_rows(
    batches: Iterable[tuple[ItemBatch, Element]], rows: Callable[[Element], Tensor], *, items: DecodedItems
) -> LabelledFeatures:
    """A row for every item that has a label, on the CPU.

    Args:
        batches: each batch with what its rows are made of.
        rows: function of that to Float[B D].
        items: the items that the batches are of.

    Raises:
        ValueError: no item has a label, or a number is not finite.
    """
    collected = Rows(len(items))
    for batch, output in batches:
        labelled = batch.labels >= 0
        collected.add(rows(output)[labelled], batch.labels[labelled], batch.index[labelled])
    found = LabelledFeatures(*collected.tensors(3))
    if len(found.labels) == 0:
        raise ValueError(f"source {items.name!r}: no item has a label; this evaluator needs labels")
    require_finite(found.cls, found.index, what=f"source {items.name!r}: the features")
    names = items.source.groups
    if not names:
        return found
    return replace(found, groups=numbered([str(names[index]) for index in found.index.tolist()], count=len(found.index)))


def require_finite(features: Tensor, index: Tensor, *, what: str) -> None:
    """Refuse features that are not numbers.

    Args:
        features: Float[B *S], what an encoder makes of items.
        index: Int[B], dataset index of each item, or time of each frame.
        what: whose features they are, for the message.

    Raises:
        ValueError: a number is not finite. The message names the items, or the backbone where it is all of them.
    """
    lost = index[~features.flatten(1).isfinite().all(dim=1)].tolist()
    if len(lost) == len(index) > 0:
        raise ValueError(f"{what} are not finite for any of {len(index)} items; give a backbone whose weights are finite")
    if lost:
        others = f" and {len(lost) - 1} others" if len(lost) > 1 else ""
        raise ValueError(f"{what} are not finite for item {lost[0]}{others}, of {len(index)} items; give a source without such items")
