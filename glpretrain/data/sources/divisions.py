"""Splits and classes of the files of a folder, taken from the names of the folders that they lie in.

A file is `<file>`, `<class>/<file>`, `train/<class>/<file>`, or `<class>/train/<file>` (the layout of ModelNet). Folders of images have
rules of their own (`images.folders`).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from glpretrain.data.sources.base import check_choice
from glpretrain.data.sources.paths import Paths

SplitOrAll = Literal["train", "test", "all"]
SPLITS = ("train", "test", "all")
_TRAIN_NAMES: tuple[str, ...] = ("train", "training")
_TEST_NAMES: tuple[str, ...] = ("test", "val", "testing", "valid", "validation")


class Division(NamedTuple):
    """The files of one split, or all of them."""

    paths: Paths
    classes: list[str]  # of all splits
    label_of_folder: np.ndarray  # Int[folders]  class of the files in each folder of `paths`, -1 without one
    splits: list[str]  # those that there are

    def label_of(self, index: int) -> int:
        """Class of a file, -1 without one."""
        return int(self.label_of_folder[self.paths.folder_of[index]])

    @property
    def labels(self) -> np.ndarray:
        """Int[N]: class of every file."""
        return self.label_of_folder[self.paths.folder_of]

    @property
    def is_labelled_pair(self) -> bool:
        """Whether there are both splits, with classes."""
        return self.splits == ["test", "train"] and len(self.classes) > 0


def divided(paths: Paths, split: SplitOrAll | None, *, owner: str) -> Division:
    """The files of a split.

    Args:
        paths: all files.
        split: which split is taken; None is `train` where `test` exists too, and everything otherwise.
        owner: class and folder, for the message.

    Raises:
        ValueError: there is no such split.
    """
    folders = {name.lower() for folder in paths.folders for name in folder.split("/")}
    # A class may be called `valid`, so less common names are those of a split only beside a folder to train on.
    tests = _TEST_NAMES if folders & set(_TRAIN_NAMES) else _TEST_NAMES[:2]
    split_of = dict.fromkeys(_TRAIN_NAMES, "train") | dict.fromkeys(tests, "test")
    placed = [_split_and_class(folder, split_of) for folder in paths.folders]
    splits = sorted({own for own, _ in placed if own})
    classes = sorted({label for _, label in placed if label})
    chosen = chosen_split(split, splits, owner=owner)
    kept = np.array([chosen in ("all", own) for own, _ in placed])
    files = paths if kept.all() else paths.at(kept[paths.folder_of])
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers.get(_split_and_class(folder, split_of)[1], -1) for folder in files.folders]
    return Division(files, classes, np.array(labels, dtype=np.int32), splits)


def chosen_split(split: SplitOrAll | None, present: Sequence[str], *, owner: str) -> SplitOrAll:
    """The split to read: the given one, or by default `train` where both splits are present, else `all`.

    Raises:
        ValueError: the given one is unknown or not present.
    """
    if split is None:
        return "train" if set(present) == {"train", "test"} else "all"
    check_choice(split, (*present, "all"), what=f"{owner}: split")
    return split


def _split_and_class(folder: str, split_of: dict[str, str]) -> tuple[str, str]:
    """Names of the split and the class of the files in a folder, taken from its path; empty where there is none."""
    folders = folder.split("/") if folder else []
    splits = [split_of[name.lower()] for name in folders if name.lower() in split_of]
    classes = [name for name in folders if name.lower() not in split_of]
    return splits[0] if splits else "", classes[0] if classes else ""
