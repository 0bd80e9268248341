"""The tiles that `glpretrain tiles` has written, as a source. An index lists them, and they are read from their shards."""

import io
import json
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from glpretrain.core.listing import expanded
from glpretrain.data.sources.base import Item, Source, Subset, check_choice, checked_index
from glpretrain.data.sources.images.decoding import damage_named, decode_pil
from glpretrain.data.sources.images.tar_files import read_range
from glpretrain.prepare.slides.folder import INDEX, SETTINGS

_TEST_SHARE = 0.2


class TileFolder(Source):
    """The tiles of all complete slides of a folder, slide by slide.

    Args:
        root: path of the folder.
        channels: number of channels of every item, 1 or 3.
        labels: what the classes are. `folders`: a slide has the class that its first folder names, if the slides lie in at least two
            folders, and the source has a training and a test split; otherwise there are no classes. `slides`: each slide is a class.
            `none`: there are no classes.

    Raises:
        ValueError: the folder was not written by `glpretrain tiles`, or there is no tile in it.
    """

    accepts = "a folder that `glpretrain tiles` wrote"

    slides: list[str]  # names
    slide_of: np.ndarray  # Int[N]  index into `slides`
    corners: np.ndarray  # Int[N 2]  x, y of the upper left corner in pixels of the slide's level 0
    sides: np.ndarray  # Int[N]  in the same pixels
    tissue: np.ndarray  # Float[N]  share of tissue

    def __init__(self, root: str | Path, *, channels: int = 3, labels: Literal["folders", "slides", "none"] = "folders") -> None:
        self.root = expanded(root)
        self.name, self.channels, self.labels = self.root.resolve().name, channels, labels
        check_choice(channels, (1, 3), what="TileFolder: channels")
        if not (self.root / SETTINGS).is_file():
            raise ValueError(f"TileFolder: {self.root} was not written by `glpretrain tiles`: it has no {SETTINGS}")
        index = self.root / INDEX
        self._read(index)
        if len(self) == 0:
            raise ValueError(f"TileFolder: no tile in {index}; run `glpretrain tiles` with the same arguments again to finish it")
        of_slide = self.slides if labels == "slides" else [name.split("/")[0] if "/" in name else "" for name in self.slides]
        names = sorted(set(of_slide))
        with_classes = labels == "slides" or (labels == "folders" and len(names) > 1 and "" not in names)
        self.classes = names if with_classes else []
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._class_of_slide = [numbers.get(name, -1) for name in of_slide]

    def _read(self, index: Path) -> None:
        """Read the index into arrays: a million tiles take 40 MB, which the worker processes share."""
        slides: dict[str, int] = {}
        shards: dict[str, int] = {}
        rows: list[tuple[int, ...]] = []
        tissue: list[float] = []
        if index.is_file():
            with index.open(encoding="utf-8") as lines:
                for line in lines:
                    entry = json.loads(line)
                    slide, shard = slides.setdefault(entry["slide"], len(slides)), shards.setdefault(entry["shard"], len(shards))
                    rows.append((slide, shard, entry["offset"], entry["num_bytes"], entry["x"], entry["y"], entry["side"]))
                    tissue.append(entry["tissue"])
        table = np.array(rows, dtype=np.int64).reshape(-1, 7)
        self.slides = list(slides)
        self.slide_of, self._shard_of = table[:, 0].astype(np.int32), table[:, 1].astype(np.int32)
        self._offset, self._num_bytes = table[:, 2], table[:, 3].astype(np.int32)
        self.corners, self.sides = table[:, 4:6].astype(np.int32), table[:, 6].astype(np.int32)
        self.tissue = np.array(tissue, dtype=np.float32)
        if outside := next((name for name in shards if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts), None):
            raise ValueError(f"TileFolder: {index} names the shard {outside!r}; accepted: files in {self.root / 'shards'}")
        self._shards = [self.root / "shards" / name for name in shards]

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a folder that `glpretrain tiles` wrote."""
        return (path / SETTINGS).is_file()

    def __len__(self) -> int:
        return len(self.slide_of)

    def __getitem__(self, index: int) -> Item:
        shard = self._shards[self._shard_of[checked_index(index, len(self))]]
        with damage_named(f"{shard}, tile {index}"):
            content = read_range(shard, offset=int(self._offset[index]), size=int(self._num_bytes[index]))
            image = decode_pil(io.BytesIO(content), channels=self.channels)
        return Item(values=image, label=self._class_of_slide[self.slide_of[index]], instances=None, regions=None)

    def _listing(self) -> tuple[object, ...]:
        shards = [shard.name for shard in self._shards]
        return self.slides, self.slide_of, shards, self._shard_of, self._offset, self._num_bytes, self._class_of_slide

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
        return Subset(self, indices=np.flatnonzero(~test).tolist()), Subset(self, indices=np.flatnonzero(test).tolist())
