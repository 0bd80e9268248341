"""Classes of the pixels of files: read by workers, in the order in which they were given; a file that cannot be read is named.

Left out: what is written of them (`cli`), and predictions of one class for each file (`predicting`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from glpretrain.data.loading import Loader
from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.finetune.model import FineTuned
from glpretrain.finetune.transforms import Transform


class Segmented(NamedTuple):
    """What a model says of one file."""

    path: Path
    image: Tensor | None  # UInt8[C H W], turned as its EXIF tag says; None where the file cannot be read
    classes: Tensor | None  # Int[H W]; None where the file cannot be read
    reason: str = ""  # why it cannot be read


class _Images(Dataset[Tensor | str]):
    """Images at their own size, or why they cannot be read.

    Args:
        paths: the files.
        transform: the model's, which says how they are read.
    """

    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self._paths, self._transform = paths, transform

    def __getitem__(self, number: int) -> Tensor | str:
        try:
            return self._transform.decoded(self._paths[number])
        except UnreadableItemError as error:
            return str(error)

    def named(self, number: int) -> str:
        """What is read, for messages."""
        return f"predict: {self._paths[number]}"


def segmentations(model: FineTuned, paths: Sequence[Path], *, batch_size: int = 32, num_workers: int = 0) -> Iterator[Segmented]:
    """The classes of the pixels of each file, in the given order.

    Args:
        model: a model for segmentation, on the device that it is to run on.
        paths: image files.
        batch_size: number of windows of an image that are computed at once.
        num_workers: number of processes that read; with 0 this process reads.
    """
    assert isinstance(model.transform, Transform), "a model for segmentation"
    files = _Images(paths, model.transform)
    loader = Loader(files, range(len(paths)), num_workers=num_workers, named=files.named, setting="--num_workers")
    for path, read in zip(paths, loader, strict=True):
        if isinstance(read, str):
            yield Segmented(path, None, None, read)
        else:
            yield Segmented(path, read, model.segment(read, batch_size=batch_size))
