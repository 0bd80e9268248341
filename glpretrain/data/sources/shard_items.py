"""The items of tar shards in WebDataset's layout: where each of them is, what its label is, and its bytes.

A shard is a tar file, plain or compressed by gzip. The name of a sample ends at the first dot of the file name, and what follows it is the
key of the member. Beside its content, a sample may hold `.cls` (the name or number of the class) or `.json` (with a `label`). The headers
are read when this object is constructed, and never again while the shards stay as they are (`saved_listings`). A shard is opened when an
item of it is asked for, and items are read at their offset, in any order. Left out: how bytes are decoded, other compression, and URLs.
"""

import tarfile
from functools import partial
from pathlib import Path

import numpy as np

from glpretrain.core.listing import expanded, say_once
from glpretrain.data.sources.base import Stored, checked_index
from glpretrain.data.sources.kinds import FileKind
from glpretrain.data.sources.paths import Texts
from glpretrain.data.sources.saved_listings import listing_of
from glpretrain.data.sources.shard_headers import is_shard, read_headers
from glpretrain.data.sources.tar_files import Member, ReadAhead
from glpretrain.data.sources.unpacked import Unpacked

_LEAST = 10_000  # samples, whose headers are read in a second
ACCEPTS = "a .tar or .tar.gz file or a folder of them"


class ShardItems:
    """Where the items of tar shards are.

    The content of a sample is the member whose key is an ending of this kind of file; of several, the one that comes first among the
    endings. A sample with a longer key, such as `rgb.jpg`, is read if it has no other content. Samples without a content or with a damaged
    label are left out. A damaged shard is read as far as it is whole. One line in the log counts what was left out.

    Args:
        root: one `.tar` file, or a folder of them.
        kind: which members are contents.
        key: key of the contents; of several, separated by `;`, the first that a sample has. None as above.
        read_ahead: whether the system reads all of a shard when an item of it is asked for.
        unpack_to: folder in which compressed shards are unpacked; None for one among the temporary files.
        unpack_gb: gigabytes of unpacked shards that are kept there.

    Raises:
        ValueError: there is no shard or no content in them, it is ambiguous which member is the content, only some samples have a class,
            or `unpack_gb` is out of range.
    """

    def __init__(
        self, root: str | Path, kind: FileKind, *, key: str | None, read_ahead: bool, unpack_to: str | None, unpack_gb: float
    ) -> None:
        self.root = expanded(root)
        self.name = self.root.resolve().stem
        if not 0 < unpack_gb < float("inf"):
            raise ValueError(f"{kind.owner}: unpack_gb is {unpack_gb}; expected a positive number of gigabytes")
        self.unpacked = Unpacked(None if unpack_to is None else expanded(unpack_to), most_bytes=1e9 * unpack_gb)
        self._ahead = ReadAhead() if read_ahead else None
        rules = f"shards, gz {' '.join(kind.endings)} {key} {self.root}"  # which is in the note
        found = listing_of(self.root, walk=partial(read_headers, kind=kind, key=key, unpacked=self.unpacked), rules=rules, least=_LEAST)
        self._names, self._places, self.labels = found.paths, found.arrays["places"], found.arrays["labels"]
        self.classes = list(Texts.part_of(found.arrays, "classes"))
        if found.note:
            say_once(f"{kind.owner}: {self.root}: {found.note}")

    @property
    def starts(self) -> np.ndarray:
        """Int[R]: the first item of each shard."""
        return np.flatnonzero(np.diff(self._names.folder_of, prepend=-1))

    def __len__(self) -> int:
        return len(self._names)

    def member(self, index: int) -> Member:
        """Where the content of an item is. Raises an IndexError outside range(len(self))."""
        shard, name = self._names.parts(checked_index(index, len(self)))
        return Member(self.root / shard, name, *self._places[index].tolist())

    def content(self, member: Member) -> bytes:
        """The bytes of a member. Raises what `Unpacked.read` raises."""
        if self._ahead is not None:
            self._ahead.of(self.unpacked.plain(member.shard))
        return self.unpacked.read(member.shard, offset=member.offset, size=member.size)

    def label_of(self, index: int) -> int:
        """Class of an item, -1 without one."""
        return int(self.labels[index])

    def named(self, index: int) -> str:
        """Name of an item with its shard."""
        shard, name = self._names.parts(index)
        return f"{self.root.name if shard == '.' else shard}:{name}"  # `.` where the source is one file

    def stored(self, index: int, *, way: str) -> Stored:
        """Where an item lies; `way` says how it is decoded."""
        shard, _ = self._names.parts(index)
        return Stored(self.root / shard, f"{way} at {self._places[index].tolist()}", self.label_of(index))

    def listing(self) -> tuple[object, ...]:
        """What tells these items from others, for a fingerprint."""
        return self._names.digest(), self._places, self.labels


def holds_shards(path: Path) -> bool:
    """Whether it is a tar file, or a folder with some at its top."""
    if path.is_file():
        return is_shard(path) or tarfile.is_tarfile(path)
    return path.is_dir() and any(map(is_shard, path.iterdir()))
