"""The user's own clouds: a folder of files, or one file of many clouds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from glpretrain.data.sources.base import Item, Source, checked_index
from glpretrain.data.sources.clouds import PointSource, cloud_item
from glpretrain.data.sources.point_files import ARRAYS, MESHES, read_arrays, read_points

Split = Literal["train", "test", "all"]
_TEST_NAMES = ("test", "val")


def check_split(split: str | None, *, owner: str) -> None:
    """Say what a split is called; None leaves it to the source.

    Raises:
        ValueError: it is called otherwise.
    """
    if split not in ("train", "test", "all", None):
        raise ValueError(f"{owner}: split is {split!r}; expected 'train', 'test' or 'all'")


class PointFolder(PointSource):
    """Clouds and meshes in a folder: in class folders, in train/ beside test/ (or val/) or below them, or without classes.

    `<class>/<file>`, `train/<class>/<file>` and `<class>/train/<file>` (ModelNet's own) are told apart by their names.

    Args:
        root: the folder.
        split: part of a divided folder. Left out: `train` where there is `test` too, else everything.
        num_points: sampled on a mesh's surface.
        normalise: move a cloud to its mean and scale it into the unit sphere.

    Raises:
        ValueError: there is no such folder, or no file in it, or parts are asked for that it has not.
    """

    def __init__(self, root: str | Path, *, split: Split | None = None, num_points: int = 2048, normalise: bool = True) -> None:
        check_split(split, owner="PointFolder")
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"PointFolder: {self.root} is no folder")
        if num_points < 1:
            raise ValueError(f"PointFolder: num_points is {num_points}; expected at least 1")
        self.split, self.num_points, self.normalise = split, num_points, normalise
        files = sorted(path for path in self.root.rglob("*") if path.is_file() and path.suffix.lower() in ARRAYS + MESHES)
        if not files:
            raise ValueError(f"PointFolder: {self.root} has no {', '.join(ARRAYS + MESHES)}")
        placed = [(path, *self._place(path)) for path in files]  # path, part, class
        self._parts = {part for _, part, _ in placed if part}
        self._classes = tuple(sorted({label for _, _, label in placed if label}))
        if split not in ("all", None) and split not in self._parts:
            raise ValueError(f"PointFolder: {self.root} has no {split} part; it has {sorted(self._parts) or 'no parts'}")
        self._divided = self._parts == {"train", "test"}
        taken = split or ("train" if self._divided else "all")
        self._files = [(path, label) for path, part, label in placed if taken in ("all", part)]

    def _place(self, path: Path) -> tuple[str, str]:
        """Part and class that the folders of a file name, empty where they name none."""
        folders = path.relative_to(self.root).parts[:-1]
        parts = [("test" if name in _TEST_NAMES else name) for name in folders if name in ("train", *_TEST_NAMES)]
        classes = [name for name in folders if name not in ("train", *_TEST_NAMES)]
        return parts[0] if parts else "", classes[0] if classes else ""

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Item:
        path, label = self._files[checked_index(index, len(self))]
        number = self._classes.index(label) if label else -1
        return cloud_item(read_points(path, num_points=self.num_points), label=number, normalise=self.normalise)

    def train_test_split(self) -> tuple[Source, Source] | None:
        if not self._divided or not self._classes:
            return None
        options = {"num_points": self.num_points, "normalise": self.normalise}
        return PointFolder(self.root, split="train", **options), PointFolder(self.root, split="test", **options)


class PointArrays(PointSource):
    """Clouds of equal numbers of points that lie in one .npz or .h5 file.

    The file holds `points` (or `data`), Float[B P 3+], and perhaps `labels` (or `label`), Int[B], `parts` (or `pid`, `mask`), Int[B P],
    and `class_names`; or, with two parts in one file, all of these behind `train_` and `test_`, except `class_names`.

    Args:
        path: of the file.
        split: part of a divided file. Left out: `train` where there is `test` too, else everything.
        normalise: move a cloud to its mean and scale it into the unit sphere.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """

    def __init__(self, path: str | Path, *, split: Split | None = None, normalise: bool = True) -> None:
        check_split(split, owner="PointArrays")
        self.path = Path(path)
        self.split, self.normalise = split, normalise
        arrays = read_arrays(self.path)
        self._parts = [part for part in ("train", "test") if _find(arrays, "points", "data", prefix=f"{part}_") is not None]
        if split not in ("all", None) and split not in self._parts:
            raise ValueError(f"PointArrays: {self.path} has no {split} part; it holds {sorted(arrays)}")
        taken = split or ("train" if self._parts == ["train", "test"] else "all")
        prefixes = [f"{part}_" for part in self._parts if taken in ("all", part)] or [""]
        self.points = _joined(arrays, "points", "data", prefixes=prefixes)
        if self.points is None or self.points.ndim != 3 or self.points.shape[2] < 3:
            shape = None if self.points is None else self.points.shape
            raise ValueError(f"PointArrays: {self.path}: points of shape {shape}; accepted: (clouds, points, 3); it holds {sorted(arrays)}")
        labels = _joined(arrays, "labels", "label", prefixes=prefixes)
        self.labels = None if labels is None else labels.reshape(-1).astype(np.int64)
        self.semantic = _joined(arrays, "parts", "pid", "mask", prefixes=prefixes)
        for name, values in (("labels", self.labels), ("parts", self.semantic)):
            if values is not None and len(values) != len(self.points):
                raise ValueError(f"PointArrays: {self.path}: {len(values)} {name} for {len(self.points)} clouds")
        # Of the whole file: both parts have the same classes, whichever of them occur.
        everywhere = [f"{part}_" for part in self._parts] or [""]
        self._classes = _names(arrays.get("class_names"), numbers=_joined(arrays, "labels", "label", prefixes=everywhere))
        self._mask_classes = _names(arrays.get("part_names"), numbers=_joined(arrays, "parts", "pid", "mask", prefixes=everywhere))

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    @property
    def has_masks(self) -> bool:
        return self.semantic is not None

    @property
    def mask_classes(self) -> Sequence[str]:
        return self._mask_classes

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a file."""
        return path.is_file()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Item:
        checked_index(index, len(self))
        semantic = instances = None
        if self.semantic is not None:
            semantic = torch.from_numpy(self.semantic[index].astype(np.int64))  # [P]
            instances = torch.where(semantic < 0, 0, 1 + semantic.clamp(min=0).unique(return_inverse=True)[1])
        label = -1 if self.labels is None else int(self.labels[index])
        return cloud_item(self.points[index], label=label, normalise=self.normalise, instances=instances, semantic=semantic)

    def train_test_split(self) -> tuple[Source, Source] | None:
        if self._parts != ["train", "test"] or self.labels is None:
            return None
        train, test = (PointArrays(self.path, split=split, normalise=self.normalise) for split in ("train", "test"))
        return train, test


def _find(arrays: dict[str, np.ndarray], *names: str, prefix: str) -> np.ndarray | None:
    return next((arrays[prefix + name] for name in names if prefix + name in arrays), None)


def _joined(arrays: dict[str, np.ndarray], *names: str, prefixes: Sequence[str]) -> np.ndarray | None:
    found = [_find(arrays, *names, prefix=prefix) for prefix in prefixes]
    return None if any(part is None for part in found) else np.concatenate(found)


def _names(names: np.ndarray | None, *, numbers: np.ndarray | None) -> tuple[str, ...]:
    """Given names, or the numbers themselves."""
    if numbers is None:
        return ()
    if names is not None:
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist())
    return tuple(map(str, range(int(numbers.max()) + 1)))
