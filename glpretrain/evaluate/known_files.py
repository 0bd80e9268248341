"""What was read of files in earlier evaluations: the digest of each item, so that a second evaluation reads no picture.

A file is the same while it has its path, size, inode and times, and an item while its file is the same and it is read in the same way. Of a
file that was written after the evaluation began, or seconds before, nothing is kept: it may have been written after it was read.

Records are only ever added, in new files, so that any number of processes may share the folder. `cache.shrink` removes the files that were
not used for longest, as it does with features.
"""

import hashlib
import logging
import os
import secrets
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np

from glpretrain.core.files import part_file
from glpretrain.data.sources.base import Source, Stored
from glpretrain.evaluate.reading import Known

_LOG = logging.getLogger(__name__)
_FORMAT = "1"
_NAME, _DIGEST = 16, 32  # bytes
_SETTLED = 4.0  # seconds: coarser times are not in use
_MOST_BYTES = 1 << 29  # of records that are read, which is eleven million of them
_MOST_FILES = 16  # beyond, they are joined
_DECODERS = ("pillow", "torchvision")  # whose other versions may give other pixels


class KnownFiles:
    """Digests of items by the state of their files.

    Args:
        folder: folder of the records; it is made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._way = " ".join((_FORMAT, *(f"{name} {version(name)}" for name in _DECODERS)))
        self._records: np.ndarray | None = None  # UInt8[N 48] sorted by their first eight bytes, which are in `_order`
        self._order = np.empty(0, dtype=np.uint64)

    def recall(self, source: Source, known: Known) -> None:
        """Take over what is known of items that were not read yet.

        Args:
            source: source of the items.
            known: where it is taken over to.
        """
        for index in known.every_unseen():
            if (stored := source.stored(index)) is None or not len(records := self._loaded()):
                return
            name, _ = self._name(stored)
            if name is None:
                continue
            for place in range(int(np.searchsorted(self._order, _number(name))), len(records)):
                record = records[place].tobytes()
                if record[:8] != name[:8]:
                    break
                if record[:_NAME] == name:
                    known.set(index, digest=record[_NAME:], label=stored.label)
                    break

    def learn(self, source: Source, known: Known, *, since: float) -> None:
        """Keep what was read. A disk that cannot be written to costs a line and no score. Other arguments as of `recall`.

        Args:
            since: time before which the files must have got their content, seconds since 1970: nothing was read before.
        """
        added = bytearray()
        for index in known.every_new():
            if (stored := source.stored(index)) is None:
                return
            name, changed = self._name(stored)
            if name is not None and changed < since - _SETTLED:
                added += name + known.digests([index]).tobytes()
        if not added:
            return
        self._records = None
        try:
            self._write(np.frombuffer(added, dtype=np.uint8).reshape(-1, _NAME + _DIGEST))
        except OSError as error:
            _LOG.warning("what was read of files cannot be kept in %s (%s)", self._folder, error)

    def _write(self, records: np.ndarray) -> None:
        with part_file(self._folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}.npy") as part, part.open("wb") as file:
            np.save(file, records)

    def _loaded(self) -> np.ndarray:
        """All records, sorted."""
        if self._records is not None:
            return self._records
        files = record_files(self._folder)
        parts = {file: part for file in files if (part := _read(file)) is not None}
        newest_first = np.concatenate([*reversed(parts.values()), np.empty((0, _NAME + _DIGEST), dtype=np.uint8)])
        newest_first = newest_first[: _MOST_BYTES // newest_first.shape[1]]
        names = np.ascontiguousarray(newest_first[:, :8]).view(np.uint64)[:, 0]
        order = np.argsort(names, kind="stable")
        self._records, self._order = newest_first[order], names[order]
        if len(files) > _MOST_FILES:
            with suppress(OSError):
                self._write(newest_first)
                for file in files:
                    file.unlink(missing_ok=True)
        return self._records

    def _name(self, stored: Stored) -> tuple[bytes | None, float]:
        """Name of the state that an item is in, and when its file was changed; no name without a file."""
        try:
            state = os.stat(stored.file)
        except OSError:
            return None, 0.0
        path = os.path.abspath(stored.file)
        text = f"{self._way}\0{stored.way}\0{stored.label}\0{state.st_size} {state.st_ino} {state.st_mtime_ns} {state.st_ctime_ns}\0{path}"
        name = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=_NAME).digest()
        return name, max(state.st_mtime, state.st_ctime)


def record_files(folder: Path) -> list[Path]:
    """The files of records in a folder, the oldest first."""
    return sorted(folder.glob("[0-9]*-*.npy"))


def _read(path: Path) -> np.ndarray | None:
    try:
        records = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # removed by another process, or damaged
        return None
    with suppress(OSError):  # a folder of another user, say
        os.utime(path)  # the last use
    is_right = isinstance(records, np.ndarray) and records.dtype == np.uint8 and records.shape[1:] == (_NAME + _DIGEST,)
    return records if is_right else None


def _number(name: bytes) -> np.uint64:
    return np.frombuffer(name[:8], dtype=np.uint64)[0]
