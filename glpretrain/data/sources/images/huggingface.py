"""Images of Hugging Face datasets. How a column is read is told in `data.sources.huggingface`."""

import io
from pathlib import Path

from glpretrain.data.sources.base import Item, Source, check_choice
from glpretrain.data.sources.huggingface import Column
from glpretrain.data.sources.images.decoding import ENDINGS, MOST_SIDE, damage_named, decode_pil
from glpretrain.data.sources.kinds import FileKind

_KIND = FileKind("HuggingFaceImages", "image", ENDINGS)


class HuggingFaceImages(Source):
    """A column of images of a Hugging Face dataset. Needs the extra `huggingface`.

    Args:
        path: a folder that `save_to_disk` wrote, or anything that `datasets.load_dataset` accepts.
        split: name of the split.
        image: name of the column of images.
        label: name of the column of classes; None where the dataset has none.
        channels: number of channels of every item, 1 or 3.

    Raises:
        ImportError: the package `datasets` is not installed.
        ValueError: there is no such split or column.
    """

    def __init__(self, path: str, *, split: str = "train", image: str = "image", label: str | None = None, channels: int = 3) -> None:
        check_choice(channels, (1, 3), what="HuggingFaceImages: channels")
        self._column = Column(path, _KIND, feature="Image", split=split, column=image, label=label)
        self.name, self.classes, self._channels = self._column.name, self._column.classes, channels

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> Item:
        return self.reduced(index, side=MOST_SIDE)

    def reduced(self, index: int, *, side: int) -> Item:
        with damage_named(self._column.named(index)):
            file, label = self._column.row(index)
            opened = io.BytesIO(file.content) if file.content is not None else Path(str(file.path))
            image = decode_pil(opened, channels=self._channels, side=side)
        return Item(values=image, label=label, instances=None, regions=None)
