"""From slides to shards of tiles, in several processes. An interrupted run can be resumed, and every run writes the same bytes.

Each slide has one task that plans it and one task per shard, so that a few large slides keep all processes busy. The files of a task are
complete or absent and depend only on the slide and the settings. A run after a kill writes the shards that are missing.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from glpretrain.core.files import write_whole
from glpretrain.prepare.slides.folder import Settings, SlideRecord, TilesFolder, digest_of
from glpretrain.prepare.slides.opening import check_readers, find_slides, open_slide
from glpretrain.prepare.slides.overview import draw_overview
from glpretrain.prepare.slides.plan import Plan, plan_tiles, read_resampled
from glpretrain.prepare.slides.shard import TileEntry, encoded_image, write_shard
from glpretrain.prepare.slides.slide import Slide
from glpretrain.prepare.workers import Executor, Workers


class SlideBegun(NamedTuple):
    """A slide is planned."""

    record: SlideRecord
    tiles_there: int  # tiles of an earlier run


class TilesCut(NamedTuple):
    """A shard is written."""

    slide: str
    tiles: int


class SlideDone(NamedTuple):
    """All tiles of a slide are written."""

    record: SlideRecord
    before: bool  # whether an earlier run wrote them


class SlideFailed(NamedTuple):
    """A slide cannot be cut."""

    slide: str
    reason: str


class Summary(NamedTuple):
    """The result of a run."""

    cut: list[SlideRecord]
    before: list[SlideRecord]  # slides that an earlier run had completed
    failed: dict[str, str]  # slide to reason

    @property
    def blank(self) -> list[SlideRecord]:
        """Slides without any tile."""
        return [record for record in (*self.cut, *self.before) if record.tiles == 0]


def cut_slides(slides: Sequence[str | Path], *, out: str | Path, settings: Settings | None = None, workers: int = 1) -> Summary:
    """Cut the tissue of slides into tiles.

    Args:
        slides: files, and folders of files.
        out: a new folder, or the folder of an earlier run with the same settings, which is resumed.
        settings: settings of the tiles; the defaults of `Settings` when left out.
        workers: number of processes; with 1, this process does the work.

    Raises:
        ImportError: a slide needs OpenSlide, which is not installed.
        ValueError: there is no slide, or `out` holds other files or tiles with other settings.
        OSError: a file cannot be written.
    """
    events = cutting(find_slides(slides), out=out, settings=settings or Settings(), workers=Workers(workers, preload=[__name__]))
    return summary_of(list(events))


def summary_of(events: Sequence[SlideBegun | TilesCut | SlideDone | SlideFailed]) -> Summary:
    """The result of a run, from all its events."""
    done = [event for event in events if isinstance(event, SlideDone)]
    failed = {event.slide: event.reason for event in events if isinstance(event, SlideFailed)}
    return Summary([event.record for event in done if not event.before], [event.record for event in done if event.before], failed)


def cutting(
    slides: Mapping[str, Path], *, out: str | Path, settings: Settings, workers: Executor
) -> Iterator[SlideBegun | TilesCut | SlideDone | SlideFailed]:
    """`cut_slides` as an iterator over events. The index is written at the end of the run, also after an error.

    Args:
        slides: files by name, as `find_slides` returns them.
        out: as in `cut_slides`.
        settings: as in `cut_slides`.
        workers: what runs the tasks; it is ended at the end of the run.
    """
    check_readers(list(slides.values()))
    folder = TilesFolder(out, settings=settings)
    with folder.locked():
        try:
            with workers:
                yield from _Run(slides, folder=folder, workers=workers).events()
        finally:
            folder.write_index()


class _Planned(NamedTuple):
    record: SlideRecord
    plan: Plan


class _PlanTask(NamedTuple):
    slide: str
    path: Path
    folder: TilesFolder

    def run(self) -> _Planned:
        """Plan a slide, draw its overview, and write the record that it is begun."""
        settings = self.folder.settings
        with open_slide(self.path) as slide:
            plan, overview = plan_tiles(slide, settings)
            record = self._record(slide, plan, tissue=float(overview.mask.mean()))
        begun = self.folder.record(self.slide)
        if begun is not None and begun != record:  # another file with this name; it is not complete, or this task would not run
            self.folder.forget(self.slide)
        side = plan.span * record.downsample
        image = draw_overview(overview, corners=plan.corners * record.downsample, side=side, caption=_caption(record, settings))
        write_whole(self.folder.overview(self.slide), encoded_image(image, format="png"))
        self.folder.write_record(record)
        return _Planned(record, plan)

    def _record(self, slide: Slide, plan: Plan, *, tissue: float) -> SlideRecord:
        width, height, _ = slide.levels[0]
        return SlideRecord(
            slide=self.slide,
            file=self.path.name,
            file_bytes=self.path.stat().st_size,
            file_digest=digest_of(self.path),
            reader=slide.reader,
            width=width,
            height=height,
            slide_mpp=plan.slide_mpp,
            mpp_given=slide.mpp is None,
            level=plan.level,
            downsample=slide.levels[plan.level].downsample,
            resampled=not plan.native,
            tissue=round(tissue, 6),
            tiles=plan.num_tiles,
            shards=-(-plan.num_tiles // self.folder.settings.per_shard),
            complete=False,
        )


def _caption(record: SlideRecord, settings: Settings) -> str:
    return (
        f"{record.slide}: {record.width} x {record.height} px at {record.slide_mpp:.3g} um/px, tissue {record.tissue:.0%}; "
        f"{record.tiles} tiles of {settings.size} px at {settings.mpp:g} um/px"
    )


class _ShardTask(NamedTuple):
    record: SlideRecord
    path: Path
    folder: TilesFolder
    number: int
    span: float
    corners: np.ndarray  # Float[N 2]  pixels of the level
    tissue: np.ndarray  # Float[N]

    def run(self) -> None:
        """Write one shard."""
        settings = self.folder.settings
        with open_slide(self.path) as slide:
            shard = self.folder.shard(self.record.slide, self.number)
            write_shard(self.folder.shards, shard, self._tiles(slide, shard), format=settings.format, quality=settings.quality)

    def _tiles(self, slide: Slide, shard: str) -> Iterator[tuple[TileEntry, np.ndarray]]:
        settings, record = self.folder.settings, self.record
        mpp = self.span * record.slide_mpp * record.downsample / settings.size
        for (x, y), tissue in zip(self.corners.tolist(), self.tissue.tolist(), strict=True):
            if record.resampled:
                size = (settings.size, settings.size)
                pixels = read_resampled(
                    slide, record.level, corner=(x, y), span=(self.span, self.span), size=size, filter=Image.Resampling.BICUBIC
                )
            else:
                pixels = slide.read(record.level, x=int(x), y=int(y), width=settings.size, height=settings.size)
            entry = TileEntry(
                slide=record.slide,
                level=record.level,
                x=round(x * record.downsample),
                y=round(y * record.downsample),
                side=round(self.span * record.downsample),
                mpp=round(mpp, 6),
                tissue=round(tissue, 4),
                shard=shard,
                offset=0,
                num_bytes=0,
            )
            yield entry, pixels


class _Run:
    """The slides of one run and those of their tasks that are not finished.

    Args:
        slides: files by name.
        folder: folder of the tiles.
        workers: what runs the tasks.
    """

    def __init__(self, slides: Mapping[str, Path], *, folder: TilesFolder, workers: Executor) -> None:
        self.folder = folder
        self.workers = workers
        self.ahead = deque(slides.items())
        self.left: dict[str, list[_ShardTask]] = {}  # unfinished shards of the slides that are being cut

    def events(self) -> Iterator[SlideBegun | TilesCut | SlideDone | SlideFailed]:
        yield from self._feed()
        for task, result in self.workers.outcomes():
            if isinstance(result, OSError):  # damage is a ValueError: this concerns the disk, and all tasks would fail
                raise result
            if isinstance(task, _ShardTask):
                yield from self._written(task, result)
            elif isinstance(task, _PlanTask):
                yield from self._planned(task, result)
            yield from self._feed()

    def _feed(self) -> Iterator[SlideDone | SlideFailed]:
        """Submit the next slides while workers are idle, so that no slide is planned long before it is cut."""
        while self.ahead and self.workers.has_room:
            name, path = self.ahead.popleft()
            record = self.folder.record(name)
            if record is None or not record.complete:
                self.workers.submit(_PlanTask(name, path, self.folder))
            elif _is_same(path, record):
                yield SlideDone(record, before=True)
            else:
                reason = f"{path}: not the file that {name!r} was cut from; give another folder, or rename the file"
                yield SlideFailed(name, reason)

    def _planned(self, task: _PlanTask, result: object) -> Iterator[SlideBegun | SlideDone | SlideFailed]:
        if isinstance(result, Exception):
            yield self._failed(task.slide, task.path, result)
            return
        assert isinstance(result, _Planned)
        record, plan = result
        per_shard = self.folder.settings.per_shard
        missing = [number for number in range(record.shards) if not self.folder.has_shard(record.slide, number)]
        self.left[record.slide] = []
        for number in missing:
            part = slice(number * per_shard, (number + 1) * per_shard)
            shard = _ShardTask(record, task.path, self.folder, number, plan.span, plan.corners[part], plan.tissue[part])
            self.left[record.slide].append(shard)
            self.workers.submit(shard)
        yield SlideBegun(record, record.tiles - sum(len(shard.tissue) for shard in self.left[record.slide]))
        if not missing:
            yield self._complete(record)

    def _written(self, task: _ShardTask, result: object) -> Iterator[TilesCut | SlideDone | SlideFailed]:
        slide = task.record.slide
        if slide not in self.left:  # another shard of this slide failed meanwhile
            self.folder.forget_shard(slide, task.number)
            return
        if isinstance(result, Exception):
            self.workers.withdraw(self.left.pop(slide))
            yield self._failed(slide, task.path, result)
            return
        self.left[slide] = [shard for shard in self.left[slide] if shard is not task]
        yield TilesCut(slide, len(task.tissue))
        if not self.left[slide]:
            yield self._complete(task.record)

    def _complete(self, record: SlideRecord) -> SlideDone:
        del self.left[record.slide]
        record = record._replace(complete=True)
        self.folder.write_record(record)
        return SlideDone(record, before=False)

    def _failed(self, slide: str, path: Path, error: Exception) -> SlideFailed:
        self.folder.forget(slide)
        reason = str(error) or type(error).__name__
        return SlideFailed(slide, reason if str(path) in reason else f"{path}: {reason}")


def _is_same(path: Path, record: SlideRecord) -> bool:
    return (path.stat().st_size, digest_of(path)) == (record.file_bytes, record.file_digest)
