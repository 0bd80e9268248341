"""The tiles that `glpretrain tiles` has written, as a source. An index lists them, and they are read from their shards.

What training needs of a tile are 8 bytes: where its image lies in the shard, and how long it is. Slide and shard are the same for
hundreds of tiles that follow one another, so they are kept once for each run of tiles. Where a tile was cut is read when it is asked for.
A long index is read once, and mapped into memory while it stays as it is (`saved_listings`).
"""

import io
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from glpretrain.core.listing import State, expanded
from glpretrain.data.sources.base import Item, Source, Stored, Subset, check_choice, checked_index
from glpretrain.data.sources.images.decoding import damage_named, decode_pil
from glpretrain.data.sources.paths import Paths, Texts
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of
from glpretrain.data.sources.tar_files import ReadAhead, read_range
from glpretrain.prepare.slides.folder import INDEX, SETTINGS

_TEST_SHARE = 0.2
_LEAST = 16  # shards, whose lines are read in a fifth of a second


class TileFolder(Source):
    """The tiles of all complete slides of a folder, slide by slide.

    Args:
        root: path of the folder.
        channels: number of channels of every item, 1 or 3.
        labels: what the classes are. `folders`: a slide has the class that its first folder names, if the slides lie in at least two
            folders, and the source has a training and a test split; otherwise there are no classes. `slides`: each slide is a class.
            `none`: there are no classes.
        read_ahead: as for `TarShards`.

    Raises:
        ValueError: the folder was not written by `glpretrain tiles`, or there is no tile in it.
    """

    accepts = "a folder that `glpretrain tiles` wrote"

    slides: list[str]  # names

    def __init__(
        self,
        root: str | Path,
        *,
        channels: int = 3,
        labels: Literal["folders", "slides", "none"] = "folders",
        read_ahead: bool = False,
    ) -> None:
        self.root = expanded(root)
        self._ahead = ReadAhead() if read_ahead else None
        self.name, self.channels, self.labels = self.root.resolve().name, channels, labels
        check_choice(channels, (1, 3), what="TileFolder: channels")
        if not (self.root / SETTINGS).is_file():
            raise ValueError(f"TileFolder: {self.root} was not written by `glpretrain tiles`: it has no {SETTINGS}")
        index = self.root / INDEX
        found = listing_of(index, walk=_read, rules="tiles", least=_LEAST)
        self._shards, self.slides = found.paths.with_root(self.root / "shards"), list(Texts.part_of(found.arrays, "slides"))
        self._offset, self._num_bytes = found.arrays["offsets"], found.arrays["sizes"]
        self._starts, self._slide_of_run, self._shard_of_run = (found.arrays[name] for name in ("starts", "slide_of_run", "shard_of_run"))
        if len(self) == 0:
            raise ValueError(f"TileFolder: no tile in {index}; run `glpretrain tiles` with the same arguments again to finish it")
        of_slide = self.slides if labels == "slides" else [name.split("/")[0] if "/" in name else "" for name in self.slides]
        names = sorted(set(of_slide))
        with_classes = labels == "slides" or (labels == "folders" and len(names) > 1 and "" not in names)
        self.classes = names if with_classes else []
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._class_of_slide = [numbers.get(name, -1) for name in of_slide]

    def _column(self, name: str, dtype: type) -> np.ndarray:
        return np.fromiter((entry[name] for entry in _entries(self.root / INDEX)), dtype=dtype, count=len(self))

    def _spread(self, of_run: np.ndarray) -> np.ndarray:
        """A value of every run, Int[R], for each of its tiles, Int[N]."""
        return np.repeat(of_run, np.diff(self._starts, append=len(self)))

    @property
    def shard_starts(self) -> np.ndarray:
        return self._starts[np.flatnonzero(np.diff(self._shard_of_run, prepend=-1))]

    @property
    def groups(self) -> Sequence[str]:
        """Name of the slide of each tile."""
        return [self.slides[slide] for slide in self.slide_of]

    @property
    def slide_of(self) -> np.ndarray:
        """Int[N]: index into `slides`."""
        return self._spread(self._slide_of_run)

    @cached_property
    def corners(self) -> np.ndarray:
        """Int[N 2]: x and y of the upper left corner in pixels of the slide's level 0."""
        return np.stack([self._column(axis, np.int32) for axis in "xy"], axis=1)

    @cached_property
    def sides(self) -> np.ndarray:
        """Int[N]: side in the same pixels."""
        return self._column("side", np.int32)

    @cached_property
    def tissue(self) -> np.ndarray:
        """Float[N]: share of tissue."""
        return self._column("tissue", np.float32)

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a folder that `glpretrain tiles` wrote."""
        return (path / SETTINGS).is_file()

    def __len__(self) -> int:
        return len(self._offset)

    def __getitem__(self, index: int) -> Item:
        run = int(np.searchsorted(self._starts, checked_index(index, len(self)), side="right")) - 1
        shard = self._shards[int(self._shard_of_run[run])]
        with damage_named(f"{shard}, tile {index}"):
            if self._ahead is not None:
                self._ahead.of(shard)
            content = read_range(shard, offset=int(self._offset[index]), size=int(self._num_bytes[index]))
            image = decode_pil(io.BytesIO(content), channels=self.channels)
        return Item(values=image, label=self._class_of_slide[self._slide_of_run[run]], instances=None, regions=None)

    def named(self, index: int) -> str:
        run = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.slides[self._slide_of_run[run]]}:{index}"

    def stored(self, index: int) -> Stored:
        run = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = f"tile at {int(self._offset[index])} of {int(self._num_bytes[index])} bytes"
        return Stored(self._shards[self._shard_of_run[run]], f"{place}, {self.channels}", self._class_of_slide[self._slide_of_run[run]])

    def _listing(self) -> tuple[object, ...]:
        shards = [shard.name for shard in self._shards]
        offsets = self._offset.astype(np.int64)
        return self.slides, self.slide_of, shards, self._spread(self._shard_of_run), offsets, self._num_bytes, self._class_of_slide

    def tiles_of(self, slide: str) -> np.ndarray:
        """Int[M]: dataset indices of the tiles of a slide."""
        if slide not in self.slides:
            raise ValueError(f"slide: {slide!r} is not in {self.root}; accepted: {', '.join(self.slides[:10])}")
        return np.flatnonzero(self.slide_of == self.slides.index(slide))

    def train_test_split(self) -> tuple[Source, Source] | None:
        """Where folders are the classes: a fifth of the slides of each class, at least one, is the test split. No slide is in both."""
        if self.labels != "folders" or not self.classes:
            return None
        held_out: set[int] = set()
        for kind in range(len(self.classes)):
            members = [slide for slide, of in enumerate(self._class_of_slide) if of == kind]
            if len(members) == 1:
                return None
            held_out |= set(members[-max(1, round(_TEST_SHARE * len(members))) :])
        test = np.isin(self.slide_of, list(held_out))
        return Subset(self, indices=np.flatnonzero(~test)), Subset(self, indices=np.flatnonzero(test))


def _entries(index: Path) -> Iterator[dict]:
    if index.is_file():
        with index.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _read(index: Path) -> Walked:
    """What an index says, in arrays; the paths are those of the shards.

    Raises:
        ValueError: a shard lies elsewhere.
    """
    state = State.of(index)
    slides: dict[str, int] = {}
    shards: dict[str, int] = {}
    offsets, sizes = array("Q"), array("I")
    starts, runs = array("q"), array("i")  # first tile of a run; its slide and its shard
    last: tuple[str, str] | None = None
    for number, entry in enumerate(_entries(index)):
        if (here := (entry["slide"], entry["shard"])) != last:
            last = here
            starts.append(number)
            runs.extend((slides.setdefault(here[0], len(slides)), shards.setdefault(here[1], len(shards))))
        offsets.append(entry["offset"])
        sizes.append(entry["num_bytes"])
    if outside := next((name for name in shards if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts), None):
        raise ValueError(f"TileFolder: {index} names the shard {outside!r}; accepted: files in {index.parent / 'shards'}")
    table = np.array(runs, dtype=np.int32).reshape(-1, 2)
    places = np.array(offsets, dtype=np.int64)
    arrays = {
        "offsets": places.astype(np.uint32) if len(places) and places.max() < 1 << 32 else places,
        "sizes": np.array(sizes, dtype=np.int32),
        "starts": np.array(starts, dtype=np.int64),
        "slide_of_run": table[:, 0].copy(),
        "shard_of_run": table[:, 1].copy(),
    }
    listing = Listing(Paths.of(index.parent, shards), "", arrays | Texts.of(slides).arrays("slides"))
    return Walked(listing, [("", state)], [Path(os.path.realpath(index)).parent], state.inode != 0)
