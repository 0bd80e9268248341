"""One tar shard of tiles and its lines of the index. After a kill at any moment a file is either complete or absent.

A shard is a plain tar that `TarShards` and WebDataset read. Its bytes depend on the tiles only: they contain no time, owner or process.
"""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from glpretrain.core.files import part_file, write_whole

_BLOCK = 512  # bytes: the unit of a tar file


class TileEntry(NamedTuple):
    """A line of the index: where a tile was cut, and where its bytes are."""

    slide: str
    level: int
    x: int  # left edge in pixels of level 0
    y: int  # top edge
    side: int  # in pixels of level 0
    mpp: float  # microns along one pixel of the tile
    tissue: float  # share of tissue
    shard: str  # path of the tar, relative to the folder of shards
    offset: int  # of the image in the tar
    num_bytes: int  # of the image


def write_shard(
    folder: Path, shard: str, tiles: Iterable[tuple[TileEntry, np.ndarray]], *, format: Literal["jpg", "png"], quality: int
) -> None:
    """Write a tar and, before it, its lines of the index, so that no tar is without them.

    Args:
        folder: folder of the shards.
        shard: path of the tar, relative to `folder`.
        tiles: entries without offset and size, each with UInt8[H W 3].
        format: format of the images.
        quality: quality of JPEG.
    """
    path = folder / shard
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with part_file(path) as part:
        with part.open("wb") as file:
            for entry, pixels in tiles:
                content = encoded_image(pixels, format=format, quality=quality)
                # The name of a slide may contain dots, and the name of a sample ends at the first dot after the last slash.
                member = tarfile.TarInfo(f"{entry.slide}/{entry.x:07d}_{entry.y:07d}.{format}")
                member.size, member.mode = len(content), 0o644
                file.write(member.tobuf(tarfile.GNU_FORMAT))
                entry = entry._replace(offset=file.tell(), num_bytes=len(content))
                file.write(content)
                file.write(bytes(-len(content) % _BLOCK))
                lines.append(json.dumps(entry._asdict(), allow_nan=False) + "\n")
            file.write(bytes(2 * _BLOCK))
        write_whole(index_of(path), "".join(lines).encode())


def index_of(shard: Path) -> Path:
    """The file with the lines of the index for a tar."""
    return shard.with_suffix(".jsonl")


def encoded_image(pixels: np.ndarray, *, format: Literal["jpg", "png"], quality: int = 90) -> bytes:
    """UInt8[H W 3] as the content of a file. JPEG keeps colours at full resolution, because stains differ at the borders of cells."""
    buffer = io.BytesIO()
    if format == "jpg":
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
