"""A folder that rows of numbers are added to, so that a process that is killed at any moment can go on where it was.

The rows are an array in NumPy's format whose header is written last. What is on the disk beyond the state that was noted is cut off when
the work goes on. Left out: what the rows are of (`files`).
"""

import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np

from glpretrain.core.files import write_json

_STATE, _ROWS, _ITEMS, _REASONS = "state.json", "rows.npy", "items.bin", "unreadable.txt"
_EVERY = 10.0  # seconds between notes of the state
_ITEM = np.dtype([("index", "<i8"), ("label", "<i8")])
_READ_BYTES = 1 << 24


class RowFile:
    """Rows, the item of each, and the items that have none.

    Args:
        folder: folder of the files, which no other process writes to; it is made where it is missing.
        settings: what the rows depend on; a folder that was begun with others is refused.
        dtype: type of the numbers.
        argument: what the user calls the folder, for messages.

    Raises:
        ValueError: the folder was begun with other settings, or its files are damaged.
    """

    def __init__(self, folder: Path, *, settings: Mapping[str, object], dtype: Literal["float32", "float16"], argument: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings, self.dtype = folder, dict(settings), np.dtype(dtype).newbyteorder("<")
        self.batches_done, self.num_rows, self.num_unreadable = 0, 0, 0
        self._shape: tuple[int, ...] | None = None  # of one row, once there is one
        reasons = self._recall(argument) if (folder / _STATE).is_file() else 0
        self._rows = self._opened(_ROWS, len(self._header()) + self.num_rows * self._row_bytes if self._shape else 0)
        self._items = self._opened(_ITEMS, self.num_rows * _ITEM.itemsize)
        self._reasons = self._opened(_REASONS, reasons)
        self._noted = time.monotonic()

    def _recall(self, argument: str) -> int:
        """Take over the state that was noted; the number of bytes of reasons."""
        path = self.folder / _STATE
        try:
            state = json.loads(path.read_text())
            settings = state["settings"]
            self.batches_done, self.num_rows, self.num_unreadable = state["batches"], state["rows"], state["unreadable"]
            self._shape, reasons = state["shape"] and tuple(state["shape"]), state["reason_bytes"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{argument}: {path} is damaged; remove {self.folder} and begin again") from error
        given = json.loads(json.dumps(self.settings))
        if differing := sorted(name for name in given.keys() | settings.keys() if given.get(name) != settings.get(name)):
            raise ValueError(
                f"{argument}: {self.folder} was begun with other settings ({', '.join(differing)}); give the same ones, or remove it"
            )
        return reasons

    def _opened(self, name: str, length: int) -> IO[bytes]:
        path = self.folder / name
        if path.exists() and path.stat().st_size < length:
            raise ValueError(f"{path} is shorter than was noted; remove {self.folder} and begin again")
        file = path.open("r+b" if path.exists() else "w+b")
        file.truncate(length)
        file.seek(length)
        return file

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all rows."""
        return self.num_rows, *(self._shape or ())

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self._shape or (), dtype=np.int64)) * self.dtype.itemsize

    def _header(self) -> bytes:
        """The header of the array; its length does not depend on the number of rows."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape})
        return header.getvalue()

    def add(self, rows: np.ndarray, *, index: np.ndarray, labels: np.ndarray, unreadable: Sequence[tuple[str, str]]) -> None:
        """Add what a batch gave.

        Args:
            rows: Float[B *S]; not looked at where B is 0.
            index: Int[B], the item of each row.
            labels: Int[B], the class of each.
            unreadable: name and reason of each item without a row.
        """
        if len(index):
            if self._shape is None:
                self._shape = rows.shape[1:]
                self._rows.write(self._header())
            assert rows.shape == (len(index), *self._shape)
            self._rows.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())
            self._items.write(np.rec.fromarrays([index, labels], dtype=_ITEM).tobytes())
        for name, reason in unreadable:
            self._reasons.write(f"{name}\t{reason}\n".encode("utf-8", "backslashreplace"))
        self.num_rows += len(index)
        self.num_unreadable += len(unreadable)
        self.batches_done += 1
        if time.monotonic() - self._noted > _EVERY:
            self.note()

    def note(self) -> None:
        """Wait until everything is on the disk, and note that it is."""
        for file in (self._rows, self._items, self._reasons):
            file.flush()
            os.fsync(file.fileno())
        state = {"batches": self.batches_done, "rows": self.num_rows, "shape": self._shape, "unreadable": self.num_unreadable}
        write_json(self.folder / _STATE, {"settings": self.settings, **state, "reason_bytes": self._reasons.tell()})
        self._noted = time.monotonic()

    def close(self) -> None:
        """Let go of the files."""
        for file in (self._rows, self._items, self._reasons):
            file.close()

    def complete(self) -> Path:
        """Write the header of the array, which is complete then; its path."""
        self._rows.seek(0)
        self._rows.write(self._header())
        self.note()
        return self.folder / _ROWS

    @property
    def reasons(self) -> Path:
        """File with a line for every item that has no row: its name, a tab, the reason."""
        return self.folder / _REASONS

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All rows, a bounded part at a time: Float[B *S] with Int[B] of items and Int[B] of labels."""
        at_once = max(1, _READ_BYTES // max(1, self._row_bytes))
        with (self.folder / _ROWS).open("rb") as rows, (self.folder / _ITEMS).open("rb") as items:
            rows.seek(len(self._header()))
            for start in range(0, self.num_rows, at_once):
                count = min(at_once, self.num_rows - start)
                numbers = np.frombuffer(rows.read(count * self._row_bytes), dtype=self.dtype).reshape(count, *self.shape[1:])
                of = np.frombuffer(items.read(count * _ITEM.itemsize), dtype=_ITEM)
                yield numbers, of["index"], of["label"]
