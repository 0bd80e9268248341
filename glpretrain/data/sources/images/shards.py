"""Tar shards in WebDataset's layout as sources.

A shard is a plain tar file. The name of a sample ends at the first dot of the file name, and what follows it is the key of the member.
Beside its image, a sample may hold `.cls` (the name or number of the class) or `.json` (with a `label`). The headers are read when the
source is constructed, and never again while the shards stay as they are (`saved_listings`); items are read at their offset, in any order.
Left out: compressed shards, and URLs.
"""

import io
import tarfile
from functools import partial
from pathlib import Path

from glpretrain.core.listing import expanded, say_once
from glpretrain.data.sources.base import Item, Source, Stored, check_choice, checked_index
from glpretrain.data.sources.images.decoding import MOST_SIDE, damage_named, decode_pil
from glpretrain.data.sources.images.shard_headers import IMAGE_KINDS, is_shard, read_headers
from glpretrain.data.sources.images.tar_files import Member, read_range
from glpretrain.data.sources.paths import Texts
from glpretrain.data.sources.saved_listings import listing_of

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

    Raises:
        ValueError: there is no shard or no image in them, it is ambiguous which member is the image, or only some images have a class.
    """

    accepts = "a .tar file or a folder of them"

    def __init__(self, root: str | Path, *, channels: int = 3, image_key: str | None = None) -> None:
        self.root = expanded(root)
        self.name, self.channels = self.root.resolve().stem, channels
        check_choice(channels, (1, 3), what="TarShards: channels")
        rules = f"shards {' '.join(IMAGE_KINDS)} {image_key} {self.root}"  # which is in the note
        found = listing_of(self.root, walk=partial(read_headers, image_key=image_key), rules=rules, least=_LEAST)
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

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Item:
        return self.reduced(index, side=MOST_SIDE)

    def reduced(self, index: int, *, side: int) -> Item:
        shard, name = self._names.parts(checked_index(index, len(self)))
        member = Member(self.root / shard, name, *self._places[index].tolist())
        with damage_named(member):
            content = read_range(member.shard, offset=member.offset, size=member.size)
            image = decode_pil(io.BytesIO(content), channels=self.channels, side=side)
        return Item(values=image, label=int(self._labels[index]), instances=None, regions=None)

    def stored(self, index: int) -> Stored:
        shard, _ = self._names.parts(index)
        return Stored(self.root / shard, f"image {self.channels} at {self._places[index].tolist()}", int(self._labels[index]))

    def _listing(self) -> tuple[object, ...]:
        return self._names.digest(), self._places, self._labels
