"""Published data sets of point clouds in the layouts in which they are distributed: ModelNet40, ShapeNet55, ScanObjectNN.

Nothing is downloaded; an error message says which files are missing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from glpretrain.data.sources.base import Item, Source, check_choice, checked_index
from glpretrain.data.sources.divisions import SPLITS, SplitOrAll
from glpretrain.data.sources.paths import Paths
from glpretrain.data.sources.points.arrays import read_arrays
from glpretrain.data.sources.points.clouds import PointSource, cloud_item, read_points, some_of


def _lines(path: Path, *, owner: str) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{owner}: {path} is missing; found: {_listing(path.parent)}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _listing(folder: Path) -> list[str]:
    """The first names in a folder, for a message."""
    return sorted(found.name for found in folder.glob("*"))[:12]


def _joined(stacks: Mapping[Path, Mapping[str, np.ndarray]], name: str) -> np.ndarray:
    """The arrays of this name in all files, joined."""
    for path, arrays in stacks.items():
        if name not in arrays or len(arrays[name]) != len(arrays["data"]):
            shapes = ", ".join(f"{key} {array.shape}" for key, array in arrays.items())
            raise ValueError(f"{path}: no array {name} with an entry for each cloud; it holds {shapes or 'no array'}")
    return np.concatenate([arrays[name] for arrays in stacks.values()])


def _single_splits(split: SplitOrAll, *, owner: str) -> tuple[str, ...]:
    """The splits that `split` consists of.

    Raises:
        ValueError: it is unknown.
    """
    check_choice(split, SPLITS, what=f"{owner}: split")
    return ("train", "test") if split == "all" else (split,)


class ModelNet40(PointSource):
    """ModelNet40 (or ModelNet10) in any of its three layouts.

    These are `modelnet40_train.txt` beside `<class>/<name>.txt` (the resampled clouds with normals), `ply_data_train*.h5` with
    `shape_names.txt` (2,048 points), and Princeton's `<class>/train/*.off`.

    Args:
        root: path of the folder.
        split: train (9,843 clouds), test (2,468) or all.
        num_points: number of points that are sampled on the surface of a mesh.
        normalise: whether a cloud is centred at its mean and scaled into the unit sphere.

    Raises:
        ValueError: the folder has none of the layouts, or `split` is unknown.
    """

    name = "modelnet40"

    def __init__(self, root: str | Path, *, split: SplitOrAll = "train", num_points: int = 2048, normalise: bool = True) -> None:
        self.root, self.num_points, self.normalise = Path(root), num_points, normalise
        splits = _single_splits(split, owner="ModelNet40")
        self._clouds: np.ndarray | None = None  # Float[B P 3+], where there are no files
        self._labels: np.ndarray  # Int[N]
        lists = sorted(self.root.glob("modelnet*_train.txt"))
        if lists:
            self._read_lists(lists[-1].name.removesuffix("_train.txt"), splits)
        elif any(self.root.glob("ply_data_train*.h5")):
            self._read_stacks(splits)
        elif self.root.is_dir() and next(self.root.glob("*/train/*.off"), None) is not None:
            self._find_meshes(splits)
        else:
            raise ValueError(
                f"ModelNet40: {self.root} has none of modelnet40_train.txt, ply_data_train*.h5 and <class>/train/*.off; "
                f"found: {_listing(self.root)}"
            )

    def _read_lists(self, stem: str, splits: tuple[str, ...]) -> None:
        self.classes = _lines(self.root / f"{stem}_shape_names.txt", owner="ModelNet40")
        names = [name for split in splits for name in _lines(self.root / f"{stem}_{split}.txt", owner="ModelNet40")]
        labels = [name.rpartition("_")[0] for name in names]
        self._labels = np.array([self.classes.index(label) for label in labels], dtype=np.int32)
        self.paths = Paths.of(self.root, (f"{label}/{name}.txt" for name, label in zip(names, labels, strict=True)))

    def _read_stacks(self, splits: tuple[str, ...]) -> None:
        self.classes = _lines(self.root / "shape_names.txt", owner="ModelNet40")
        files = [path for split in splits for path in sorted(self.root.glob(f"ply_data_{split}*.h5"))]
        if not files:
            raise ValueError(f"ModelNet40: {self.root} has no ply_data_{splits[0]}*.h5; found: {_listing(self.root)}")
        stacks = {path: read_arrays(path) for path in files}
        self._clouds = _joined(stacks, "data")
        self._labels = _joined(stacks, "label").reshape(-1)

    def _find_meshes(self, splits: tuple[str, ...]) -> None:
        classes = self.classes = sorted(folder.parent.name for folder in self.root.glob("*/train"))
        files = [path.relative_to(self.root) for split in splits for path in sorted(self.root.glob(f"*/{split}/*.off"))]
        self.paths = Paths.of(self.root, files)
        self._labels = np.array([classes.index(path.parts[0]) for path in files], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Item:
        checked_index(index, len(self))
        points = read_points(self.paths[index], num_points=self.num_points) if self._clouds is None else self._clouds[index]
        name = self.paths[index] if self._clouds is None else f"{self.root}, cloud {index}"
        return cloud_item(points, name=name, label=int(self._labels[index]), normalise=self.normalise)

    def label_of(self, index: int) -> int:
        return int(self._labels[checked_index(index, len(self))])

    def _listing(self) -> tuple[object, ...]:
        return *super()._listing(), self._labels, None if self._clouds is None else some_of(self._clouds)

    def train_test_split(self) -> tuple[Source, Source]:
        options = {"num_points": self.num_points, "normalise": self.normalise}
        return ModelNet40(self.root, split="train", **options), ModelNet40(self.root, split="test", **options)


class ShapeNet55(PointSource):
    """ShapeNet55 as Point-BERT distributes it: `ShapeNet-55/train.txt`, `test.txt` and `shapenet_pc/<class>-<model>.npy`.

    The two folders, or their contents, lie in `root`. The classes are WordNet numbers.

    Args:
        root: path of the folder.
        split: train (41,952 clouds), test (10,518) or all, which Point-BERT pretrains on.
        normalise: whether a cloud is centred at its mean and scaled into the unit sphere.

    Raises:
        ValueError: a list is missing, or `split` is unknown.
    """

    name = "shapenet55"

    def __init__(self, root: str | Path, *, split: SplitOrAll = "train", normalise: bool = True) -> None:
        self.root, self.normalise = Path(root), normalise
        splits = _single_splits(split, owner="ShapeNet55")
        lists = self.root / "ShapeNet-55" if (self.root / "ShapeNet-55").is_dir() else self.root
        clouds = self.root / "shapenet_pc" if (self.root / "shapenet_pc").is_dir() else self.root
        names = {part: _lines(lists / f"{part}.txt", owner="ShapeNet55") for part in ("train", "test")}
        self.classes = sorted({name.partition("-")[0] for listed in names.values() for name in listed})
        numbers = {name: number for number, name in enumerate(self.classes)}
        chosen = [name for own in splits for name in names[own]]
        self.paths = Paths.of(clouds, chosen)
        self._labels = np.array([numbers[name.partition("-")[0]] for name in chosen], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        path = self.paths[checked_index(index, len(self))]
        return cloud_item(read_points(path, num_points=1), name=path, label=int(self._labels[index]), normalise=self.normalise)

    def train_test_split(self) -> tuple[Source, Source]:
        return ShapeNet55(self.root, split="train", normalise=self.normalise), ShapeNet55(self.root, split="test", normalise=self.normalise)


_SCANS = ("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink", "sofa", "toilet")
ScanVariant = Literal["obj_bg", "obj_only", "hardest"]
_SCAN_FILES: dict[ScanVariant, tuple[str, str]] = {
    "obj_bg": ("main_split", "objectdataset"),
    "obj_only": ("main_split_nobg", "objectdataset"),
    "hardest": ("main_split", "objectdataset_augmentedrot_scale75"),
}


class ScanObjectNN(PointSource):
    """ScanObjectNN's h5 files: scanned objects of 15 classes, with 2,048 points each.

    Where a file has masks, `instances` is 1 on the object and 0 on the background.

    Args:
        root: path of the folder that holds main_split/ and main_split_nobg/, or of one of these.
        split: train, test or all.
        variant: obj_bg (with background), obj_only, or hardest (PB_T50_RS).
        normalise: whether a cloud is centred at its mean and scaled into the unit sphere; Point-MAE does not do so.

    Raises:
        ValueError: a file is missing or damaged, or `split` or `variant` is unknown.
    """

    classes = _SCANS

    def __init__(
        self,
        root: str | Path,
        *,
        split: SplitOrAll = "train",
        variant: ScanVariant = "obj_bg",
        normalise: bool = True,
    ) -> None:
        splits = _single_splits(split, owner="ScanObjectNN")
        check_choice(variant, tuple(_SCAN_FILES), what="ScanObjectNN: variant")
        self.root, self.normalise = Path(root), normalise
        self._variant: ScanVariant = variant
        self.name = f"scanobjectnn {variant}"
        folder, stem = _SCAN_FILES[variant]
        folder = self.root / folder if (self.root / folder).is_dir() else self.root
        names = {"train": f"training_{stem}.h5", "test": f"test_{stem}.h5"}
        stacks = {folder / names[own]: read_arrays(folder / names[own]) for own in splits}
        self.points, self.labels = _joined(stacks, "data"), _joined(stacks, "label")
        self.has_masks = all("mask" in stack for stack in stacks.values())
        self.masks = _joined(stacks, "mask") if self.has_masks else None

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Item:
        checked_index(index, len(self))
        instances = None if self.masks is None else torch.from_numpy((self.masks[index] >= 0).astype(np.int64))
        label, name = int(self.labels[index]), f"{self.root}, cloud {index}"
        return cloud_item(self.points[index], name=name, label=label, normalise=self.normalise, instances=instances)

    def label_of(self, index: int) -> int:
        return int(self.labels[checked_index(index, len(self))])

    def _listing(self) -> tuple[object, ...]:
        return self._variant, some_of(self.points), self.labels

    def train_test_split(self) -> tuple[Source, Source]:
        train, test = (ScanObjectNN(self.root, split=own, variant=self._variant, normalise=self.normalise) for own in ("train", "test"))
        return train, test
