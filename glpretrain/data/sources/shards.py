"""Tar shards in WebDataset's layout, and Hugging Face datasets, as sources.

A shard is a plain tar file whose members of equal stem are one sample: an image, and beside it `.cls` (an integer) or `.json` (with
a `label`). Headers are read once when the source is made; items are then read at their offset, in any order. Left out: compressed
shards and addresses on the network.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from glpretrain.data.sources.base import Item, Source, UnreadableItemError, checked_index
from glpretrain.data.sources.images import DAMAGE, ENDINGS, from_pil

_IMAGE_KINDS = tuple(ending for ending in ENDINGS if ending != ".npy")


class _Member(NamedTuple):
    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


class TarShards(Source):
    """Images in tar shards.

    Args:
        root: one `.tar` file, or a folder of them.
        channels: of every item, 1 or 3.

    Raises:
        ValueError: there is no shard or no image in them, a shard is no plain tar file, or only some images have a label.
    """

    def __init__(self, root: str | Path, *, channels: int = 3) -> None:
        self.root = Path(root).expanduser()
        self.channels = channels
        if channels not in (1, 3):
            raise ValueError(f"TarShards: channels is 1 or 3, not {channels}")
        shards = [self.root] if self.root.is_file() else sorted(self.root.rglob("*.tar"))
        if not shards:
            raise ValueError(f"TarShards: {self.root} is no .tar file and no folder of .tar files")
        samples = [sample for shard in shards for sample in _index(shard)]
        self._images = [image for image, _ in samples]
        if not samples:
            raise ValueError(f"TarShards: no image in the {len(shards)} shards of {self.root}; accepted endings: {' '.join(_IMAGE_KINDS)}")
        labelled = [label is not None for _, label in samples]
        if any(labelled) != all(labelled):
            raise ValueError(f"TarShards: {sum(labelled)} of {len(samples)} images in {self.root} have a label; label all or none")
        names = sorted({label for _, label in samples if label is not None}, key=_numbers_first)
        self._classes = names
        positions = {name: position for position, name in enumerate(names)}
        self._labels = [-1 if label is None else positions[label] for _, label in samples]

    @property
    def name(self) -> str:
        return self.root.resolve().stem

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a .tar file, or a folder with some at its top."""
        return path.is_file() or any(path.glob("*.tar"))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Item:
        member = self._images[checked_index(index, len(self))]
        try:
            with Image.open(io.BytesIO(member.read())) as opened:
                image = from_pil(opened, channels=self.channels)
        except DAMAGE as error:
            raise UnreadableItemError(f"{member}: {error}") from error
        return Item(image=image, label=self._labels[index], instances=None, regions=None)


def _numbers_first(name: str) -> tuple[bool, int, str]:
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


def _index(shard: Path) -> list[tuple[_Member, str | None]]:
    """Each sample's image and label, in the order of the shard."""
    images: dict[str, _Member] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                folder, slash, file = entry.name.rpartition("/")
                if not entry.isfile() or file.startswith("."):
                    continue
                # WebDataset's rule: the sample's name ends at the first dot of the file's name.
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
    text = member.read().decode()
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
        path: a folder written by `save_to_disk`, or anything that `datasets.load_dataset` accepts.
        split: part of the dataset.
        image: name of the column of images.
        label: name of the column of classes; left out when the dataset has none.
        channels: of every item, 1 or 3.

    Raises:
        ImportError: the package `datasets` is not installed.
        ValueError: there is no such split or column.
    """

    def __init__(self, path: str, *, split: str = "train", image: str = "image", label: str | None = None, channels: int = 3) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("HuggingFaceImages needs the package datasets: pip install 'glpretrain[huggingface]'") from error
        if channels not in (1, 3):
            raise ValueError(f"HuggingFaceImages: channels is 1 or 3, not {channels}")
        folder = Path(path).expanduser()
        saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(path)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"HuggingFaceImages: {path} has no split {split!r}; it has {sorted(loaded)}")
            loaded = loaded[split]
        for column in (image, label):
            if column is not None and column not in loaded.column_names:
                raise ValueError(f"HuggingFaceImages: {path} has no column {column!r}; it has {loaded.column_names}")
        # Undecoded, so that a damaged image is met here, under its own number.
        self._rows = loaded.cast_column(image, datasets.Image(decode=False))
        self._image = image
        self._label = label
        self._path = path
        self._channels = channels
        self._classes = []
        if label is not None:
            feature = loaded.features[label]
            if not isinstance(feature, datasets.ClassLabel):
                raise ValueError(f"HuggingFaceImages: column {label!r} of {path} holds {feature}; a ClassLabel is needed")
            self._classes = feature.names

    @property
    def name(self) -> str:
        return Path(self._path).name

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        row = self._rows[checked_index(index, len(self))]
        stored = row[self._image]
        try:
            with Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])) as opened:
                image = from_pil(opened, channels=self._channels)
        except DAMAGE as error:
            raise UnreadableItemError(f"{self._path}[{index}]: {error}") from error
        return Item(image=image, label=-1 if self._label is None else row[self._label], instances=None, regions=None)
