"""Published sets of clouds in the layouts in which they are handed around: ModelNet40, ShapeNet55, ScanObjectNN.

None is downloaded; every message says which files are missing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from glpretrain.data.sources.base import Item, Source, checked_index
from glpretrain.data.sources.clouds import PointSource, cloud_item
from glpretrain.data.sources.point_files import read_arrays, read_points
from glpretrain.data.sources.point_folders import Split, check_split


def _lines(path: Path, *, owner: str) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{owner}: {path} is missing; found: {sorted(found.name for found in path.parent.glob('*'))[:12]}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _parts(split: Split) -> tuple[str, ...]:
    return ("train", "test") if split == "all" else (split,)


def _points(cloud: Path | np.ndarray, *, num_points: int) -> np.ndarray:
    return read_points(cloud, num_points=num_points) if isinstance(cloud, Path) else cloud


class ModelNet40(PointSource):
    """ModelNet40 (or 10) in any of its three layouts.

    `modelnet40_train.txt` beside `<class>/<name>.txt` (the resampled clouds with normals), `ply_data_train*.h5` with
    `shape_names.txt` (2,048 points), or Princeton's `<class>/train/*.off`.

    Args:
        root: the folder.
        split: train (9,843), test (2,468) or all.
        num_points: sampled on a mesh's surface.
        normalise: move a cloud to its mean and scale it into the unit sphere.

    Raises:
        ValueError: the folder has none of the layouts.
    """

    def __init__(self, root: str | Path, *, split: Split = "train", num_points: int = 2048, normalise: bool = True) -> None:
        check_split(split, owner="ModelNet40")
        self.root, self.split, self.num_points, self.normalise = Path(root), split, num_points, normalise
        self._clouds: Sequence[Path | np.ndarray]
        self._labels: Sequence[int]
        self._classes: Sequence[str]
        lists = sorted(self.root.glob("modelnet*_train.txt"))
        if lists:
            self._read_lists(lists[-1].name.removesuffix("_train.txt"))
        elif any(self.root.glob("ply_data_train*.h5")):
            self._read_stacks()
        elif self.root.is_dir() and next(self.root.glob("*/train/*.off"), None) is not None:
            self._find_meshes()
        else:
            raise ValueError(
                f"ModelNet40: {self.root} has none of modelnet40_train.txt, ply_data_train*.h5 and <class>/train/*.off; "
                f"found: {sorted(found.name for found in self.root.glob('*'))[:12]}"
            )

    def _read_lists(self, stem: str) -> None:
        self._classes = _lines(self.root / f"{stem}_shape_names.txt", owner="ModelNet40")
        names = [name for part in _parts(self.split) for name in _lines(self.root / f"{stem}_{part}.txt", owner="ModelNet40")]
        labels = [name.rpartition("_")[0] for name in names]
        self._labels = [self._classes.index(label) for label in labels]
        self._clouds = [self.root / label / f"{name}.txt" for name, label in zip(names, labels, strict=True)]

    def _read_stacks(self) -> None:
        self._classes = _lines(self.root / "shape_names.txt", owner="ModelNet40")
        files = [path for part in _parts(self.split) for path in sorted(self.root.glob(f"ply_data_{part}*.h5"))]
        if not files:
            raise ValueError(f"ModelNet40: {self.root} has no ply_data_{self.split}*.h5")
        arrays = [read_arrays(path) for path in files]
        self._clouds, labels = (np.concatenate([part[name] for part in arrays]) for name in ("data", "label"))
        self._labels = labels.reshape(-1).tolist()

    def _find_meshes(self) -> None:
        self._classes = sorted(folder.parent.name for folder in self.root.glob("*/train"))
        self._clouds = [path for part in _parts(self.split) for path in sorted(self.root.glob(f"*/{part}/*.off"))]
        self._labels = [self._classes.index(path.parent.parent.name) for path in self._clouds]

    @property
    def name(self) -> str:
        return "modelnet40"

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Item:
        points = _points(self._clouds[checked_index(index, len(self))], num_points=self.num_points)
        return cloud_item(points, label=self._labels[index], normalise=self.normalise)

    def train_test_split(self) -> tuple[Source, Source]:
        options = {"num_points": self.num_points, "normalise": self.normalise}
        return ModelNet40(self.root, split="train", **options), ModelNet40(self.root, split="test", **options)


class ShapeNet55(PointSource):
    """ShapeNet55 as Point-BERT hands it around: `ShapeNet-55/train.txt`, `test.txt` and `shapenet_pc/<class>-<model>.npy`.

    The two folders lie in `root`, or their contents do. Classes are WordNet's numbers.

    Args:
        root: the folder.
        split: train (41,952), test (10,518) or all, which Point-BERT pretrains on.
        normalise: move a cloud to its mean and scale it into the unit sphere.

    Raises:
        ValueError: a list is missing.
    """

    def __init__(self, root: str | Path, *, split: Split = "train", normalise: bool = True) -> None:
        check_split(split, owner="ShapeNet55")
        self.root, self.split, self.normalise = Path(root), split, normalise
        lists = self.root / "ShapeNet-55" if (self.root / "ShapeNet-55").is_dir() else self.root
        clouds = self.root / "shapenet_pc" if (self.root / "shapenet_pc").is_dir() else self.root
        names = {part: _lines(lists / f"{part}.txt", owner="ShapeNet55") for part in ("train", "test")}
        self._classes = sorted({name.partition("-")[0] for listed in names.values() for name in listed})
        own = [name for part in _parts(split) for name in names[part]]
        numbers = {name: number for number, name in enumerate(self._classes)}
        self._files = [(clouds / name, numbers[name.partition("-")[0]]) for name in own]

    @property
    def name(self) -> str:
        return "shapenet55"

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Item:
        path, label = self._files[checked_index(index, len(self))]
        return cloud_item(read_points(path, num_points=1), label=label, normalise=self.normalise)

    def train_test_split(self) -> tuple[Source, Source]:
        return ShapeNet55(self.root, split="train", normalise=self.normalise), ShapeNet55(self.root, split="test", normalise=self.normalise)


_SCANS = ("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink", "sofa", "toilet")
_SCAN_FILES = {
    "obj_bg": ("main_split", "objectdataset"),
    "obj_only": ("main_split_nobg", "objectdataset"),
    "hardest": ("main_split", "objectdataset_augmentedrot_scale75"),
}


class ScanObjectNN(PointSource):
    """ScanObjectNN's h5 files: 15 classes of scanned objects, 2,048 points.

    Where a file has masks, `instances` is 1 on the object and 0 on what is around it.

    Args:
        root: with main_split/ and main_split_nobg/, or one of these.
        split: train, test or all.
        variant: obj_bg (with background), obj_only, or hardest (PB_T50_RS).
        normalise: move a cloud to its mean and scale it into the unit sphere; Point-MAE leaves scans as they are.

    Raises:
        ValueError: a file is missing or broken, or `variant` is unknown.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: Split = "train",
        variant: Literal["obj_bg", "obj_only", "hardest"] = "obj_bg",
        normalise: bool = True,
    ) -> None:
        check_split(split, owner="ScanObjectNN")
        if variant not in _SCAN_FILES:
            raise ValueError(f"ScanObjectNN: variant is {variant!r}; expected one of {sorted(_SCAN_FILES)}")
        self.root, self.split, self.variant, self.normalise = Path(root), split, variant, normalise
        folder, stem = _SCAN_FILES[variant]
        folder = self.root / folder if (self.root / folder).is_dir() else self.root
        names = {"train": f"training_{stem}.h5", "test": f"test_{stem}.h5"}
        arrays = [read_arrays(folder / names[part]) for part in _parts(split)]
        self.points, self.labels = (np.concatenate([part[name] for part in arrays]) for name in ("data", "label"))
        masks = [part.get("mask") for part in arrays]
        self.masks = None if any(mask is None for mask in masks) else np.concatenate(masks)

    @property
    def name(self) -> str:
        return f"scanobjectnn {self.variant}"

    @property
    def classes(self) -> Sequence[str]:
        return _SCANS

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Item:
        checked_index(index, len(self))
        instances = None if self.masks is None else torch.from_numpy((self.masks[index] >= 0).astype(np.int64))
        return cloud_item(self.points[index], label=int(self.labels[index]), normalise=self.normalise, instances=instances)

    def train_test_split(self) -> tuple[Source, Source]:
        options = {"variant": self.variant, "normalise": self.normalise}
        return ScanObjectNN(self.root, split="train", **options), ScanObjectNN(self.root, split="test", **options)
