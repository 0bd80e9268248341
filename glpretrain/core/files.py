"""Files and folders that several processes may write: a file is complete or absent, and a folder that is written over time has one writer.

What is written is left out. Nothing here needs torch, because slides are cut without it.
"""

import fcntl
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

PART = ".part"  # ending of files that are not complete yet; their names start with a dot
LOCK = ".lock"
_PATIENCE = 0.5  # seconds: a lock that is freed at this moment is not refused
_MOMENT = 5.0  # seconds


def cache_folder(name: str) -> Path:
    """`glpretrain/<name>` below the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "glpretrain" / name


@contextmanager
def part_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to. After a kill at any moment `path` is the old file or the complete new one.

    The file is moved to `path` when all of it is on the disk, and it is removed when the body of the `with` statement fails.

    Args:
        path: path of the complete file; its folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}{PART}")  # a name may have 255 bytes; no two writers share one
    try:
        with _named(path):
            yield part
        _flush(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an error say which file could not be written. When a disk is full, Python does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by `part_file`."""
    with part_file(path) as part:
        part.write_bytes(content)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write an object, indented, with a newline at the end, by `part_file`."""
    write_whole(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to the end of a file, so that those of two processes do not mix.

    A last line that a killed process did not finish keeps a line of its own.
    """
    content = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")  # names of files may be any bytes
    with path.open("a+b", buffering=0) as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            content = content if file.read(1) == b"\n" else b"\n" + content
        while content:  # one write may take less than all
            content = content[file.write(content) :]


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`. A reader sees the old target or the new one, whatever other processes do meanwhile."""
    part = link.with_name(f".{link.name}.{secrets.token_hex(8)}{PART}")
    part.symlink_to(target)
    try:
        part.replace(link)
    except OSError:
        part.unlink()
        raise


@contextmanager
def locked(folder: Path, *, argument: str) -> Iterator[None]:
    """Let no other process that asks for this lock write to a folder meanwhile. A process that ends, however it ends, frees its locks.

    Args:
        folder: the folder; it is made where it is missing.
        argument: what the user calls the folder, for the message.

    Raises:
        ValueError: another process has the lock; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout as error:
        raise ValueError(
            f"{argument}: {_holder(path)} is writing to {folder}; wait until it has ended, or end it, or give another folder"
        ) from error
    ours = not isinstance(lock, SoftFileLock)  # which takes the place of a lock where a file system has none, and keeps its own file
    try:
        if ours:
            with _named(path):
                path.write_text(f"{os.getpid()}\n{platform.node()}\n")
        yield
    finally:
        if ours:
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def first_of(path: Path, *, patience: float, waiting: Callable[[], None]) -> Iterator[bool]:
    """Let one process do something that others would do too, such as those of a run that start at the same moment.

    Args:
        path: path of a lock file; its folder is made where it is missing.
        patience: seconds that the others wait for the first one.
        waiting: function that is called where they wait for longer than a moment.

    Yields:
        Whether this process is the first one. Otherwise the first one has ended, or patience has.

    Raises:
        OSError: there can be no such file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    is_first, seconds = False, 0.0
    for seconds in (0.0, _MOMENT, patience):
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            if seconds == _MOMENT:
                waiting()
            continue
        is_first = seconds == 0.0
        break
    if not is_first:
        lock.release()
    try:
        yield is_first
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether another process, or this one, holds the lock of a folder."""
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def _holder(path: Path) -> str:
    """The process that has a lock, as it wrote itself into the lock file."""
    try:
        pid, host, *_ = path.read_text().splitlines()
    except (OSError, ValueError):  # it has begun or ended at this moment
        return "another process"
    return f"process {pid} on {host}"


def remove_parts(folder: Path) -> None:
    """Remove the incomplete files that killed processes left in a locked folder and below."""
    for left in folder.rglob(f".*{PART}"):
        left.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path, *, last: str, argument: str) -> Iterator[Path]:
    """A temporary folder to fill. Its files are moved to `folder` when all of them are complete; a failure leaves `folder` as it was.

    Args:
        folder: a new or empty folder, or one in which a killed process had begun.
        last: name of the file that is moved last, by which readers know the folder.
        argument: what the user calls the folder, for messages.

    Raises:
        ValueError: the folder has something in it already, or is a file, or another process is filling it.
    """
    was_there = folder.exists()
    _require_empty(folder, argument)
    with _removed_unless_filled(folder, keep=was_there), locked(folder, argument=argument):
        _require_empty(folder, argument)  # another process may have filled it a moment ago
        part = folder / f".new{PART}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            paths = sorted(part.iterdir(), key=lambda path: path.name == last)
            for path in paths:
                _flush(path)
            for path in paths:
                path.replace(folder / path.name)
            _flush(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _removed_unless_filled(folder: Path, *, keep: bool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if not keep:
            with suppress(OSError):  # another process has written to it, or is about to
                folder.rmdir()
        raise


def _require_empty(folder: Path, argument: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{argument}: {folder} is a file; accepted: a new or empty folder")
    if folder.exists() and any(path.name not in (LOCK, f".new{PART}") for path in folder.iterdir()):
        raise ValueError(f"{argument}: {folder} is not empty and nothing is overwritten; accepted: a new or empty folder")


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do this for a folder
            raise
    finally:
        os.close(descriptor)
