"""Sounds in tar shards in WebDataset's layout. How shards are read is told in `shard_items`."""

from pathlib import Path, PurePosixPath

import numpy as np

from glpretrain.data.sources.audio.decoding import ENDINGS, AudioSource, audio_item, check_seconds, damage_named, decode_bytes, way_of
from glpretrain.data.sources.base import Item, Stored
from glpretrain.data.sources.kinds import FileKind
from glpretrain.data.sources.shard_items import ACCEPTS, ShardItems, holds_shards

_KIND = FileKind("SoundShards", "sound", ENDINGS)


class SoundShards(AudioSource):
    """Sounds in tar shards, with `.cls` or `.json` beside them or without.

    The sound of a sample is the member whose key is an ending of sounds: `wav` before `flac` before `ogg`. What is left out is counted in
    one line of the log, as by `TarShards`. A member that is damaged, empty or silent is an unreadable item.

    Args:
        root: one `.tar` or `.tar.gz` file, or a folder of them.
        seconds: how much of a sound is read, from its beginning; when left out, all of it.
        sound_key: key of the sounds, such as `flac` or `left.wav`; of several, separated by `;`, the first that a sample has.
        read_ahead: whether the system reads all of a shard when an item of it is asked for, see `TarShards`.
        unpack_to: folder in which compressed shards are unpacked, as they are needed; one among the temporary files when left out.
        unpack_gb: gigabytes of unpacked shards that are kept there.

    Raises:
        ValueError: there is no shard or no sound in them, it is ambiguous which member is the sound, only some sounds have a class, or a
            number is out of range.
    """

    accepts = ACCEPTS

    def __init__(
        self,
        root: str | Path,
        *,
        seconds: float | None = None,
        sound_key: str | None = None,
        read_ahead: bool = False,
        unpack_to: str | None = None,
        unpack_gb: float = 50.0,
    ) -> None:
        check_seconds(seconds, owner="SoundShards")
        self._shards = ShardItems(root, _KIND, key=sound_key, read_ahead=read_ahead, unpack_to=unpack_to, unpack_gb=unpack_gb)
        self.name, self.seconds, self.classes = self._shards.name, seconds, self._shards.classes

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
        member = self._shards.member(index)
        with damage_named(member):
            samples = decode_bytes(self._shards.content(member), ending=PurePosixPath(member.name).suffix, seconds=self.seconds)
        return audio_item(samples, label=self._shards.label_of(index))

    def named(self, index: int) -> str:
        return self._shards.named(index)

    def stored(self, index: int) -> Stored:
        return self._shards.stored(index, way=way_of(self.seconds))

    def _listing(self) -> tuple[object, ...]:
        return self._shards.listing()
