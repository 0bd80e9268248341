"""Image files that a text file lists, as a source.

The list is read when the source is constructed, line by line, and what it says is mapped into memory while it stays as it is. Whether its
files exist is found out when they are decoded.
"""

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from glpretrain.core.listing import State, expanded
from glpretrain.data.sources.base import Item, Source, Stored, checked_index, label_items
from glpretrain.data.sources.images.arrays import ValueRange, levels_of, ranges_of, way_of
from glpretrain.data.sources.images.decoding import ENDINGS, MOST_SIDE, decode
from glpretrain.data.sources.paths import Paths, Texts
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of

_LISTS = (".txt", ".lst", ".tsv")
_LEAST = 100_000  # images, which are read in a fifth of a second


class ImageList(Source):
    """The images that are listed in a text file, one per line: a path relative to the file, then white space and an optional class name.

    Where a path contains white space, a tab must precede the class name, or no line may have a class name.

    Args:
        path: path of the text file; empty lines and lines that begin with `#` are ignored.
        channels: number of channels of every item.
        value_range: [low, high], the values that become 0 and 255, or such a pair for each channel; for `.npy`, TIFF, and grey files of
            more than 8 bits. When left out, arrays have 8 bits, or the upper 8 of 16 bits are taken.

    Raises:
        ValueError: the file is missing or names no image, or only some lines have a class name.
    """

    accepts = f"a list of images ({', '.join(_LISTS)})"

    def __init__(self, path: str | Path, *, channels: int = 3, value_range: ValueRange | None = None) -> None:
        self.path = expanded(path)
        self.name, self.channels = self.path.stem, channels
        self._levels = levels_of(value_range, channels=channels, owner="ImageList")
        self.value_range = ranges_of(self._levels)
        if not self.path.is_file():
            raise ValueError(f"ImageList: {self.path} is not a file")
        found = listing_of(self.path, walk=_read, rules=f"list {' '.join(ENDINGS)}", least=_LEAST)
        self.paths = found.paths.with_root(self.path.parent)
        self.classes, self._labels = list(Texts.part_of(found.arrays, "classes")), found.arrays["labels"]

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a text file."""
        return path.is_file() and path.suffix.lower() in _LISTS

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        return self.reduced(index, side=MOST_SIDE)

    def reduced(self, index: int, *, side: int) -> Item:
        values = decode(self.paths[checked_index(index, len(self))], channels=self.channels, side=side, levels=self._levels)
        return Item(values=values, label=int(self._labels[index]), instances=None, regions=None)

    def stored(self, index: int) -> Stored:
        return Stored(self.paths[index], f"image {self.channels}{way_of(self._levels)}", int(self._labels[index]))

    def _listing(self) -> tuple[object, ...]:
        return *super()._listing(), self._labels


class ImageFiles(Source):
    """Image files that a program names one by one.

    Args:
        paths: their paths; at least one.
        channels: number of channels of every item.
        value_range: as for `ImageList`.

    Raises:
        ValueError: there is none.
    """

    name = "files"

    def __init__(self, paths: Sequence[str | Path], *, channels: int = 3, value_range: ValueRange | None = None) -> None:
        if not paths:
            raise ValueError("ImageFiles: no path given; give at least one")
        self.paths, self.channels = Paths.of(Path(), map(expanded, paths)), channels
        self._levels = levels_of(value_range, channels=channels, owner="ImageFiles")
        self.value_range = ranges_of(self._levels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        return self.reduced(index, side=MOST_SIDE)

    def reduced(self, index: int, *, side: int) -> Item:
        values = decode(self.paths[checked_index(index, len(self))], channels=self.channels, side=side, levels=self._levels)
        return Item(values=values, label=-1, instances=None, regions=None)

    def stored(self, index: int) -> Stored:
        return Stored(self.paths[index], f"image {self.channels}{way_of(self._levels)}", -1)


def _read(path: Path) -> Walked:
    """The images of a list, their classes and labels.

    Raises:
        ValueError: see `ImageList`.
    """
    state, known, labels = State.of(path), dict[str, int](), array("i")
    paths = Paths.of(path.parent, _names(path, known, labels))
    if not paths:
        raise ValueError(f"ImageList: {path} lists no image; expected a path [and a class name] per line")
    classes, of_items = label_items(list(known), np.array(labels), owner=f"ImageList: {path}")
    arrays = Texts.of(classes).arrays("classes") | {"labels": of_items}
    return Walked(Listing(paths, "", arrays), [("", state)], [Path(os.path.realpath(path))], True)


def _names(path: Path, known: dict[str, int], labels: "array[int]") -> Iterator[str]:
    """The path in each line. New class names are added to `known`, and the number of the line's own, or -1, to `labels`."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:  # names of files may be any bytes
        for line in map(str.strip, lines):
            if "\0" in line:
                raise ValueError(f"ImageList: {path} is no text in UTF-8; expected a path [and a class name] per line")
            if line and not line.startswith("#"):
                name, label = _split_line(line)
                labels.append(-1 if label is None else known.setdefault(label, len(known)))
                yield name


def _split_line(line: str) -> tuple[str, str | None]:
    name, tab, label = line.partition("\t")
    if tab:
        return name, label.strip() or None
    if line.lower().endswith(ENDINGS):
        return line, None
    name, space, label = line.rpartition(" ")
    return (name.strip(), label) if space else (line, None)
