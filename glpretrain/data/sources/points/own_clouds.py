"""The user's own point clouds: a folder of files, or one file of many clouds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from glpretrain.data.sources.base import Item, Paths, Source, check_choice, checked_index
from glpretrain.data.sources.points.clouds import ARRAYS, MESHES, PointSource, cloud_item, read_arrays, read_points, some_of

SplitOrAll = Literal["train", "test", "all"]
SPLITS = ("train", "test", "all")
_TEST_NAMES = ("test", "val")


def _chosen_split(split: SplitOrAll | None, present: Sequence[str], *, owner: str) -> SplitOrAll:
    """The split to read: the given one, or by default `train` where both splits are present, else `all`.

    Raises:
        ValueError: the given one is unknown or not present.
    """
    if split is None:
        return "train" if set(present) == {"train", "test"} else "all"
    check_choice(split, (*present, "all"), what=f"{owner}: split")
    return split


class PointFolder(PointSource):
    """Point clouds and meshes in a folder, with or without classes, with or without `train/` and `test/` (or `val/`).

    A file is `<file>`, `<class>/<file>`, `train/<class>/<file>`, or `<class>/train/<file>` (the layout of ModelNet).

    Args:
        root: path of the folder.
        split: which split is read. When left out, `train` where `test` exists too, and everything otherwise.
        num_points: number of points that are sampled on the surface of a mesh.
        normalise: whether a cloud is centred at its mean and scaled into the unit sphere.

    Raises:
        ValueError: there is no such folder, no file in it, or no such split, or `num_points` is below 1.
    """

    def __init__(self, root: str | Path, *, split: SplitOrAll | None = None, num_points: int = 2048, normalise: bool = True) -> None:
        self.root = Path(root)
        self.name = self.root.name
        if not self.root.is_dir():
            raise ValueError(f"PointFolder: {self.root} is not a folder")
        if num_points < 1:
            raise ValueError(f"PointFolder: num_points is {num_points}; expected at least 1")
        self.num_points, self.normalise = num_points, normalise
        files = sorted(path for path in self.root.rglob("*") if path.is_file() and path.suffix.lower() in ARRAYS + MESHES)
        if not files:
            raise ValueError(f"PointFolder: no point cloud in {self.root}; accepted endings: {' '.join(ARRAYS + MESHES)}")
        placed = [(path, *self._split_and_class(path)) for path in files]
        self._splits = sorted({own for _, own, _ in placed if own})
        self.classes = sorted({label for _, _, label in placed if label})
        chosen = _chosen_split(split, self._splits, owner=f"PointFolder: {self.root}")
        files = [(path.relative_to(self.root), label) for path, own, label in placed if chosen in ("all", own)]
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.paths = Paths.of(self.root, (path for path, _ in files))
        self._labels = np.array([numbers.get(label, -1) for _, label in files], dtype=np.int32)

    def _split_and_class(self, path: Path) -> tuple[str, str]:
        """Names of the split and the class of a file, taken from its folders; empty where there is none."""
        folders = path.relative_to(self.root).parts[:-1]
        splits = [("test" if name in _TEST_NAMES else name) for name in folders if name in ("train", *_TEST_NAMES)]
        classes = [name for name in folders if name not in ("train", *_TEST_NAMES)]
        return splits[0] if splits else "", classes[0] if classes else ""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        path = self.paths[checked_index(index, len(self))]
        label = int(self._labels[index])
        return cloud_item(read_points(path, num_points=self.num_points), label=label, normalise=self.normalise)

    def _listing(self) -> tuple[object, ...]:
        return *super()._listing(), self._labels

    def train_test_split(self) -> tuple[Source, Source] | None:
        if self._splits != ["test", "train"] or not self.classes:
            return None
        options = {"num_points": self.num_points, "normalise": self.normalise}
        return PointFolder(self.root, split="train", **options), PointFolder(self.root, split="test", **options)


class PointArrays(PointSource):
    """Point clouds with equal numbers of points, in one .npz or .h5 file.

    The file holds `points` (or `data`), Float[B P 3+]. It may hold `labels` (or `label`), Int[B], `parts` (or `pid`, `mask`), Int[B P],
    `class_names` and `part_names`. A file with two splits holds the first three with the prefixes `train_` and `test_`.

    Args:
        path: path of the file.
        split: which split is read. When left out, `train` where `test` exists too, and everything otherwise.
        normalise: whether a cloud is centred at its mean and scaled into the unit sphere.

    Raises:
        ValueError: the file cannot be read, has other arrays, or has no such split.
    """

    def __init__(self, path: str | Path, *, split: SplitOrAll | None = None, normalise: bool = True) -> None:
        self.path = Path(path)
        self.name, self.normalise = self.path.stem, normalise
        arrays = read_arrays(self.path)
        self._splits = [own for own in ("train", "test") if _find(arrays, "points", "data", prefix=f"{own}_") is not None]
        chosen = _chosen_split(split, self._splits, owner=f"PointArrays: {self.path}")
        prefixes = [f"{own}_" for own in self._splits if chosen in ("all", own)] or [""]
        points = _joined(arrays, "points", "data", prefixes=prefixes)
        if points is None or points.ndim != 3 or points.shape[2] < 3:
            shape = None if points is None else points.shape
            raise ValueError(f"PointArrays: {self.path}: points of shape {shape}; accepted: (clouds, points, 3); it holds {sorted(arrays)}")
        labels = _joined(arrays, "labels", "label", prefixes=prefixes)
        self.points, self.labels = points, None if labels is None else labels.reshape(-1).astype(np.int64)
        self.semantic = _joined(arrays, "parts", "pid", "mask", prefixes=prefixes)
        self.has_masks = self.semantic is not None
        for name, values in (("labels", self.labels), ("parts", self.semantic)):
            if values is not None and len(values) != len(points):
                raise ValueError(f"PointArrays: {self.path}: {len(values)} {name} for {len(points)} clouds; expected one for each")
        # Taken from the whole file, so that both splits have the same classes even where one lacks some of them.
        everywhere = [f"{own}_" for own in self._splits] or [""]
        self.classes = _names(arrays.get("class_names"), numbers=_joined(arrays, "labels", "label", prefixes=everywhere))
        self.mask_classes = _names(arrays.get("part_names"), numbers=_joined(arrays, "parts", "pid", "mask", prefixes=everywhere))

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

    def _listing(self) -> tuple[object, ...]:
        return self.points.shape, some_of(self.points), self.labels

    def train_test_split(self) -> tuple[Source, Source] | None:
        if self._splits != ["train", "test"] or self.labels is None:
            return None
        train, test = (PointArrays(self.path, split=split, normalise=self.normalise) for split in ("train", "test"))
        return train, test


def _find(arrays: dict[str, np.ndarray], *names: str, prefix: str) -> np.ndarray | None:
    return next((arrays[prefix + name] for name in names if prefix + name in arrays), None)


def _joined(arrays: dict[str, np.ndarray], *names: str, prefixes: Sequence[str]) -> np.ndarray | None:
    """The arrays of one of these names under all prefixes, joined; None where one is missing."""
    found = [array for prefix in prefixes if (array := _find(arrays, *names, prefix=prefix)) is not None]
    return np.concatenate(found) if len(found) == len(prefixes) else None


def _names(names: np.ndarray | None, *, numbers: np.ndarray | None) -> tuple[str, ...]:
    """Names of classes: the given ones, or the numbers themselves; none without numbers."""
    if numbers is None:
        return ()
    if names is not None:
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist())
    return tuple(map(str, range(int(numbers.max()) + 1)))
