"""Image files that a text file lists, as a source.

How a list is read is told in `file_lists`.
"""

from collections.abc import Sequence
from pathlib import Path

from glpretrain.core.listing import expanded
from glpretrain.data.sources.base import Item, Source, Stored, checked_index
from glpretrain.data.sources.file_lists import LISTS, is_list, read_list
from glpretrain.data.sources.images.arrays import ValueRange, levels_of, ranges_of, way_of
from glpretrain.data.sources.images.decoding import ENDINGS, MOST_SIDE, decode
from glpretrain.data.sources.kinds import FileKind
from glpretrain.data.sources.paths import Paths

_KIND = FileKind("ImageList", "image", ENDINGS)


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

    accepts = f"a list of images ({', '.join(LISTS)})"

    def __init__(self, path: str | Path, *, channels: int = 3, value_range: ValueRange | None = None) -> None:
        self.path = expanded(path)
        self.name, self.channels = self.path.stem, channels
        self._levels = levels_of(value_range, channels=channels, owner="ImageList")
        self.value_range = ranges_of(self._levels)
        self.paths, self.classes, self._labels = read_list(self.path, _KIND)

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a text file."""
        return is_list(path)

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
