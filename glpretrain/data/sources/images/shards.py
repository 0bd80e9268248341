"""Images in tar shards in WebDataset's layout. How shards are read is told in `shard_items`."""

import io
from pathlib import Path

import numpy as np

from glpretrain.data.sources.base import Item, Source, Stored, check_choice
from glpretrain.data.sources.images.decoding import ENDINGS, MOST_SIDE, damage_named, decode_pil
from glpretrain.data.sources.kinds import FileKind
from glpretrain.data.sources.shard_items import ACCEPTS, ShardItems, holds_shards

_KIND = FileKind("TarShards", "image", tuple(ending for ending in ENDINGS if ending != ".npy"))


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

    accepts = ACCEPTS

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
        check_choice(channels, (1, 3), what="TarShards: channels")
        self._shards = ShardItems(root, _KIND, key=image_key, read_ahead=read_ahead, unpack_to=unpack_to, unpack_gb=unpack_gb)
        self.name, self.channels, self.classes = self._shards.name, channels, self._shards.classes

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a tar file, or a folder with some at its top."""
        return holds_shards(path)

    @property
    def shard_starts(self) -> np.ndarray:
        return self._shards.starts

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Item:
        return self.reduced(index, side=MOST_SIDE)

    def reduced(self, index: int, *, side: int) -> Item:
        member = self._shards.member(index)
        with damage_named(member):
            image = decode_pil(io.BytesIO(self._shards.content(member)), channels=self.channels, side=side)
        return Item(values=image, label=self._shards.label_of(index), instances=None, regions=None)

    def named(self, index: int) -> str:
        return self._shards.named(index)

    def stored(self, index: int) -> Stored:
        return self._shards.stored(index, way=f"image {self.channels}")

    def _listing(self) -> tuple[object, ...]:
        return self._shards.listing()
