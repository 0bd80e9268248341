"""Compressed shards as plain ones. No item of a compressed file can be read without all that comes before it, so a shard is unpacked as a
stream into a folder when the first item of it is asked for, once for all processes of a machine.

The shards that were not used for longest are removed where the folder becomes too large: shards that are read one after another
(`data.orders.ByShard`) are unpacked once in an epoch, however many there are. Left out: what is in a shard (`shard_headers`).
"""

import hashlib
import os
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from glpretrain.core.files import PART, first_of, part_file
from glpretrain.core.listing import State, say_once
from glpretrain.data.sources.tar_files import read_range

_COMPRESSED = (".tar.gz", ".tgz")
_STEP, _LARGEST = 1 << 14, 1 << 20  # bytes that are unpacked at once, and that they may become: what comes with damage is lost
_GZIP = 16 + zlib.MAX_WBITS  # the format
_PATIENCE = 3600.0  # seconds that a process waits for another one that unpacks
_ATTEMPTS = 5  # to read what other processes may remove
_USED = 60.0  # seconds after which a shard counts as used again
_ABANDONED = 3600.0  # seconds after which a file that is not complete belongs to a killed process


def is_compressed(shard: Path) -> bool:
    return shard.name.lower().endswith(_COMPRESSED)


class Unpacked:
    """A folder of plain shards.

    Args:
        folder: path of the folder, which is made where it is missing; None for one of this user among the temporary files of the machine.
        most_bytes: bytes that may be kept in it.
    """

    def __init__(self, folder: Path | None, *, most_bytes: float) -> None:
        self._given, self._most_bytes = folder, most_bytes
        self._made: set[str] = set()  # by this process

    def read(self, shard: Path, *, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset` on; a compressed one is unpacked.

        Raises:
            ValueError: it unpacks to more than may be kept, or the folder belongs to somebody else.
            OSError: it cannot be read, or its content cannot be written.
        """
        for _ in range(_ATTEMPTS if is_compressed(shard) else 0):
            with suppress(FileNotFoundError):  # another process has removed it at this moment
                return read_range(self.plain(shard), offset=offset, size=size)
        return read_range(self.plain(shard), offset=offset, size=size)

    def plain(self, shard: Path) -> Path:
        """The plain tar file of a shard. Where the shard is damaged, this is as much as can be unpacked. Raises what `read` raises."""
        if not is_compressed(shard):
            return shard
        state = State.of(shard)
        if not state.inode:
            raise FileNotFoundError(f"{shard}: there is no such file")
        name = hashlib.sha256(os.fsencode("\0".join((os.path.realpath(shard), *map(str, state))))).hexdigest()[:32]
        path = self._folder() / f"{name}.tar"
        while not self._is_there(path):
            with first_of(path.with_suffix(".lock"), patience=_PATIENCE, waiting=partial(say_once, f"{shard}: another process unpacks it")):
                if not self._is_there(path):
                    self._unpack(shard, path)
        return path

    def _folder(self) -> Path:
        if self._given is not None:
            return self._given
        own = Path(tempfile.gettempdir(), f"glpretrain-{os.getuid()}")
        with suppress(FileExistsError):
            own.mkdir(mode=0o700)
        found = own.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise ValueError(f"{own}: a folder that others may write to cannot hold unpacked shards; remove it, or give unpack_to")
        return own / "shards"

    @staticmethod
    def _is_there(path: Path) -> bool:
        try:
            if time.time() - path.stat().st_mtime > _USED:
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _unpack(self, shard: Path, path: Path) -> None:
        say_once(f"{shard.parent}: compressed shards are unpacked to {path.parent}, {self._most_bytes / 1e9:g} GB at most")
        if path.name in self._made:
            say_once(
                f"{shard} and others are unpacked again and again; read shard after shard (data.order: ByShard), or raise unpack_gb, which"
                f" is {self._most_bytes / 1e9:g}"
            )
        with part_file(path) as part, part.open("wb") as plain:
            for block in _blocks(shard):
                if plain.tell() + len(block) > self._most_bytes:
                    raise ValueError(f"{shard} unpacks to more than unpack_gb, which is {self._most_bytes / 1e9:g}; raise it")
                plain.write(block)
        self._made.add(path.name)
        self._make_room(path)

    def _make_room(self, kept: Path) -> None:
        """Remove the shards that were not used for longest, and what killed processes have left."""
        now = time.time()
        for part in kept.parent.glob(f".*{PART}"):
            with suppress(FileNotFoundError):
                if now - part.stat().st_mtime > _ABANDONED:
                    part.unlink()
        found: list[tuple[float, int, Path]] = []
        for path in kept.parent.glob("*.tar"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._most_bytes:
                return
            if path != kept:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
                total -= size


def _blocks(shard: Path) -> Iterator[bytes]:
    """The bytes of a shard, as far as they can be unpacked."""
    with shard.open("rb") as file:
        unpack = zlib.decompressobj(_GZIP)
        while packed := file.read(_STEP):
            while packed:
                try:
                    yield unpack.decompress(packed, _LARGEST)
                except zlib.error:
                    return
                if unpack.eof:  # another stream may follow
                    packed, unpack = unpack.unused_data, zlib.decompressobj(_GZIP)
                else:
                    packed = unpack.unconsumed_tail
        yield unpack.flush()
