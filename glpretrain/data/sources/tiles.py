"""Tiles that `cut_slides` has written, as a source: what the index names, read from the shards."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from glpretrain.data.sources.base import Item, Source, Subset, UnreadableItemError, checked_index
from glpretrain.data.sources.images import DAMAGE, from_pil
from glpretrain.prepare.slides.folder import INDEX, SETTINGS

_TEST_SHARE = 0.2


class TileFolder(Source):
    """The tiles of all slides of a folder that are complete, slide by slide.

    Args:
        root: the folder.
        channels: of every item, 1 or 3.
        labels: `folders`: slides that were found in at least two folders are of the class that their first folder names, and are divided
            into training and test slides; else there are no classes. `slides`: each slide is a class. `none`.

    Raises:
        ValueError: it is no such folder, or there is no tile in it.
    """

    def __init__(self, root: str | Path, *, channels: int = 3, labels: Literal["folders", "slides", "none"] = "folders") -> None:
        self.root = Path(root).expanduser()
        self.channels, self.labels = channels, labels
        if channels not in (1, 3):
            raise ValueError(f"TileFolder: channels is 1 or 3, not {channels}")
        if not (self.root / SETTINGS).is_file():
            raise ValueError(f"TileFolder: {self.root} is no folder that `glpretrain tiles` wrote")
        index = self.root / INDEX
        self._read(index)
        if len(self) == 0:
            raise ValueError(f"TileFolder: no tile in {index}; `glpretrain tiles` with the same arguments goes on where it was stopped")
        of_slide = self.slides if labels == "slides" else [name.split("/")[0] if "/" in name else "" for name in self.slides]
        names = sorted(set(of_slide))
        with_classes = labels == "slides" or (labels == "folders" and len(names) > 1 and "" not in names)
        self._classes = names if with_classes else []
        self._class_of_slide = [names.index(name) if with_classes else -1 for name in of_slide]

    def _read(self, index: Path) -> None:
        """The index as arrays: a million tiles take 40 MB, and workers share them."""
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
        self._shards = [self.root / "shards" / name for name in shards]

    slides: list[str]  # names
    slide_of: np.ndarray  # Int[N]  index into `slides`
    corners: np.ndarray  # Int[N 2]  x, y of the upper left corner in pixels of the slide's level 0
    sides: np.ndarray  # Int[N]  in the same pixels
    tissue: np.ndarray  # Float[N]  share of tissue

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a folder that `glpretrain tiles` wrote."""
        return (path / SETTINGS).is_file()

    def __len__(self) -> int:
        return len(self.slide_of)

    def __getitem__(self, index: int) -> Item:
        shard = self._shards[self._shard_of[checked_index(index, len(self))]]
        try:
            with shard.open("rb") as file:
                file.seek(int(self._offset[index]))
                content = file.read(int(self._num_bytes[index]))
            with Image.open(io.BytesIO(content)) as opened:
                image = from_pil(opened, channels=self.channels)
        except DAMAGE as error:
            raise UnreadableItemError(f"{shard}, tile {index}: {error}") from error
        return Item(image=image, label=self._class_of_slide[self.slide_of[index]], instances=None, regions=None)

    def tiles_of(self, slide: str) -> np.ndarray:
        """Int[M]: dataset indices of a slide's tiles."""
        if slide not in self.slides:
            raise ValueError(f"slide: there is no {slide!r} in {self.root}; accepted: {', '.join(self.slides[:10])}")
        return np.flatnonzero(self.slide_of == self.slides.index(slide))

    def train_test_split(self) -> tuple[Source, Source] | None:
        """With classes of folders: a fifth of each class's slides, at least one, is the test part, so that no slide is in both."""
        if self.labels != "folders" or not self._classes:
            return None
        held_out: set[int] = set()
        for kind in range(len(self._classes)):
            members = [slide for slide, of in enumerate(self._class_of_slide) if of == kind]
            if len(members) == 1:
                return None
            held_out |= set(members[-max(1, round(_TEST_SHARE * len(members))) :])
        test = np.isin(self.slide_of, list(held_out))
        return Subset(self, indices=np.flatnonzero(~test).tolist()), Subset(self, indices=np.flatnonzero(test).tolist())
