"""Listings of large folders that outlive a process: each is saved once, and every process that reads the folder maps it into memory.

A saved listing is used again where every folder that was listed still has the inode and the two times (modified, changed) that it had
before it was listed, and so has everything that was left out after a look at it: an entry that is added, removed or renamed moves both
times of its folder. This cannot see

- that a file which a link leads to is removed, or replaced by a folder: this costs an item and a line when the item is read;
- on a network file system, what another machine did a moment ago and this one was not told, which a walk may not see either, nor a change
  within one tick of a server's clock that is seconds behind.

A listing is not saved where it is small; on a file system whose kernel does not keep these times; where something could not be read; and
where something changed so shortly before the walk that a further change might have the same time. Left out: how files are found
(`core.listing`), and which of them are of use.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glpretrain.core.arrays import save_arrays
from glpretrain.core.files import PART, cache_folder, first_of
from glpretrain.core.listing import State, say_once
from glpretrain.data.sources.paths import Paths, Texts

_SETTLED = 3.0  # seconds; the coarsest clock of a file system has steps of two
_PATIENCE = 3600.0  # seconds that a process waits for the walk of another one
_KEPT = 3  # listings of one folder: it may lie on several machines under one name
_ABANDONED = 3600 * 10**9  # nanoseconds after which a file that is not complete belongs to a killed process
_FORMAT = "1"  # raised where a walk finds other files, or the file has other arrays
_STARTED_TOGETHER = ("WORLD_SIZE", "SLURM_NTASKS")
# File systems on which a new entry moves the times of its folder at once. Others, such as those in front of an object store, may not.
_WITH_TIMES = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "overlay", "nfs", "nfs4", "lustre", "ceph")
)
_ESCAPED = re.compile(r"\\([0-7]{3})")


class Listing(NamedTuple):
    """The items below a folder."""

    paths: Paths
    note: str  # what was left out, in words; empty where nothing was
    arrays: Mapping[str, np.ndarray]  # what else is to be known about the items


class Walked(NamedTuple):
    """A listing that was just made, and what tells later whether it is still right."""

    listing: Listing
    states: Sequence[tuple[str, State]]  # by path relative to the folder: what was looked at, and its state before
    real: Iterable[Path]  # the folder itself and those that links in it lead to, without links
    is_certain: bool  # whether all could be read that decides about it

    def states_below(self, folder: str) -> list[tuple[str, State]]:
        """The states by path relative to a folder above, `folder` being the listed one relative to it."""
        return [(os.path.join(folder, name) if name else folder, state) for name, state in self.states]


def listing_of(root: Path, *, walk: Callable[[Path], Walked], rules: str, least: int) -> Listing:
    """What `walk` finds below a folder, or what was found there before, if nothing has changed since.

    Args:
        root: the folder, or a file that holds items.
        walk: function that lists it.
        rules: what else the listing depends on, such as which endings are accepted.
        least: number of items from which on it is worth the disk space to save the listing.
    """
    try:
        saved = _Saved.of(root, rules)
    except RuntimeError:  # a user without a home folder
        return walk(root).listing
    if not _keep_times([Path(os.path.realpath(root))]):
        return walk(root).listing
    if (found := saved.find()) is not None:
        return found
    with saved.turn() as saves:
        if (found := saved.find()) is not None:  # another process has made it meanwhile
            return found
        started = time.time_ns()
        walked = walk(root)
        if saves and len(walked.listing.paths) >= least and _may_be_kept(walked, started) and saved.save(walked):
            return saved.find() or walked.listing
        return walked.listing


def _may_be_kept(walked: Walked, started: int) -> bool:
    """Whether a later look at the states will tell if the listing is still right."""
    before = started - int(_SETTLED * 1e9)
    settled = all(max(state.modified, state.changed) < before for _, state in walked.states)
    return walked.is_certain and settled and _keep_times(walked.real)


def _keep_times(folders: Iterable[Path]) -> bool:
    """Whether all file systems that folders without links, and those below them, lie on are known to move the times of a folder."""
    mounts = _mounts()
    for folder in folders:
        around = max((point for point in mounts if folder.is_relative_to(point)), key=lambda point: len(point.parts), default=None)
        inside = [point for point in mounts if point.is_relative_to(folder)]
        if around is None or not {mounts[point] for point in (around, *inside)} <= _WITH_TIMES:
            return False
    return True


def _mounts() -> dict[Path, str]:
    """Kind of each file system by its place; empty where the system does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return {}
    mounts: dict[Path, str] = {}
    for line in lines:
        place, _, device = line.partition(" - ")
        point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), place.split(" ")[4])
        mounts[Path(point)] = device.split(" ")[0]  # a later line lies over an earlier one
    return mounts


class _Saved(NamedTuple):
    """The saved listings of a folder."""

    root: Path
    folder: Path  # where they are
    key: str

    @classmethod
    def of(cls, root: Path, rules: str) -> "_Saved":
        key = hashlib.sha256(os.fsencode("\0".join((_FORMAT, rules, os.path.realpath(root))))).hexdigest()[:32]
        return cls(root, cache_folder("listings"), key)

    def files(self) -> list[Path]:
        """The newest first."""
        found = {file: State.of(file).modified for file in self.folder.glob(f"{self.key}-*.idx")}
        return sorted(found, key=lambda file: found[file], reverse=True)

    def find(self) -> Listing | None:
        """A listing that is still right; None where there is none."""
        for file in self.files():
            try:
                paths, arrays, facts = Paths.mapped(self.root, file)
                if facts != self._facts():
                    raise ValueError(f"it is one of {facts}")
                names, (note,) = Texts.part_of(arrays, "states"), Texts.part_of(arrays, "note")
            except FileNotFoundError:  # another process has removed it at this moment
                continue
            except (OSError, KeyError, ValueError) as error:
                say_once(f"{self.root}: listed again, since its saved listing {file} is damaged or another's ({error})")
                with suppress(OSError):
                    file.unlink()
                continue
            places = (os.path.join(self.root, name) if name else self.root for name in names)  # the root may be a file
            if all(State.of(place) == tuple(state) for place, state in zip(places, arrays["states"].tolist(), strict=True)):
                with suppress(OSError):  # it may belong to another user
                    os.utime(file)
                return Listing(paths, note, arrays)
        return None

    def _facts(self) -> dict[str, str]:
        return {"what": "a listing of glpretrain", "key": self.key}

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Whether this process saves what it finds. Of those that start together, one does, and the others wait for it."""
        with ExitStack() as stack:
            saves = True
            if any(os.environ.get(name, "1") not in ("", "1") for name in _STARTED_TOGETHER):
                lock = self.folder / f"{self.key}.lock"
                say = partial(say_once, f"{self.root}: another process of this run lists the folder; waiting for it")
                with suppress(OSError):  # nothing can be written there
                    saves = stack.enter_context(first_of(lock, patience=_PATIENCE, waiting=say))
            yield saves

    def save(self, walked: Walked) -> bool:
        """Save a listing, whose place no other listing takes while it is in use; whether this was possible."""
        listing, states = walked.listing, np.array([state for _, state in walked.states], dtype=np.int64)
        arrays = {**listing.paths.arrays(), **listing.arrays, "states": states}
        arrays |= Texts.of(name for name, _ in walked.states).arrays("states") | Texts.of([listing.note]).arrays("note")
        try:
            save_arrays(self.folder / f"{self.key}-{hashlib.sha256(states.data).hexdigest()[:16]}.idx", arrays, facts=self._facts())
            for old in self.files()[_KEPT:]:
                old.unlink(missing_ok=True)
            for part in self.folder.glob(f".{self.key}*{PART}"):
                if time.time_ns() - State.of(part).modified > _ABANDONED:
                    part.unlink(missing_ok=True)
        except OSError as error:
            say_once(f"{self.root}: its listing cannot be saved ({error}); every process lists the folder itself")
            return False
        return True
