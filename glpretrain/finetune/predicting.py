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
from glpretrain.data.sources.images.decoding import MOST_SIDE, decode
from glpretrain.finetune.model import FineTuned
from glpretrain.finetune.transforms import Transform


class Predicted(NamedTuple):
    """What a model says of one file."""

    path: Path
    probabilities: Tensor | None  # Float[K *S]; None where the file cannot be read
    reason: str = ""  # why it cannot be read


class _Read(NamedTuple):
    images: Tensor  # Float[B C H W] of the files that can be read
    reasons: dict[int, str]  # of the others, by their number


class _Files(Dataset[_Read]):
    """Files as a model takes them.

    Args:
        paths: the files.
        transform: what is done to a picture.
    """

    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self._paths, self._transform = paths, transform

    def __getitem__(self, numbers: Sequence[int]) -> _Read:
        images: list[Tensor] = []
        reasons: dict[int, str] = {}
        channels = len(self._transform.mean)
        for number in numbers:
            try:
                images.append(self._transform(decode(self._paths[number], channels=channels, side=MOST_SIDE)))
            except UnreadableItemError as error:
                reasons[number] = str(error)
        return _Read(torch.stack(images) if images else torch.empty(0), reasons)

    def named(self, numbers: Sequence[int]) -> str:
        """What a batch reads, for messages."""
        return f"predict: files from {self._paths[numbers[0]]} on"


def predictions(model: FineTuned, paths: Sequence[Path], *, batch_size: int = 64, num_workers: int = 0) -> Iterator[Predicted]:
    """What the model says of each file, in the given order.

    Args:
        model: the model, on the device that it is to run on.
        paths: image files.
        batch_size: number of files that are computed at once.
        num_workers: number of processes that read; with 0 this process reads.
    """
    order = [range(start, min(start + batch_size, len(paths))) for start in range(0, len(paths), batch_size)]
    files = _Files(paths, model.transform)
    loader = Loader(files, order, num_workers=num_workers, named=files.named, setting="--num_workers")
    for numbers, (images, reasons) in zip(order, loader, strict=True):
        probabilities = iter(model.predict(images)) if len(images) else iter(())
        for number in numbers:
            if number in reasons:
                yield Predicted(paths[number], None, reasons[number])
            else:
                yield Predicted(paths[number], next(probabilities))
