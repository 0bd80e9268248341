"""The folder of tiles: its settings, its files, and which slides are complete.

    tiles.json               the settings
    index.jsonl              one line per tile of every complete slide; `TileFolder` reads it
    shards/<slide>-00000.tar tiles; beside it lie the lines of the index for this shard
    slides/<slide>.json      what the slide is and how it was cut; `complete` is written last
    overviews/<slide>.png    the slide with tissue and tiles drawn on it

Every file is moved to its place when it is complete. Left out: cutting.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from glpretrain.core.files import locked, part_file, remove_parts, write_json
from glpretrain.prepare.slides.shard import index_of

SETTINGS, INDEX = "tiles.json", "index.jsonl"
_VERSION = 1  # raise it when the same settings give other tiles; it is compared like a setting
_SAMPLE = 1 << 16  # bytes at both ends of a file that identify it


class Settings(NamedTuple):
    """Size, resolution, least share of tissue, and format of tiles. All tiles in a folder have the same settings."""

    size: int = 224  # pixels along the side of a tile
    mpp: float = 0.5  # microns along one pixel of a tile
    overlap: int = 0  # pixels that neighbouring tiles share
    min_tissue: float = 0.5  # least share of tissue in a tile
    format: Literal["jpg", "png"] = "jpg"
    quality: int = 90  # of JPEG
    per_shard: int = 2048  # tiles in a shard at most
    mpp_of_slide: float | None = None  # microns along a pixel of level 0, for slides whose files do not give it

    def checked(self) -> "Settings":
        """These settings, if all are in range.

        Raises:
            ValueError: one is not.
        """
        accepted = {
            "size": (self.size >= 16, "at least 16 pixels"),
            "mpp": (0.05 <= self.mpp <= 100, "0.05 to 100 microns per pixel"),
            "overlap": (0 <= self.overlap < self.size, f"0 to {self.size - 1}, less than size"),
            "min_tissue": (0 <= self.min_tissue <= 1, "a share in [0, 1]"),
            "format": (self.format in ("jpg", "png"), "jpg or png"),
            "quality": (1 <= self.quality <= 100, "1 to 100"),
            "per_shard": (self.per_shard >= 1, "at least 1 tile"),
            "mpp_of_slide": (self.mpp_of_slide is None or 0.05 <= self.mpp_of_slide <= 20, "0.05 to 20 microns per pixel"),
        }
        for name, (good, values) in accepted.items():
            if not good:
                raise ValueError(f"{name}: {self._asdict()[name]}; accepted: {values}")
        return self


class SlideRecord(NamedTuple):
    """The content of slides/<slide>.json."""

    slide: str  # name
    file: str  # name of the file, without folders
    file_bytes: int
    file_digest: str  # of the first and last 64 KiB of the file
    reader: str
    width: int  # pixels of level 0
    height: int
    slide_mpp: float  # microns along one pixel of level 0
    mpp_given: bool  # whether the settings give it, because the file does not
    level: int  # index of the level that is read
    downsample: float  # of this level
    resampled: bool  # False: the tiles are pixels of the level
    tissue: float  # share of the slide
    tiles: int
    shards: int
    complete: bool


class TilesFolder:
    """The folder while it is written.

    Args:
        root: path of the folder; it is created where it is missing.
        settings: settings of all tiles in it.

    Raises:
        ValueError: the folder holds other files, or tiles with other settings.
    """

    def __init__(self, root: str | Path, *, settings: Settings) -> None:
        self.root = Path(root).expanduser()
        self.settings = settings.checked()
        self._compare_settings()

    def _compare_settings(self) -> bool:
        """Whether the folder holds tiles with these settings; False where it is new or empty."""
        path, written = self.root / SETTINGS, {"version": _VERSION, **self.settings._asdict()}
        if path.is_file():
            there = json.loads(path.read_text())
            if different := [name for name in sorted(written | there) if written.get(name) != there.get(name)]:
                pairs = ", ".join(f"{name} is {written.get(name)}, there it is {there.get(name)}" for name in different)
                raise ValueError(f"out: {self.root} holds tiles with other settings: {pairs}; give the same settings, or another folder")
            return True
        # Another process may have written the settings at this moment; they are compared when this one has the lock.
        if self.root.exists() and not (
            self.root.is_dir() and all(p.name.startswith(".") or p.name == SETTINGS for p in self.root.iterdir())
        ):
            raise ValueError(f"out: {self.root} holds other files; accepted: a new or empty folder, or a folder of tiles")
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other process write here meanwhile, and remove the incomplete files of a killed run, and of workers that died in this one.

        Raises:
            ValueError: another process is writing, or has written tiles with other settings since this object was made.
        """
        with locked(self.root, argument="out"):
            if not self._compare_settings():
                write_json(self.root / SETTINGS, {"version": _VERSION, **self.settings._asdict()})
            remove_parts(self.root)
            yield
            remove_parts(self.root)

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    def overview(self, slide: str) -> Path:
        return self.root / "overviews" / f"{slide}.png"

    @staticmethod
    def shard(slide: str, number: int) -> str:
        """Path below `shards`."""
        return f"{slide}-{number:05d}.tar"

    def has_shard(self, slide: str, number: int) -> bool:
        return (self.shards / self.shard(slide, number)).is_file()

    def record(self, slide: str) -> SlideRecord | None:
        """The record of a slide; None where the slide was not begun."""
        path = self._record(slide)
        return SlideRecord(**json.loads(path.read_text())) if path.is_file() else None

    def write_record(self, record: SlideRecord) -> None:
        write_json(self._record(record.slide), record._asdict())

    def _record(self, slide: str) -> Path:
        return self.root / "slides" / f"{slide}.json"

    def forget(self, slide: str) -> None:
        """Remove all files of a slide, for example because it turned out to be damaged."""
        record = self.record(slide)
        for number in range(0 if record is None else record.shards):
            self.forget_shard(slide, number)
        self.overview(slide).unlink(missing_ok=True)
        self._record(slide).unlink(missing_ok=True)

    def forget_shard(self, slide: str, number: int) -> None:
        """Remove one shard. The tar goes first, because lines of an index without a tar are ignored."""
        path = self.shards / self.shard(slide, number)
        path.unlink(missing_ok=True)
        index_of(path).unlink(missing_ok=True)

    def records(self) -> list[SlideRecord]:
        """Records of all slides, in the order of their names."""
        found = [SlideRecord(**json.loads(path.read_text())) for path in (self.root / "slides").rglob("*.json")]
        return sorted(found, key=lambda record: record.slide)

    def write_index(self) -> None:
        """Join the lines of all complete slides."""
        with part_file(self.root / INDEX) as part, part.open("wb") as file:
            for record in self.records():
                for number in range(record.shards if record.complete else 0):
                    file.write(index_of(self.shards / self.shard(record.slide, number)).read_bytes())


def digest_of(path: Path) -> str:
    """SHA-256 of the first and the last 64 KiB of a file: enough to recognise another slide with the same name."""
    with path.open("rb") as file:
        start = file.read(_SAMPLE)
        file.seek(max(0, path.stat().st_size - _SAMPLE))
        return hashlib.sha256(start + file.read(_SAMPLE)).hexdigest()
