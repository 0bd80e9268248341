"""Text files that list items: a path in each line, and a class name or none.

Left out: the files themselves. Whether they exist is found out when they are decoded.
"""

import os
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glpretrain.core.listing import State
from glpretrain.data.sources.base import label_items
from glpretrain.data.sources.kinds import FileKind
from glpretrain.data.sources.paths import Paths, Texts
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of

LISTS = (".txt", ".lst", ".tsv")
_LEAST = 100_000  # items, which are read in a fifth of a second


class Listed(NamedTuple):
    """What a text file lists."""

    paths: Paths
    classes: list[str]  # empty where no line has a class name
    labels: np.ndarray  # Int[N]  class of each item, -1 without one


def read_list(path: Path, kind: FileKind) -> Listed:
    """The items of a list. It is read line by line, and what it says is mapped into memory while it stays as it is.

    A line is a path relative to the list, then white space and an optional class name. Where a path contains white space, a tab must
    precede the class name, or no line may have a class name. Empty lines and lines that begin with `#` are ignored.

    Args:
        path: the text file.
        kind: which files it lists.

    Raises:
        ValueError: the file is missing or names no item, or only some lines have a class name.
    """
    if not path.is_file():
        raise ValueError(f"{kind.owner}: {path} is not a file")
    found = listing_of(path, walk=partial(_read, kind=kind), rules=f"list {' '.join(kind.endings)}", least=_LEAST)
    return Listed(found.paths.with_root(path.parent), list(Texts.part_of(found.arrays, "classes")), found.arrays["labels"])


def is_list(path: Path) -> bool:
    """Whether it is a text file."""
    return path.is_file() and path.suffix.lower() in LISTS


def _read(path: Path, *, kind: FileKind) -> Walked:
    state, known, labels = State.of(path), dict[str, int](), array("i")
    paths = Paths.of(path.parent, _names(path, known, labels, kind))
    if not paths:
        raise ValueError(f"{kind.owner}: {path} lists no {kind.item}; expected a path [and a class name] per line")
    classes, of_items = label_items(list(known), np.array(labels), owner=f"{kind.owner}: {path}")
    arrays = Texts.of(classes).arrays("classes") | {"labels": of_items}
    return Walked(Listing(paths, "", arrays), [("", state)], [Path(os.path.realpath(path))], True)


def _names(path: Path, known: dict[str, int], labels: "array[int]", kind: FileKind) -> Iterator[str]:
    """The path in each line. New class names are added to `known`, and the number of the line's own, or -1, to `labels`."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:  # names of files may be any bytes
        for line in map(str.strip, lines):
            if "\0" in line:
                raise ValueError(f"{kind.owner}: {path} is no text in UTF-8; expected a path [and a class name] per line")
            if line and not line.startswith("#"):
                name, label = _split_line(line, kind)
                labels.append(-1 if label is None else known.setdefault(label, len(known)))
                yield name


def _split_line(line: str, kind: FileKind) -> tuple[str, str | None]:
    name, tab, label = line.partition("\t")
    if tab:
        return name, label.strip() or None
    if line.lower().endswith(kind.endings):
        return line, None
    name, space, label = line.rpartition(" ")
    return (name.strip(), label) if space else (line, None)
