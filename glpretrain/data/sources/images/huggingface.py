"""Hugging Face datasets as sources. Left out: how they are downloaded and kept, which is the package's."""

import io
from pathlib import Path

from glpretrain.core.listing import expanded
from glpretrain.data.sources.base import Item, Source, check_choice, checked_index
from glpretrain.data.sources.images.decoding import MOST_SIDE, damage_named, decode_pil


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
        try:
            import datasets  # pyright: ignore[reportMissingImports]  # an optional extra
        except ImportError as error:
            raise ImportError("HuggingFaceImages needs the package datasets: pip install 'glpretrain[huggingface]'") from error
        check_choice(channels, (1, 3), what="HuggingFaceImages: channels")
        folder = expanded(path)
        saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(path)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"HuggingFaceImages: {path} has no split {split!r}; it has {sorted(loaded)}")
            loaded = loaded[split]
        for column in (image, label):
            if column is not None and column not in loaded.column_names:
                raise ValueError(f"HuggingFaceImages: {path} has no column {column!r}; it has {loaded.column_names}")
        kind = loaded.features[image]
        if not isinstance(kind, datasets.Image | datasets.Value):
            raise ValueError(f"HuggingFaceImages: column {image!r} of {path} holds {kind}; expected one image per row")
        # Not decoded by the package, so that a damaged image fails here and the error names its index.
        self._rows = loaded.cast_column(image, datasets.Image(decode=False))
        self._image, self._label, self._path, self._channels = image, label, path, channels
        self.name = folder.name
        if label is not None:
            feature = loaded.features[label]
            if not isinstance(feature, datasets.ClassLabel):
                raise ValueError(f"HuggingFaceImages: column {label!r} of {path} holds {feature}; expected a ClassLabel")
            self.classes = feature.names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        return self.reduced(index, side=MOST_SIDE)

    def reduced(self, index: int, *, side: int) -> Item:
        checked_index(index, len(self))
        with damage_named(f"{self._path}[{index}]"):
            row = self._rows[index]
            stored = row[self._image]
            if stored is None or (stored["bytes"] is None and stored["path"] is None):
                raise ValueError(f"no image in column {self._image!r}")
            source = Path(stored["path"]) if stored["bytes"] is None else io.BytesIO(stored["bytes"])
            image = decode_pil(source, channels=self._channels, side=side)
        label = None if self._label is None else row[self._label]
        return Item(values=image, label=-1 if label is None else label, instances=None, regions=None)
