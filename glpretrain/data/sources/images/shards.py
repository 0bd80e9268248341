"""Tar shards in WebDataset's layout, and Hugging Face datasets, as sources.

A shard is a plain tar file. Members with the same stem are one sample: an image and, beside it, `.cls` (an integer) or `.json` (with
a `label`). The headers are read once, when the source is constructed; items are then read at their offset, in any order. Left out:
compressed shards, and URLs.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glpretrain.core.listing import expanded
from glpretrain.data.sources.base import Item, Paths, Source, check_choice, checked_index, label_items
from glpretrain.data.sources.images.decoding import ENDINGS, damage_named, decode_pil

_IMAGE_KINDS = tuple(ending for ending in ENDINGS if ending != ".npy")


class _Member(NamedTuple):
    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


def read_range(file: Path, *, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on."""
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(size)


class TarShards(Source):
    """Images in tar shards.

    Args:
        root: one `.tar` file, or a folder of them.
        channels: number of channels of every item, 1 or 3.

    Raises:
        ValueError: there is no shard or no image in them, a shard is no plain tar file, or only some images have a class.
    """

    accepts = "a .tar file or a folder of them"

    def __init__(self, root: str | Path, *, channels: int = 3) -> None:
        self.root = expanded(root)
        self.name, self.channels = self.root.resolve().stem, channels
        check_choice(channels, (1, 3), what="TarShards: channels")
        shards = [self.root] if self.root.is_file() else sorted(self.root.rglob("*.tar"))
        if not shards:
            raise ValueError(f"TarShards: {self.root} is neither a .tar file nor a folder of .tar files")
        samples = [sample for shard in shards for sample in _index(shard)]
        self._names = Paths(self.root, ((str(image.shard.relative_to(self.root)), (image.name,)) for image, _ in samples))
        self._places = np.array([(image.offset, image.size) for image, _ in samples], dtype=np.int64).reshape(-1, 2)
        if not samples:
            raise ValueError(f"TarShards: no image in the {len(shards)} shards of {self.root}; accepted endings: {' '.join(_IMAGE_KINDS)}")
        labels = [label for _, label in samples]
        self.classes, self._labels = label_items(labels, owner=f"TarShards: {self.root}", key=_numbers_first)

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a tar file, or a folder with some at its top."""
        if path.is_file():
            return path.suffix.lower() == ".tar" or tarfile.is_tarfile(path)
        return any(path.glob("*.tar"))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Item:
        shard, name = self._names.parts(checked_index(index, len(self)))
        member = _Member(self.root / shard, name, *self._places[index].tolist())
        with damage_named(member):
            content = read_range(member.shard, offset=member.offset, size=member.size)
            image = decode_pil(io.BytesIO(content), channels=self.channels, reduced=True)
        return Item(values=image, label=int(self._labels[index]), instances=None, regions=None)

    def _listing(self) -> tuple[object, ...]:
        return self._names.digest(), self._places, self._labels


def _numbers_first(name: str) -> tuple[bool, int, str]:
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


def _index(shard: Path) -> list[tuple[_Member, str | None]]:
    """Image and label of each sample, in the order of the shard."""
    images: dict[str, _Member] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                folder, slash, file = entry.name.rpartition("/")
                if not entry.isfile() or file.startswith("."):
                    continue
                # WebDataset's rule: the name of the sample ends at the first dot of the file name.
                stem, _, ending = file.partition(".")
                member = _Member(shard=shard, name=entry.name, offset=entry.offset_data, size=entry.size)
                sample = folder + slash + stem
                if f".{ending.lower()}".endswith(_IMAGE_KINDS):
                    images[sample] = member
                elif ending in ("cls", "json") and (label := _label(member, ending)) is not None:
                    labels[sample] = label
    except tarfile.TarError as error:
        raise ValueError(f"TarShards: {shard} is not a plain tar file: {error}") from error
    return [(image, labels.get(sample)) for sample, image in images.items()]


def _label(member: _Member, ending: str) -> str | None:
    text = read_range(member.shard, offset=member.offset, size=member.size).decode()
    if ending == "cls":
        return text.strip()
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"TarShards: {member} is not JSON: {error}") from error
    label = values.get("label") if isinstance(values, dict) else None
    return None if label is None else str(label)


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
        checked_index(index, len(self))
        with damage_named(f"{self._path}[{index}]"):
            row = self._rows[index]
            stored = row[self._image]
            if stored is None or (stored["bytes"] is None and stored["path"] is None):
                raise ValueError(f"no image in column {self._image!r}")
            source = Path(stored["path"]) if stored["bytes"] is None else io.BytesIO(stored["bytes"])
            image = decode_pil(source, channels=self._channels, reduced=True)
        label = None if self._label is None else row[self._label]
        return Item(values=image, label=-1 if label is None else label, instances=None, regions=None)
