"""The members of a tar file that may be damaged: where the bytes of each of them are.

Python's tarfile reads the headers, but it takes a damaged header for the end of the file. Here the search goes on behind it, and what is
wrong with the file is said. Left out: compressed files (`unpacked`), and what the members mean (`shards`).
"""

import math
import os
import posixpath
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from glpretrain.core.listing import is_leftover
from glpretrain.data.sources.base import reason_of

BLOCK = 512  # bytes: the unit of a tar file
_LARGEST_EXTENSION = 2**15  # bytes of a header that holds a long name; tarfile takes quadratic time over some of them
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MAGIC, _MAGIC_AT = b"ustar", 257
_SEARCHED = (2**16, 2**20, 2**26)  # bytes behind a damaged place in which the next header is searched, in up to three attempts
_MOST_LINKS = 8  # links to links that are followed
_AHEAD = 1 << 22  # bytes that are read ahead at once: Linux reads no more than a few megabytes for one request
_REMEMBERED = 300.0  # seconds for which a file counts as read
_MOST_ASKED = 10_000  # files that were read ahead


class Member(NamedTuple):
    """Where the bytes of one member are."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


class Contents(NamedTuple):
    """What was found in a tar file."""

    members: dict[str, Member | None]  # by name; None where the bytes are not in the file: a link to nowhere, or a sparse member
    num_replaced: int  # members whose name a later one has too
    fault: str  # what is wrong with the file; empty where it is whole


def read_range(file: Path, *, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on."""
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(size)


class ReadAhead:
    """Lets the system read whole files before their parts are asked for. One that was read long ago may be forgotten, and is read again."""

    def __init__(self) -> None:
        self._asked: dict[Path, float] = {}

    def of(self, file: Path) -> None:
        """Read a file ahead. Raises an OSError where it cannot be opened."""
        now = time.monotonic()
        if now - self._asked.get(file, -math.inf) < _REMEMBERED:
            return
        if len(self._asked) > _MOST_ASKED:
            self._asked.clear()
        self._asked[file] = now
        with file.open("rb") as opened:
            for start in range(0, opened.seek(0, 2), _AHEAD):
                os.posix_fadvise(opened.fileno(), start, _AHEAD, os.POSIX_FADV_WILLNEED)


def read_contents(shard: Path, *, plain: Path) -> Contents:
    """Find the members of a tar file in their order, as far as they are whole.

    Links are followed inside the file, and names are written without `./`. Hidden members and what tools leave behind are left out.

    Args:
        shard: what the members belong to.
        plain: the file itself, another one where `shard` is compressed.

    Raises:
        ValueError: it is no plain tar file.
        OSError: it cannot be opened.
    """
    faults: list[str] = []
    with plain.open("rb") as file:
        contents = collected(_places(shard, file, faults))
    return contents._replace(fault=faults[0] if faults else "")


def _places(shard: Path, file: BinaryIO, faults: list[str]) -> Iterator[tuple[str, Member | str | None]]:
    """The name of each entry of a file, and where its bytes are, or the name that a link leads to; see `_entries`."""
    for entry in _entries(shard, file, faults):
        name = posixpath.normpath(entry.name)
        if entry.islnk():
            yield name, posixpath.normpath(entry.linkname)
        elif entry.issym():
            yield name, posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.linkname))
        elif entry.isreg():
            yield name, None if entry.issparse() else Member(shard, name, entry.offset_data, entry.size)


def collected(places: Iterable[tuple[str, Member | str | None]]) -> Contents:
    """The members of a whole file.

    Args:
        places: name of each entry, and where its bytes are, or the name that a link leads to, or None where the bytes are not in the file.
    """
    found: dict[str, Member | str | None] = {}
    num_replaced = 0
    for name, place in places:
        if any(is_leftover(part) and part != ".." for part in name.split("/")):
            continue
        num_replaced += name in found
        found[name] = place
    return Contents({name: _followed(place, found) for name, place in found.items()}, num_replaced, "")


def _followed(place: Member | str | None, found: dict[str, Member | str | None]) -> Member | None:
    for _ in range(_MOST_LINKS):
        if not isinstance(place, str):
            return place
        place = found.get(place)
    return None


class _Header(tarfile.TarInfo):
    """A header whose sizes are possible. Without this, a negative size makes tarfile read the same header forever."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENSIONS and header.size > _LARGEST_EXTENSION):
            raise tarfile.HeaderError(f"size {header.size}")
        return header


def _entries(shard: Path, file: BinaryIO, faults: list[str]) -> Iterator[tarfile.TarInfo]:
    """The whole members of a file; what is wrong with it is added to `faults`."""
    length, start, ended = file.seek(0, 2), 0, False
    while True:
        file.seek(start)
        try:
            # Names that are not UTF-8 stay different from one another, and they can be printed.
            archive = tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            break
        except Exception as error:  # whatever tarfile raises for a damaged header
            following, _ = _next_header(file, start)
            if following is None:
                raise ValueError(f"{shard} is not a plain tar file: {reason_of(error)}") from error
            faults.append(f"is damaged at byte {start}")
            start = following
    while True:
        try:
            entry = archive.next()
        except Exception:  # likewise
            entry = None
        archive.members.clear()  # or it keeps every header  # pyright: ignore[reportAttributeAccessIssue]  missing in the stubs
        if entry is not None and start < archive.offset and _is_whole(entry, length):
            yield entry
            start = archive.offset
            continue
        following, only_zeros = _next_header(file, start)
        ended = ended or (only_zeros and start < length)
        if not only_zeros:
            faults.append(f"is damaged at byte {start}" if entry is None else f"is cut short inside {entry.name}")
        if following is None:
            if not ended:
                faults.append("is cut short")
            return
        archive.offset = start = following


def _is_whole(entry: tarfile.TarInfo, length: int) -> bool:
    if not entry.isreg() or entry.issparse():
        return True  # no bytes of it are read
    return entry.size >= 0 and entry.offset_data + entry.size <= length


def _next_header(file: BinaryIO, start: int) -> tuple[int | None, bool]:
    """Position of the next header behind `start`, None without one, and whether there are only zeros before it."""
    for length in _SEARCHED:
        file.seek(start)
        window = file.read(length)
        at = window.find(_MAGIC, _MAGIC_AT + 1)
        while at != -1:
            place = at - _MAGIC_AT
            if _is_header(window[place : place + BLOCK]):
                return start + place, not window[:place].strip(b"\0")
            at = window.find(_MAGIC, at + 1)
        if len(window) < length:
            return None, not window.strip(b"\0")
    return None, False


def _is_header(block: bytes) -> bool:
    return _header_of(block) is not None


def _header_of(block: bytes) -> tarfile.TarInfo | None:
    try:
        return _Header.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError):
        return None


def read_header(file: BinaryIO, start: int) -> tarfile.TarInfo | None:
    """The header at a place of a file; None where there is none."""
    file.seek(start)
    return _header_of(file.read(BLOCK))
