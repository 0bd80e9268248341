"""The user's own point clouds: a folder of files, or one file of many clouds."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np
import torch

from glpretrain.core.listing import LEFTOVERS, Run, State, Walk, count_kinds, expanded, say_once
from glpretrain.data.sources.base import Item, Source, checked_index
from glpretrain.data.sources.divisions import SplitOrAll, chosen_split, divided
from glpretrain.data.sources.paths import Paths
from glpretrain.data.sources.points.arrays import TEXTS, first_numbers, read_arrays
from glpretrain.data.sources.points.clouds import ARRAYS, MESHES, PointSource, cloud_item, read_points, some_of
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of

_MOST_CLASSES = 2**16
_ENDINGS = frozenset(ARRAYS + MESHES)
_RULES = f"clouds {' '.join((*ARRAYS, *MESHES, *TEXTS, *sorted(LEFTOVERS)))}"  # what a listing of clouds depends on
_LEAST = 100_000  # clouds, which are found in a second


class PointFolder(PointSource):
    """Point clouds and meshes in a folder, with or without classes, with or without `train/` and `test/` (or `val/`, `validation/`).

    A file is `<file>`, `<class>/<file>`, `train/<class>/<file>`, or `<class>/train/<file>` (the layout of ModelNet). A text file is a cloud
    if its first line begins with three numbers. One line in the log counts the files that are left out.

    Args:
        root: path of the folder.
        split: which split is read. When left out, `train` where `test` exists too, and everything otherwise.
        num_points: number of points that are sampled on the surface of a mesh.
        normalise: whether a cloud is centred at its mean and scaled into the unit sphere.

    Raises:
        ValueError: there is no such folder, no file in it, or no such split, or `num_points` is below 1.
    """

    def __init__(self, root: str | Path, *, split: SplitOrAll | None = None, num_points: int = 2048, normalise: bool = True) -> None:
        self.root = expanded(root)
        self.name = self.root.resolve().name
        if not self.root.is_dir():
            raise ValueError(f"PointFolder: {self.root} is not a folder")
        if num_points < 1:
            raise ValueError(f"PointFolder: num_points is {num_points}; expected at least 1")
        self.num_points, self.normalise = num_points, normalise
        paths, left_out, _ = listing_of(self.root, walk=_clouds_below, rules=_RULES, least=_LEAST)
        if not paths:
            found = f"; it holds {left_out}" if left_out else ""
            raise ValueError(f"PointFolder: no point cloud in {self.root}; accepted endings: {' '.join(ARRAYS + MESHES)}{found}")
        if left_out:
            say_once(f"PointFolder: {self.root}: {len(paths)} clouds; left out: {left_out}")
        self._division = divided(paths, split, owner=f"PointFolder: {self.root}")
        self.paths, self.classes = self._division.paths, self._division.classes

    def whole(self) -> "PointFolder":
        if not self._division.splits:
            return self
        return PointFolder(self.root, split="all", num_points=self.num_points, normalise=self.normalise)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        path = self.paths[checked_index(index, len(self))]
        points = read_points(path, num_points=self.num_points)
        return cloud_item(points, name=path, label=self._division.label_of(index), normalise=self.normalise)

    def label_of(self, index: int) -> int:
        return self._division.label_of(checked_index(index, len(self)))

    def _listing(self) -> tuple[object, ...]:
        return *super()._listing(), self._division.labels

    def train_test_split(self) -> tuple[Source, Source] | None:
        if not self._division.is_labelled_pair:
            return None
        options = {"num_points": self.num_points, "normalise": self.normalise}
        return PointFolder(self.root, split="train", **options), PointFolder(self.root, split="test", **options)


def _clouds_below(root: Path) -> Walked:
    """The files of clouds in order; the note describes what is left out."""
    walk, others, texts = Walk(root), list[str](), list[str]()
    paths = Paths(root, _clouds_of(walk, others, texts))
    notes = [f"{len(texts)} texts without numbers in the first line, such as {texts[0]}"] if texts else []
    if kinds := [*others, *(kind for _, kind in walk.passed_over)]:
        notes.append(count_kinds(kinds))
    return Walked(Listing(paths, "; ".join(notes), {}), walk.states, walk.real, walk.is_certain)


def _clouds_of(walk: Walk, others: list[str], texts: list[str]) -> Iterator[Run]:
    """The clouds of a walk; endings of other files are added to `others`, and names of texts without numbers to `texts`."""
    for folder, names in walk:
        kept: list[str] = []
        for name in names:
            if (suffix := PurePath(name).suffix.lower()) not in _ENDINGS:
                others.append(suffix or "without an ending")
            elif suffix in TEXTS and _holds_no_numbers(walk, Path(walk.root, folder, name)):
                texts.append(name)
            else:
                kept.append(name)
        if kept:
            yield Run(folder, kept)


def _holds_no_numbers(walk: Walk, path: Path) -> bool:
    """Whether a text is left out; then the walk remembers its state, since it may hold numbers later."""
    state = State.of(path)
    try:
        if first_numbers(path):
            return False
    except OSError:
        walk.is_certain = False
        return False  # it is an item, and the reason is told when it is read
    walk.remember(path, state)
    return True


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
        self.path = expanded(path)
        self.name, self.normalise = self.path.stem, normalise
        arrays = read_arrays(self.path)
        self._splits = [own for own in ("train", "test") if _find(arrays, "points", "data", prefix=f"{own}_") is not None]
        chosen = chosen_split(split, self._splits, owner=f"PointArrays: {self.path}")
        prefixes = [f"{own}_" for own in self._splits if chosen in ("all", own)] or [""]
        points = _joined(arrays, "points", "data", prefixes=prefixes)
        if points is None or points.ndim != 3 or points.shape[2] < 3 or points.dtype.kind not in "biuf" or len(points) == 0:
            shape = None if points is None else points.shape
            raise ValueError(f"PointArrays: {self.path}: points of shape {shape}; accepted: (clouds, points, 3); it holds {sorted(arrays)}")
        owner = f"PointArrays: {self.path}"
        self.points = points
        self.labels = _whole(_joined(arrays, "labels", "label", prefixes=prefixes), points.shape[:1], what=f"{owner}: labels")
        self.semantic = _whole(_joined(arrays, "parts", "pid", "mask", prefixes=prefixes), points.shape[:2], what=f"{owner}: parts")
        self.has_masks = self.semantic is not None
        # Taken from the whole file, so that both splits have the same classes even where one lacks some of them.
        everywhere = [f"{own}_" for own in self._splits] or [""]
        labels, parts = (_joined(arrays, *names, prefixes=everywhere) for names in (("labels", "label"), ("parts", "pid", "mask")))
        self.classes = _names(arrays.get("class_names"), numbers=labels, what=f"{owner}: labels")
        self.mask_classes = _names(arrays.get("part_names"), numbers=parts, what=f"{owner}: parts")

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
        name = f"{self.path}, cloud {index}"
        return cloud_item(self.points[index], name=name, label=label, normalise=self.normalise, instances=instances, semantic=semantic)

    def label_of(self, index: int) -> int:
        return -1 if self.labels is None else int(self.labels[checked_index(index, len(self))])

    def _listing(self) -> tuple[object, ...]:
        return self.points.shape, some_of(self.points), self.labels

    def train_test_split(self) -> tuple[Source, Source] | None:
        if self._splits != ["train", "test"] or self.labels is None:
            return None
        train, test = (PointArrays(self.path, split=split, normalise=self.normalise) for split in ("train", "test"))
        return train, test

    def whole(self) -> Source:
        return PointArrays(self.path, split="all", normalise=self.normalise) if self._splits == ["train", "test"] else self


def _find(arrays: dict[str, np.ndarray], *names: str, prefix: str) -> np.ndarray | None:
    return next((arrays[prefix + name] for name in names if prefix + name in arrays), None)


def _joined(arrays: dict[str, np.ndarray], *names: str, prefixes: Sequence[str]) -> np.ndarray | None:
    """The arrays of one of these names under all prefixes, joined; None where one is missing."""
    found = [array for prefix in prefixes if (array := _find(arrays, *names, prefix=prefix)) is not None]
    return np.concatenate(found) if len(found) == len(prefixes) else None


def _whole(numbers: np.ndarray | None, shape: tuple[int, ...], *, what: str) -> np.ndarray | None:
    """Whole numbers as Int of this shape; None where there are none.

    Raises:
        ValueError: they are something else.
    """
    if numbers is None:
        return None
    if numbers.dtype.kind not in "biuf" or numbers.size != math.prod(shape):
        raise ValueError(f"{what}: type {numbers.dtype} and shape {numbers.shape}; expected numbers of shape {shape}")
    if not (np.isfinite(numbers) & (np.abs(numbers) < _MOST_CLASSES)).all():
        raise ValueError(f"{what}: from {numbers.min()} to {numbers.max()}; accepted: numbers of classes, which are below {_MOST_CLASSES}")
    return numbers.reshape(shape).astype(np.int64)


def _names(names: np.ndarray | None, *, numbers: np.ndarray | None, what: str) -> tuple[str, ...]:
    """Names of classes: the given ones, or the numbers themselves; none without numbers."""
    if numbers is None:
        return ()
    count = 1 + int(numbers.max(initial=-1))
    if names is None:
        return tuple(map(str, range(count)))
    if names.ndim != 1 or len(names) < count:
        raise ValueError(f"{what}: the largest number is {count - 1}, and there are {names.size} names; expected a name for each number")
    return tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names.tolist())
