"""One tar shard of tiles and the lines that index it, complete or absent.

A shard is a plain tar that `TarShards` and WebDataset read. Its bytes depend on the tiles alone: no time, owner or process is in them.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from glpretrain.prepare.slides.settings import Settings

PART = ".part"  # ending of what is not complete yet
_BLOCK = 512  # bytes: tar's unit


class TileEntry(NamedTuple):
    """A line of the index: where a tile was cut and where its bytes are."""

    slide: str
    level: int
    x: int  # left edge in pixels of level 0
    y: int  # top edge
    side: int  # in pixels of level 0
    mpp: float  # microns along one pixel of the tile
    tissue: float  # share of it
    shard: str  # path of the tar below the folder of shards
    offset: int  # of the image in the tar
    num_bytes: int  # of the image


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there entirely or, after a kill at any moment, not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Beside(path) as part:
        part.write_bytes(content)


class Beside:
    """A name beside `path` to write to; moved over it once all is written and on disk, removed when something fails.

    Args:
        path: where the content goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # With the process in it: one that outlives its parent for a moment must not write into the next run's.
        self.part = path.with_name(f".{path.name}.{os.getpid()}{PART}")

    def __enter__(self) -> Path:
        return self.part

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.part.unlink(missing_ok=True)
            return
        with self.part.open("rb") as file:
            os.fsync(file.fileno())
        self.part.replace(self.path)


def write_shard(folder: Path, shard: str, tiles: Iterable[tuple[TileEntry, np.ndarray]], *, settings: Settings) -> None:
    """Write a tar and, before it, its index: where the tar is, so is the index.

    Args:
        folder: of the shards.
        shard: path of the tar below it.
        tiles: entries without offset and size, each with UInt8[H W 3].
        settings: format and quality.
    """
    path = folder / shard
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with Beside(path) as part:
        with part.open("wb") as file:
            for entry, pixels in tiles:
                content = encoded_image(pixels, format=settings.format, quality=settings.quality)
                # A slide's name may hold dots; a sample's name ends at the first one after the last slash.
                member = tarfile.TarInfo(f"{entry.slide}/{entry.x:07d}_{entry.y:07d}.{settings.format}")
                member.size, member.mode = len(content), 0o644
                file.write(member.tobuf(tarfile.GNU_FORMAT))
                entry = entry._replace(offset=file.tell(), num_bytes=len(content))
                file.write(content)
                file.write(bytes(-len(content) % _BLOCK))
                lines.append(json.dumps(entry._asdict()) + "\n")
            file.write(bytes(2 * _BLOCK))
        write_whole(index_of(path), "".join(lines).encode())


def index_of(shard: Path) -> Path:
    """The lines beside a tar."""
    return shard.with_suffix(".jsonl")


def encoded_image(pixels: np.ndarray, *, format: Literal["jpg", "png"], quality: int = 90) -> bytes:
    """UInt8[H W 3] as a file; JPEG with colours at full resolution, because stains differ at the borders of cells."""
    buffer = io.BytesIO()
    if format == "jpg":
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
