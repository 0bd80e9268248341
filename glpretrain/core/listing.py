"""Paths as people name them, and walks through folders as people keep them.

A walk survives links that lead back, passes over folders that tools leave behind, and gives regular files only, since reading a pipe
would never end. Left out: which files are of use, which the callers decide.
"""

import logging
import os
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

_LOG = logging.getLogger(__name__)
_LEFTOVERS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__")
_PLAIN_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,5}")
_MOST_KINDS = 8


class Found(NamedTuple):
    """What a walk found below a folder."""

    files: list[Path]  # regular files, not hidden, in the order of their paths
    passed_over: list[tuple[Path, str]]  # what could not be used, and what it is


class Run(NamedTuple):
    """Files in one folder that follow one another in the order of paths."""

    folder: str  # relative to the folder that was walked through, and empty for this one
    names: list[str]

    @property
    def top(self) -> str:
        """The first part of `folder`."""
        return self.folder.partition("/")[0]


class _Folder(NamedTuple):
    path: Path
    real: Path  # without links
    seen: set[Path] | None  # real folders that were reached through the same link; None where no link was followed


def expanded(path: str | Path) -> Path:
    """A path that a user gave: what exists under exactly this name, and otherwise the path with `~` replaced by the home folder."""
    given = Path(path)
    return given if os.path.lexists(given) else Path(os.path.expanduser(given))


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was left behind by an operating system or a tool."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


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
    runs, passed_over = runs_below(root)
    return Found([Path(root, folder, name) for folder, names in runs for name in names], passed_over)


def runs_below(root: Path) -> tuple[list[Run], list[tuple[Path, str]]]:
    """What `files_below` gives, folder by folder, for lists of millions of files."""
    top = Path(os.path.realpath(root))
    runs: list[tuple[tuple[str, ...], list[str]]] = []  # parts of a folder, and names in it
    passed_over: list[tuple[Path, str]] = []
    folders = [_Folder(root, top, None)]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder.path) as opened:
                entries = list(opened)
        except OSError as error:
            if folder.path == root:
                raise
            passed_over.append((folder.path, f"folders that cannot be listed ({error.strerror})"))
            continue
        names: list[str] = []
        entered: list[str] = []
        for entry in entries:
            name = entry.name
            if is_leftover(name):
                continue
            try:
                is_file = entry.is_file()
                is_folder = not is_file and entry.is_dir()
            except OSError:  # a link to itself
                is_folder, is_file = False, False
            if is_file:
                names.append(name)
            elif is_folder and (inner := _entered(folder.path / name, entry.is_symlink(), folder, top)) is not None:
                folders.append(inner)
                entered.append(name)
            elif is_folder:
                passed_over.append((folder.path / name, "links to folders that are searched anyway or that lie above"))
            else:
                kind = "links to nothing" if entry.is_symlink() and not os.path.exists(entry) else "pipes, sockets or devices"
                passed_over.append((folder.path / name, kind))
        names.sort()
        # The files of an inner folder come between two of the files beside it.
        places = [0, *(bisect(names, name) for name in sorted(entered)), len(names)]
        parts = folder.path.relative_to(root).parts
        runs += [(parts, names[start:stop]) for start, stop in pairwise(places) if start < stop]
    runs.sort(key=lambda run: (*run[0], run[1][0]))
    return [Run("/".join(parts), names) for parts, names in runs], passed_over


def _entered(path: Path, is_link: bool, parent: _Folder, top: Path) -> _Folder | None:
    """The folder at `path` if the walk has to enter it."""
    if not is_link and parent.seen is None:
        return _Folder(path, parent.real / path.name, None)
    real = Path(os.path.realpath(path))
    below_top = real.is_relative_to(top) and not any(is_leftover(part) for part in real.relative_to(top).parts)
    if below_top or top.is_relative_to(real) or parent.real.is_relative_to(real) or real in (parent.seen or ()):
        return None
    seen = set() if parent.seen is None else parent.seen
    seen.add(real)
    return _Folder(path, real, seen)


def has_plain_ending(path: Path) -> bool:
    """Whether the name ends like `.txt`; the ends of `scan`, `scan_2024.05` and `photo.jpg?size=large` say nothing about the contents."""
    return _PLAIN_ENDING.fullmatch(path.suffix) is not None


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """Key to sort by: numbers in names by their value, so that 2 comes before 10."""
    parts = re.split("([0-9]+)", str(path))
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], str(path)


def count_kinds(kinds: Iterable[str]) -> str:
    """How often each kind occurs, the most frequent one first, as in `12 .heic, 1 .txt`."""
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
