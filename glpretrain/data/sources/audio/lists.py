"""Sounds that a text file lists. How a list is read is told in `file_lists`."""

from pathlib import Path

from glpretrain.core.listing import expanded
from glpretrain.data.sources.audio.decoding import ENDINGS, AudioSource, audio_item, check_seconds, decode, require_readable, way_of
from glpretrain.data.sources.base import Item, Stored, checked_index
from glpretrain.data.sources.file_lists import LISTS, is_list, read_list
from glpretrain.data.sources.kinds import FileKind

_KIND = FileKind("SoundList", "sound", ENDINGS)


class SoundList(AudioSource):
    """The sounds that are listed in a text file, one per line: a path relative to the file, then white space and an optional class name.

    Where a path contains white space, a tab must precede the class name, or no line may have a class name. A file that is missing, damaged,
    empty or silent is an unreadable item.

    Args:
        path: path of the text file; empty lines and lines that begin with `#` are ignored.
        seconds: how much of a file is read, from its beginning; when left out, all of it.

    Raises:
        ValueError: the file is missing or names no sound, only some lines have a class name, `seconds` is not above 0, or files need a
            package that is not installed.
    """

    accepts = f"a list of sounds ({', '.join(LISTS)})"

    def __init__(self, path: str | Path, *, seconds: float | None = None) -> None:
        self.path, self.seconds = expanded(path), seconds
        self.name = self.path.stem
        check_seconds(seconds, owner="SoundList")
        self.paths, self.classes, self._labels = read_list(self.path, _KIND)
        require_readable(self.paths, owner=f"SoundList: {self.path}")

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a text file."""
        return is_list(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        return audio_item(decode(self.paths[checked_index(index, len(self))], seconds=self.seconds), label=int(self._labels[index]))

    def stored(self, index: int) -> Stored:
        return Stored(self.paths[index], way_of(self.seconds), int(self._labels[index]))

    def _listing(self) -> tuple[object, ...]:
        return *super()._listing(), self._labels
