"""Tar shards in WebDataset's layout as sources.

A shard is a tar file, plain or compressed by gzip. The name of a sample ends at the first dot of the file name, and what follows it is the
key of the member. Beside its image, a sample may hold `.cls` (the name or number of the class) or `.json` (with a `label`). The headers are
read when the source is constructed, and never again while the shards stay as they are (`saved_listings`). A shard is opened when an item of
it is asked for, and items are read at their offset, in any order. Left out: other compression, and URLs.
"""

import io
import tarfile
from functools import partial
from pathlib import Path

import numpy as np

from glpretrain.core.listing import expanded, say_once
from glpretrain.data.sources.base import Item, Source, Stored, check_choice, checked_index
from glpretrain.data.sources.images.decoding import MOST_SIDE, damage_named, decode_pil
from glpretrain.data.sources.paths import Texts
from glpretrain.data.sources.saved_listings import listing_of
from glpretrain.data.sources.shard_headers import IMAGE_KINDS, is_shard, read_headers
from glpretrain.data.sources.tar_files import Member, ReadAhead
from glpretrain.data.sources.unpacked import Unpacked

_LEAST = 10_000  # samples, whose headers are read in a second


class TarShards(Source):
    """Images in tar shards.

    The image of a sample is the member whose key is an image ending: `jpg` before `jpeg` before `png`. A sample with a longer key, such as
    `rgb.jpg`, is read if it has no other image. Samples without an image or with a damaged label are left out. A damaged shard is read as
    far as it is whole. One line in the log counts what was left out.

    Args:
        root: one `.tar` file, or a folder of them.
        channels: number of channels of every item, 1 or 3.
        image_key: key of the images, such as `jpg` or `rgb.png`; of several, separated by `;`, the first that a sample has. When left out,
            as above.
        read_ahead: whether the system reads all of a shard when an item of it is asked for: with the order `ByShard`, a disk that seeks
            badly then reads shard after shard. The shards that are read together have to fit into memory beside the rest.
        unpack_to: folder in which compressed shards are unpacked, as they are needed; one among the temporary files when left out.
        unpack_gb: gigabytes of unpacked shards that are kept there.

    Raises:
        ValueError: there is no shard or no image in them, it is ambiguous which member is the image, only some images have a class, or
            `unpack_gb` is out of range.
    """

    accepts = "a .tar or .tar.gz file or a folder of them"

    def __init__(
        self,
        root: str | Path,
        *,
        channels: int = 3,
        image_key: str | None = None,
        read_ahead: bool = False,
        unpack_to: str | None = None,
        unpack_gb: float = 50.0,
    ) -> None:
        self.root = expanded(root)
        self.name, self.channels = self.root.resolve().stem, channels
        check_choice(channels, (1, 3), what="TarShards: channels")
        if not 0 < unpack_gb < float("inf"):
            raise ValueError(f"TarShards: unpack_gb is {unpack_gb}; expected a positive number of gigabytes")
        self._unpacked = Unpacked(None if unpack_to is None else expanded(unpack_to), most_bytes=1e9 * unpack_gb)
        self._ahead = ReadAhead() if read_ahead else None
        rules = f"shards, gz {' '.join(IMAGE_KINDS)} {image_key} {self.root}"  # which is in the note
        walk = partial(read_headers, image_key=image_key, unpacked=self._unpacked)
        found = listing_of(self.root, walk=walk, rules=rules, least=_LEAST)
        self._names, self._places, self._labels = found.paths, found.arrays["places"], found.arrays["labels"]
        self.classes = list(Texts.part_of(found.arrays, "classes"))
        if found.note:
            say_once(f"TarShards: {self.root}: {found.note}")

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a tar file, or a folder with some at its top."""
        if path.is_file():
            return is_shard(path) or tarfile.is_tarfile(path)
        return path.is_dir() and any(map(is_shard, path.iterdir()))

    @property
    def shard_starts(self) -> np.ndarray:
        return np.flatnonzero(np.diff(self._names.folder_of, prepend=-1))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Item:
        return self.reduced(index, side=MOST_SIDE)

    def reduced(self, index: int, *, side: int) -> Item:
        shard, name = self._names.parts(checked_index(index, len(self)))
        member = Member(self.root / shard, name, *self._places[index].tolist())
        with damage_named(member):
            if self._ahead is not None:
                self._ahead.of(self._unpacked.plain(member.shard))
            content = self._unpacked.read(member.shard, offset=member.offset, size=member.size)
            image = decode_pil(io.BytesIO(content), channels=self.channels, side=side)
        return Item(values=image, label=int(self._labels[index]), instances=None, regions=None)

    def named(self, index: int) -> str:
        shard, name = self._names.parts(index)
        return f"{self.root.name if shard == '.' else shard}:{name}"  # `.` where the source is one file

    def stored(self, index: int) -> Stored:
        shard, _ = self._names.parts(index)
        return Stored(self.root / shard, f"image {self.channels} at {self._places[index].tolist()}", int(self._labels[index]))

    def _listing(self) -> tuple[object, ...]:
        return self._names.digest(), self._places, self._labels
