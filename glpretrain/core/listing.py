"""Paths as people name them, and walks through folders as people keep them.

A walk survives links that lead back, passes over folders that tools leave behind, and gives regular files only, since reading a pipe
would never end. Left out: which files are of use, which the callers decide.
"""

import logging
import os
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

_LOG = logging.getLogger(__name__)
LEFTOVERS = frozenset(("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"))
_PLAIN_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,5}")
_DIGITS = re.compile(rb"[0-9]+")
_MOST_KINDS = 8
_LARGEST = 2**63 - 1  # inode that is told apart


class Found(NamedTuple):
    """What a walk found below a folder."""

    files: list[Path]  # regular files, not hidden, in the order of their paths
    passed_over: list[tuple[Path, str]]  # what could not be used, and what it is


class Run(NamedTuple):
    """Files in one folder that follow one another in the order of paths."""

    folder: str  # relative to the folder that was walked through, and empty for this one
    names: list[str]


class State(NamedTuple):
    """What changes with the entries of a folder, or with the content of a file; all 0 where there is nothing at a path."""

    inode: int
    modified: int  # nanoseconds since 1970
    changed: int  # likewise; no program can set it back

    @classmethod
    def of(cls, path: str | Path) -> "State":
        """The state now. Links are followed."""
        try:
            found = os.stat(path)
        except OSError:
            return cls(0, 0, 0)
        return cls(found.st_ino & _LARGEST, found.st_mtime_ns, found.st_ctime_ns)


class _Folder(NamedTuple):
    path: str
    relative: str  # to the folder that is walked through
    real: str  # without links
    seen: set[Path] | None  # real folders that were reached through the same link; None where no link was followed


def expanded(path: str | Path) -> Path:
    """A path that a user gave: what exists under exactly this name, and otherwise the path with `~` replaced by the home folder."""
    given = Path(path)
    return given if os.path.lexists(given) else Path(os.path.expanduser(given))


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was left behind by an operating system or a tool."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def subfolders(root: Path) -> list[Path]:
    """The folders in a folder, and links to folders, in the order of their names. Leftovers are not among them."""
    with os.scandir(root) as entries:
        candidates = [root / entry.name for entry in entries if entry.is_symlink() or entry.is_dir()]
    return sorted(path for path in candidates if not is_leftover(path.name) and path.is_dir())


def files_below(root: Path) -> Found:
    """All regular files below a folder. Links to folders are followed, except to those that the walk enters anyway and to those above.

    Raises:
        OSError: `root` cannot be listed.
    """
    walk = Walk(root)
    files = [Path(root, folder, name) for folder, names in walk for name in names]
    return Found(files, walk.passed_over)


class Walk:
    """What `files_below` gives, folder by folder, for millions of files. It can be iterated over once, and fills its attributes meanwhile.

    Args:
        root: the folder to walk through.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.passed_over: list[tuple[Path, str]] = []  # as in `Found`
        self.states: list[tuple[str, State]] = []  # folders relative to `root`, before they were listed, and what was passed over
        self.is_certain = True  # whether all could be read that decides about what is found
        self._top = Path(os.path.realpath(root))
        self.real = [self._top]  # `root` and the folders that links in it lead to, without links

    def __iter__(self) -> Iterator[Run]:
        """The files in the order of their paths.

        Raises:
            OSError: `root` cannot be listed.
        """
        steps: list[_Folder | Run] = [_Folder(str(self.root), "", str(self._top), None)]
        while steps:
            step = steps.pop()
            if isinstance(step, Run):
                yield step
                continue
            names, inner = self._listed(step)
            # The files of an inner folder come between two of the files beside it.
            places = [0, *(bisect(names, os.path.basename(folder.path)) for folder in inner), len(names)]
            following: list[_Folder | Run] = []
            for number, (start, stop) in enumerate(pairwise(places)):
                if start < stop:
                    following.append(Run(step.relative, names[start:stop]))
                following += inner[number : number + 1]
            steps += reversed(following)

    def _listed(self, folder: _Folder) -> tuple[list[str], list[_Folder]]:
        """The names of the files in a folder, and the folders in it that have to be entered, both in order."""
        self.states.append((folder.relative, state := State.of(folder.path)))
        self.is_certain = self.is_certain and state.inode != 0
        names: list[str] = []
        others: list[os.DirEntry[str]] = []
        try:
            with os.scandir(folder.path) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == "." or name.lower() in LEFTOVERS:  # `is_leftover`, whose call would take a tenth of the time
                        continue
                    try:
                        is_file = entry.is_file()
                    except OSError:  # a link to itself
                        is_file = False
                    if is_file:
                        names.append(name)
                    else:
                        others.append(entry)
        except OSError as error:
            if not folder.relative:
                raise
            self.is_certain = False
            self.passed_over.append((Path(folder.path), f"folders that cannot be listed ({error.strerror})"))
            return [], []
        names.sort()
        inner: list[_Folder] = []
        for entry in sorted(others, key=lambda entry: entry.name):
            if (found := self._found(entry, folder)) is not None:
                inner.append(found)
        return names, inner

    def _found(self, entry: os.DirEntry[str], parent: _Folder) -> _Folder | None:
        """The folder of an entry that is no file, if the walk has to enter it; otherwise it is passed over."""
        try:
            is_folder = entry.is_dir()
        except OSError:
            is_folder = False
        if is_folder:
            if (inner := _entered(entry.name, entry.is_symlink(), parent, self._top)) is not None:
                if inner.seen is not None:
                    self.real.append(Path(inner.real))
                return inner
            kind = "links to folders that are searched anyway or that lie above"
        else:
            kind = "links to nothing" if entry.is_symlink() and not os.path.exists(entry) else "pipes, sockets or devices"
        path = Path(parent.path, entry.name)
        self.remember(path, State.of(path))
        self.passed_over.append((path, kind))
        return None

    def remember(self, path: Path, state: State) -> None:
        """Add the state of something that decides about what is found."""
        self.states.append((path.relative_to(self.root).as_posix(), state))


def _entered(name: str, is_link: bool, parent: _Folder, top: Path) -> _Folder | None:
    """The folder in another one if the walk has to enter it."""
    path, relative = os.path.join(parent.path, name), f"{parent.relative}/{name}" if parent.relative else name
    if not is_link and parent.seen is None:
        return _Folder(path, relative, os.path.join(parent.real, name), None)
    real = Path(os.path.realpath(path))
    below_top = real.is_relative_to(top) and not any(is_leftover(part) for part in real.relative_to(top).parts)
    if below_top or top.is_relative_to(real) or Path(parent.real).is_relative_to(real) or real in (parent.seen or ()):
        return None
    seen = set() if parent.seen is None else parent.seen
    seen.add(real)
    return _Folder(path, relative, str(real), seen)


def has_plain_ending(path: Path) -> bool:
    """Whether the name ends like `.txt`; the ends of `scan`, `scan_2024.05` and `photo.jpg?size=large` say nothing about the contents."""
    return _PLAIN_ENDING.fullmatch(path.suffix) is not None


def natural_key(path: str) -> bytes:
    """Key to sort by: numbers in names by their value, so that 2 comes before 10. Paths that differ in leading zeros have the same key.

    The key has the texts, each with an end, and the numbers, each as its length and digits.
    """
    return _DIGITS.sub(_number_key, path.encode("utf-8", "surrogatepass")) + b"\0"


def _number_key(found: re.Match[bytes]) -> bytes:
    digits = found[0].lstrip(b"0")
    return b"\0" + bytes((len(digits),)) + digits  # a name has at most 255 bytes


def count_kinds(kinds: Iterable[str]) -> str:
    """How often each kind occurs, the most frequent one first, as in `12 .dng, 1 .txt`."""
    counts = Counter(kinds).most_common()
    more = f" and {len(counts) - _MOST_KINDS} other kinds" if len(counts) > _MOST_KINDS else ""
    return ", ".join(f"{count} {kind}" for kind, count in counts[:_MOST_KINDS]) + more


@cache
def say_once(message: str) -> None:
    """Log a warning, the first time in this process."""
    _LOG.warning("%s", printable(message))


def printable(text: str) -> str:
    """The text with what is no UTF-8 in a file name written as an escape: such a text can be neither printed nor sent."""
    return text.encode(errors="backslashreplace").decode()
