"""Features of a frozen encoder, computed once: kept in memory during an evaluation and, where a folder is given, on disk.

Everything is found by content. A batch of features is named by the digests of its items, the size they were brought to, the layer
and the precision; its folder by the encoder's weights and card. So a changed file, weight or setting can never meet old features,
an interrupted evaluation goes on where it stopped, and evaluators that read the same items share one extraction. Only `cls` and as much
of `patches` as was asked for are kept: an output that comes from the cache has no registers.

Any number of processes may share a folder: a file in it is complete or absent, and one that is removed meanwhile is computed again.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from glpretrain.core.files import PART, cache_folder, part_file, write_json
from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.states import fingerprint
from glpretrain.evaluate.known_files import KnownFiles, record_files
from glpretrain.evaluate.reading import Patches
from glpretrain.evaluate.team import Team

_LOG = logging.getLogger(__name__)
_MEMORY_BYTES = 1 << 30
DISK_GB = 10.0
_CARD, _OF_FILES = "card.json", "files"
_FOLDER, _FILE = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{64}\.(cls|pooled|patches)\.safetensors")
_ABANDONED = 3600.0  # seconds after which a file that is not complete belongs to a killed process


def default_folder() -> Path:
    """`glpretrain/features` below the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return cache_folder("features")


class FeatureCache:
    """The features of one encoder.

    Args:
        encoder: the encoder; its weights must not change while the cache is used.
        folder: folder where features outlive the process; None keeps them in memory only.
        memory_bytes: number of bytes that are kept in memory at most; more is read from the folder, or computed again.
        disk_gb: number of gigabytes, of all encoders together, that the folder is kept to; what was not used for longest goes first.
        team: other processes that compute their share of what is not in the cache.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        folder: Path | None = None,
        memory_bytes: int = _MEMORY_BYTES,
        disk_gb: float = DISK_GB,
        team: Team | None = None,
    ) -> None:
        if not 0 < disk_gb < float("inf"):
            raise ValueError(f"cache_gb: {disk_gb}; accepted: a positive number of gigabytes, or --no_cache")
        self.encoder, self.memory_bytes, self.team = encoder, memory_bytes, team
        self.fingerprint = fingerprint(encoder)
        self.folder = None if folder is None else folder / self.fingerprint[:32]
        self._limit = int(disk_gb * 1e9)
        self._unchecked = self._limit  # bytes written since the folder was last compared with the limit; at first, by anyone
        self.num_computed = 0  # batches that had to be encoded
        self.files = None if folder is None else KnownFiles(folder / _OF_FILES)
        self._memory: dict[str, Tensor] = {}
        self._bytes = 0

    def has(self, name: str, *, patches: Patches) -> bool:
        """Whether the features of a batch were computed; another process may remove them at any moment."""
        parts = {"none": (), "pooled": ("pooled", "patches"), "all": ("patches",)}[patches]
        return self._has(f"{name}.cls") and (not parts or any(self._has(f"{name}.{part}") for part in parts))

    def _has(self, name: str) -> bool:
        return name in self._memory or (self.folder is not None and (self.folder / f"{name}.safetensors").is_file())

    def find(self, name: str, *, patches: Patches) -> EncoderOutput | None:
        """The features of a batch, on the CPU, as `with_patches` gives them; None where they were not computed yet.

        Args:
            name: name of the batch.
            patches: how much of the patches is needed.
        """
        cls = self._find(f"{name}.cls")
        if cls is None:
            return None
        if patches == "none":
            return EncoderOutput(cls, cls.new_empty(len(cls), 0, cls.shape[1]))
        found = self._find(f"{name}.{_PART_OF[patches]}")
        if found is None and patches == "pooled" and (every := self._find(f"{name}.patches")) is not None:
            return with_patches(EncoderOutput(cls, every), "pooled")
        return None if found is None else EncoderOutput(cls, found)

    def keep(self, name: str, output: EncoderOutput, *, patches: Patches) -> None:
        """Keep the features of a batch.

        Args:
            name: name of the batch.
            output: features of the batch on the CPU, as `with_patches` gives them.
            patches: how much of the patches there is; all those of a large set of which less was needed would fill a disk.
        """
        self.num_computed += 1
        parts = {"cls": output.cls} | ({} if patches == "none" else {_PART_OF[patches]: output.patches})
        # Kept apart: k-NN over a large set neither reads nor writes the patches.
        for part, rows in parts.items():
            tensor = rows.contiguous()
            self._remember(f"{name}.{part}", tensor)
            if self.folder is not None:
                self._write(self.folder, f"{name}.{part}.safetensors", {part: tensor.clone()})

    def _write(self, folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a file. Where that fails, features are kept in memory only from then on, because a full disk must not cost a score."""
        for attempt in ("first", "second"):
            try:
                if not (folder / _CARD).is_file():
                    write_json(folder / _CARD, self.encoder.card.to_json())
                with part_file(folder / name) as part:
                    save_file(tensors, part)
                    self._unchecked += part.stat().st_size
                break
            except (OSError, SafetensorError) as error:
                if attempt == "second" or not isinstance(error, FileNotFoundError):  # another process removed the folder at this moment
                    _LOG.warning("features cannot be kept in %s (%s); from here on they are kept in memory only", folder, error)
                    self.folder = None
                    return
        if self._unchecked >= self._limit / 20:
            shrink(folder.parent, to=self._limit)
            self._unchecked = 0

    def _find(self, name: str) -> Tensor | None:
        if name in self._memory:
            return self._memory[name]
        tensor = None if self.folder is None else _read(self.folder / f"{name}.safetensors")
        if tensor is not None:
            self._remember(name, tensor)
        return tensor

    def _remember(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._bytes + size <= self.memory_bytes:
            self._memory[name] = tensor
            self._bytes += size


_PART_OF: dict[Patches, str] = {"pooled": "pooled", "all": "patches"}


def with_patches(output: EncoderOutput, patches: Patches) -> EncoderOutput:
    """The features with as much of the patches as is needed, in tensors that keep no others alive: a `cls` is often a view of all tokens.

    Args:
        output: features with all patches, Float[B N D].
        patches: how much of these is needed.
    """
    cls = output.cls.clone(memory_format=torch.contiguous_format)
    if patches == "none":
        return EncoderOutput(cls, cls.new_empty(len(cls), 0, cls.shape[1]))
    if patches == "pooled":
        return EncoderOutput(cls, torch.stack([output.patches.mean(dim=1), output.patches.amax(dim=1)], dim=1))  # [B 2 D]
    return EncoderOutput(cls, output.patches)


def _read(path: Path) -> Tensor | None:
    try:
        (tensor,) = load(path.read_bytes()).values()  # the file is opened once: another process may remove it at any moment
    except FileNotFoundError:  # not computed yet, or removed at this moment
        return None
    except (OSError, SafetensorError, ValueError) as error:
        _LOG.warning("cached features %s cannot be read (%s); they are computed again", path, error)
        return None
    with suppress(OSError):  # a folder of another user, say
        os.utime(path)  # the last use, by which `shrink` chooses: few file systems keep the time of reading
    return tensor


class Entry(NamedTuple):
    """The features of one encoder in a folder of features."""

    name: str  # of the encoder, by its card
    source: str  # where its weights come from, by its card
    num_files: int  # one per batch and part
    num_bytes: int
    last_use: datetime


def entries(root: Path) -> list[Entry]:
    """What a folder of features holds, the encoder that was used last first.

    Args:
        root: folder that `FeatureCache` was given.
    """
    found: list[Entry] = []
    for folder in _folders(root):
        if files := list(_files(folder)):
            size, last = sum(file.num_bytes for file in files), datetime.fromtimestamp(max(files).last_use)
            found.append(Entry(*_described(folder), len(files), size, last))
    return sorted(found, key=lambda entry: entry.last_use, reverse=True)


def shrink(root: Path, *, to: int) -> tuple[int, int]:
    """Remove what was not used for longest, until a tenth less than `to` bytes are left; nothing where all fit.

    Only files that `FeatureCache` writes are removed. A process that was about to read one computes it again.

    Args:
        root: folder that `FeatureCache` was given.
        to: number of bytes; 0 removes all.

    Returns:
        Numbers of files and of bytes that were removed.
    """
    folders = [*_folders(root), *([root / _OF_FILES] if (root / _OF_FILES).is_dir() else [])]
    files = sorted(file for folder in folders for file in _files(folder))
    left = sum(file.num_bytes for file in files)
    goal = to if left <= to else 0.9 * to
    num_files = num_bytes = 0
    for file in files:
        if left - num_bytes > goal or to == 0:
            file.path.unlink(missing_ok=True)
            num_files, num_bytes = num_files + 1, num_bytes + file.num_bytes
    for folder in folders:
        for part in folder.glob(f".*{PART}"):
            with suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > _ABANDONED:
                    part.unlink()
        if not any(path.name != _CARD for path in folder.iterdir()):
            (folder / _CARD).unlink(missing_ok=True)
            with suppress(OSError):  # another process writes to it again
                folder.rmdir()
    return num_files, num_bytes


class _File(NamedTuple):
    last_use: float
    num_bytes: int
    path: Path


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()] if root.is_dir() else []


def _files(folder: Path) -> Iterator[_File]:
    records = set(record_files(folder)) if folder.name == _OF_FILES else set()
    for path in folder.iterdir():
        if _FILE.fullmatch(path.name) or path in records:
            with suppress(FileNotFoundError):  # removed by another process
                status = path.stat()
                yield _File(status.st_mtime, status.st_size, path)


def _described(folder: Path) -> tuple[str, str]:
    try:
        card = EncoderCard.from_json(json.loads((folder / _CARD).read_text()))
    except (OSError, ValueError):
        return folder.name, "its card cannot be read"
    return str(card.arguments.get("name", card.encoder)), card.source
