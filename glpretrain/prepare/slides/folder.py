"""The folder that tiles go to: what lies where, whether it is of these settings, which slides are complete.

    tiles.json               the settings
    index.jsonl              a line per tile of every complete slide; what `TileFolder` reads
    shards/<slide>-00000.tar tiles, and beside it the lines of the same tar
    slides/<slide>.json      what a slide is and how it was cut; `complete` is written last
    overviews/<slide>.png    the slide with tissue and grid drawn

Every file is moved into place when it is whole. Left out: cutting.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from glpretrain.prepare.slides.settings import Settings
from glpretrain.prepare.slides.shard import PART, Beside, index_of, write_whole

SETTINGS, INDEX = "tiles.json", "index.jsonl"
_VERSION = 1  # of what the same settings cut; another one is another setting
_SAMPLE = 1 << 16  # bytes from either end of a file that tell whether it is the same one


class SlideRecord(NamedTuple):
    """What slides/<slide>.json says."""

    slide: str  # name
    file: str  # of the slide, without folders
    file_bytes: int
    file_digest: str  # of its first and last 64 KiB
    reader: str
    width: int  # pixels of level 0
    height: int
    slide_mpp: float  # microns along one pixel of level 0
    mpp_given: bool  # by the settings, because the file does not say
    level: int
    downsample: float  # of the level
    resampled: bool  # False: the level's own pixels
    tissue: float  # share of the slide
    tiles: int
    shards: int
    complete: bool


class TilesFolder:
    """The folder while it is written.

    Args:
        root: made where it is missing.
        settings: of everything in it.

    Raises:
        ValueError: it holds something else, or tiles of other settings.
    """

    def __init__(self, root: str | Path, *, settings: Settings) -> None:
        self.root = Path(root).expanduser()
        self.settings = settings.checked()
        written = {"version": _VERSION, **settings._asdict()}
        path = self.root / SETTINGS
        if path.is_file():
            there = json.loads(path.read_text())
            if different := [name for name in sorted(written | there) if written.get(name) != there.get(name)]:
                pairs = ", ".join(f"{name} is {written.get(name)}, there it is {there.get(name)}" for name in different)
                raise ValueError(f"out: {self.root} holds tiles of other settings: {pairs}; accepted: the same settings, or another folder")
        else:
            if self.root.exists() and (not self.root.is_dir() or any(not name.name.startswith(".") for name in self.root.iterdir())):
                raise ValueError(f"out: {self.root} holds something else; accepted: a new or empty folder, or one of tiles")
            self.root.mkdir(parents=True, exist_ok=True)
            write_whole(path, (json.dumps(written, indent=2) + "\n").encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes here meanwhile; what a killed run left half written is removed.

        Raises:
            ValueError: another process does.
        """
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"out: another process is writing to {self.root}; wait for it, or use another folder") from error
            for left in self.root.rglob(f".*{PART}"):
                left.unlink(missing_ok=True)
            yield

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
        """What is known of a slide that was begun."""
        path = self._record(slide)
        return SlideRecord(**json.loads(path.read_text())) if path.is_file() else None

    def write_record(self, record: SlideRecord) -> None:
        write_whole(self._record(record.slide), (json.dumps(record._asdict(), indent=2) + "\n").encode())

    def _record(self, slide: str) -> Path:
        return self.root / "slides" / f"{slide}.json"

    def forget(self, slide: str) -> None:
        """Remove what a slide that turned out to be damaged has left."""
        record = self.record(slide)
        for number in range(0 if record is None else record.shards):
            self.forget_shard(slide, number)
        self.overview(slide).unlink(missing_ok=True)
        self._record(slide).unlink(missing_ok=True)

    def forget_shard(self, slide: str, number: int) -> None:
        """Remove one shard; the tar first, because an index alone means nothing."""
        path = self.shards / self.shard(slide, number)
        path.unlink(missing_ok=True)
        index_of(path).unlink(missing_ok=True)

    def records(self) -> list[SlideRecord]:
        """Of all slides, in the order of their names."""
        found = [SlideRecord(**json.loads(path.read_text())) for path in (self.root / "slides").rglob("*.json")]
        return sorted(found, key=lambda record: record.slide)

    def write_index(self) -> None:
        """Put the lines of all complete slides together."""
        with Beside(self.root / INDEX) as part, part.open("wb") as file:
            for record in self.records():
                for number in range(record.shards if record.complete else 0):
                    file.write(index_of(self.shards / self.shard(record.slide, number)).read_bytes())


def digest_of(path: Path) -> str:
    """SHA-256 of the first and the last 64 KiB of a file: enough to tell another slide under the same name."""
    with path.open("rb") as file:
        start = file.read(_SAMPLE)
        file.seek(max(0, path.stat().st_size - _SAMPLE))
        return hashlib.sha256(start + file.read(_SAMPLE)).hexdigest()
