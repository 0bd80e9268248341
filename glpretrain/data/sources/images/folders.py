"""Folders of image files as a source. Left out: images with masks (`masked`).

The files are found when a source is constructed, so that an empty folder fails at once. They are decoded one at a time on request.
"""

import os
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Literal

import numpy as np

from glpretrain.core.listing import is_leftover, say_once
from glpretrain.data.sources.base import Item, Source, Stored, checked_index
from glpretrain.data.sources.images.arrays import ValueRange, levels_of, ranges_of, way_of
from glpretrain.data.sources.images.decoding import ENDINGS, MOST_SIDE, decode, existing_folder, find_images
from glpretrain.data.sources.images.heif import NEEDED, register
from glpretrain.data.sources.images.layouts import by_lower_name, masks_beside_images, split_folders
from glpretrain.data.sources.paths import Paths

_FRAME = "_frame_"
_MOST_NAMES = 10  # in a message


def no_image_found(what: str, folder: Path) -> ValueError:
    """What is wrong with a folder without images."""
    needed = "" if register() else f". {NEEDED}"
    return ValueError(f"{what}: no image in {folder}; accepted endings: {' '.join(ENDINGS)}{needed}")


class ImageFolder(Source):
    """All images of a folder, flat or nested.

    The first-level subfolders are the classes, if there are at least two of them and every image is inside one. In a folder with
    `train/` and `val/` (also `training/`, `valid/`, `validation/`, `test/` or `testing/`, in capitals or not) the classes are the
    subfolders of both, those of the former first; images of `val/` that are in no class folder are left out. JPEGs of more than 4096
    pixels are decoded at a half, a quarter or an eighth of their size.

    Args:
        root: path of the folder.
        channels: number of channels of every item; files are converted between grey and colour.
        split: which split of a folder with `train/` and `val/` is read. When left out, `train` of such a folder, and all images of any
            other.
        value_range: [low, high], the values that become 0 and 255, or such a pair for each channel; for `.npy`, TIFF, and grey files of
            more than 8 bits. When left out, arrays have 8 bits, or the upper 8 of 16 bits are taken.

    Raises:
        ValueError: the folder is missing, has no image, has no splits although `split` is given, or holds masks.
    """

    accepts = "a folder of images"

    def __init__(
        self,
        root: str | Path,
        *,
        channels: int = 3,
        split: Literal["all", "train", "val"] | None = None,
        value_range: ValueRange | None = None,
    ) -> None:
        self.root = existing_folder(root, "ImageFolder")
        self.channels, self._levels = channels, levels_of(value_range, channels=channels, owner="ImageFolder")
        self.value_range = ranges_of(self._levels)
        if (pair := masks_beside_images(self.root)) is not None:
            raise ValueError(f"ImageFolder: {self.root} holds masks ({pair[1].name}/); use MaskedFolder, or give {pair[0]}")
        self._split_folders = split_folders(by_lower_name(self.root))
        if split is not None and self._split_folders is None:
            raise ValueError(f"ImageFolder: split={split!r}, but {self.root} has no train/ beside val/ or test/; leave split out")
        self.name = self.root.resolve().name
        self._found = [find_images(folder) for folder in self._split_folders or (self.root,)]
        self._choose(split or "train")

    def _choose(self, split: Literal["all", "train", "val"]) -> None:
        """Take the images of a split, or all of a folder without splits.

        Raises:
            ValueError: there is none.
        """
        if self._split_folders is None:
            self.classes, parts = class_names(self._found, self.root, owner="ImageFolder"), {"": self._found[0]}
        else:
            parts = self._read_split(*self._split_folders, *self._found, split=split)
        numbers = {name: number for number, name in enumerate(self.classes)}
        tops = [top for paths in parts.values() for top in tops_of(paths)]
        self._label_of_folder = np.array([numbers.get(top, -1) for top in tops], dtype=np.int32)
        self.paths = self._files = Paths.joined([paths.below(self.root, part) if part else paths for part, paths in parts.items()])
        if not self.paths:
            raise no_image_found("ImageFolder", self.root if self._split_folders is None else self._split_folders[split == "val"])

    def _read_split(
        self, train_folder: Path, val_folder: Path, train: Paths, val: Paths, *, split: Literal["all", "train", "val"]
    ) -> dict[str, Paths]:
        """The images of the split, by the folder of their part."""
        if split == "all":
            self.classes = class_names([train, val], self.root, owner="ImageFolder")
        else:
            self.classes = class_names([train], train_folder, owner="ImageFolder")
        if split == "val" and self.classes:
            # The classes of train/ come first, so that a class has the same number in both; a test part may have no labels.
            names = {top for top in tops_of(val) if top}
            self.classes = [*self.classes, *sorted(names - set(self.classes))] if names else []
            if names and len(loose := val.directly_in("")):
                counts = f"{len(loose)} of {len(val)} images of {val_folder} are in no class folder"
                shown = ", ".join(val.names[place] for place in loose[:_MOST_NAMES].tolist())
                say_once(f"ImageFolder: {counts} and are left out: {shown}")
                val = val.without("")
        kept = (train_folder.name, val_folder.name)
        if beside := sorted(name for name in os.listdir(self.root) if name not in kept and not is_leftover(name)):
            say_once(f"ImageFolder: {self.root} is read as {kept[0]}/ and {kept[1]}/; not used: {', '.join(beside[:_MOST_NAMES])}")
        parts = {kept[0]: train, kept[1]: val}
        return parts if split == "all" else {kept[split == "val"]: parts[kept[split == "val"]]}

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is no file."""
        return not path.is_file()

    @property
    def groups(self) -> Sequence[str]:
        """Images of one group are frames of one video: they lie in one folder below the class folder, or in one folder with the same
        name before `_frame_`."""
        depth, below = (1 if self.classes else 0), (0 if self._split_folders is None else 1)
        folders = [folder.split("/")[below:] if folder else [] for folder in self._files.folders]
        together = {tuple(parts) for parts in folders}
        if len(together) == len(folders) and all(len(parts) <= depth for parts in folders) and not self._files.name_holds(_FRAME):
            return ()  # every image has a name of its own; for millions of them, names would take gigabytes
        of_folder = self._files.folder_of.tolist()
        names = [_group_of(folders[of_folder[index]], name, depth=depth) for index, name in enumerate(self._files.names)]
        return names if len(set(names)) < len(names) else ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        return self.reduced(index, side=MOST_SIDE)

    def reduced(self, index: int, *, side: int) -> Item:
        values = decode(self.paths[checked_index(index, len(self))], channels=self.channels, side=side, levels=self._levels)
        label = int(self._label_of_folder[self._files.folder_of[index]])
        return Item(values=values, label=label, instances=None, regions=None)

    def stored(self, index: int) -> Stored:
        way = f"image {self.channels}{way_of(self._levels)}"
        return Stored(self.paths[index], way, int(self._label_of_folder[self._files.folder_of[index]]))

    def whole(self) -> "ImageFolder":
        if self._split_folders is None:
            return self
        whole = copy(self)
        whole._choose("all")
        return whole

    def _listing(self) -> tuple[object, ...]:
        return *super()._listing(), self._label_of_folder[self._files.folder_of]

    def train_test_split(self) -> tuple[Source, Source] | None:
        if self._split_folders is None or not self.classes:
            return None
        train, test = copy(self), copy(self)  # of what was found at first: a run scores the same files from its start to its end
        train._choose("train")
        test._choose("val")
        if not test.classes:
            kept = [folder.name for folder in self._split_folders]
            say_once(f"ImageFolder: no image of {self.root / kept[1]} is in a class folder, so that it gives no scores")
            return None
        train.classes = test.classes
        return train, test


def tops_of(paths: Paths) -> list[str]:
    """The first part of each folder, which is the name of a class; empty for the folder itself."""
    return [folder.partition("/")[0] for folder in paths.folders]


def class_names(parts: Sequence[Paths], root: Path, *, owner: str) -> list[str]:
    """The first-level folders, if there are at least two and every item is inside one; `owner` is the class, for messages."""
    names = sorted({top for paths in parts for top in tops_of(paths) if top})
    if len(names) < 2:
        return []
    loose = [(paths, paths.directly_in("")) for paths in parts]
    if count := sum(len(places) for _, places in loose):
        counts = f"{count} of {sum(map(len, parts))} images are in no class folder"
        first = next(paths.names[int(places[0])] for paths, places in loose if len(places))
        say_once(f"{owner}: {counts} (such as {root / first}), so there are no classes")
        return []
    return names


def _group_of(folders: Sequence[str], name: str, *, depth: int) -> str:
    """Name of the video that the image in these folders belongs to; the image's own name where it belongs to none."""
    before, frame, _ = name.rpartition(_FRAME)
    return "/".join(folders if len(folders) > depth and not frame else [*folders, before if frame else name])
