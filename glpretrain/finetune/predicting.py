"""Predictions for files: read by workers, in batches, in the order in which the files were given; a file that cannot be read is named.

Left out: what is written of them (`cli`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from glpretrain.data.loading import Loader
from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.finetune.item_transforms import AnyTransform
from glpretrain.finetune.model import FineTuned


class Predicted(NamedTuple):
    """What a model says of one file."""

    path: Path
    probabilities: Tensor | None  # Float[K *S]; None where the file cannot be read
    reason: str = ""  # why it cannot be read


class _Read(NamedTuple):
    items: Tensor  # Float[B *item] of the files that can be read
    reasons: dict[int, str]  # of the others, by their number


class _Files(Dataset[_Read]):
    """Files as a model takes them.

    Args:
        paths: the files.
        transform: what is done to an item.
    """

    def __init__(self, paths: Sequence[Path], transform: AnyTransform) -> None:
        self._paths, self._transform = paths, transform

    def __getitem__(self, numbers: Sequence[int]) -> _Read:
        items: list[Tensor] = []
        reasons: dict[int, str] = {}
        for number in numbers:
            try:
                items.append(self._transform.read(self._paths[number]))
            except UnreadableItemError as error:
                reasons[number] = str(error)
        return _Read(torch.stack(items) if items else torch.empty(0), reasons)

    def named(self, numbers: Sequence[int]) -> str:
        """What a batch reads, for messages."""
        return f"predict: files from {self._paths[numbers[0]]} on"


def predictions(model: FineTuned, paths: Sequence[Path], *, batch_size: int = 64, num_workers: int = 0) -> Iterator[Predicted]:
    """What the model says of each file, in the given order.

    Args:
        model: the model, on the device that it is to run on.
        paths: files of images, clouds or sounds, as the model takes them.
        batch_size: number of files that are computed at once.
        num_workers: number of processes that read; with 0 this process reads.
    """
    order = [range(start, min(start + batch_size, len(paths))) for start in range(0, len(paths), batch_size)]
    files = _Files(paths, model.transform)
    loader = Loader(files, order, num_workers=num_workers, named=files.named, setting="--num_workers")
    for numbers, (items, reasons) in zip(order, loader, strict=True):
        probabilities = iter(model.predict(items)) if len(items) else iter(())
        for number in numbers:
            if number in reasons:
                yield Predicted(paths[number], None, reasons[number])
            else:
                yield Predicted(paths[number], next(probabilities))
