"""`glpretrain tiles`: what is going on while slides are cut, and what came of them.

Cutting is left out (`glpretrain.prepare.slides`).
"""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from glpretrain.core.listing import printable
from glpretrain.prepare.slides import Settings, find_slides
from glpretrain.prepare.slides.cutting import SlideBegun, SlideDone, SlideFailed, Summary, TilesCut, cutting, summary_of
from glpretrain.prepare.slides.folder import SlideRecord
from glpretrain.prepare.workers import executor


def tiles(
    slides: list[str],
    *,
    out: Path,
    size: int = 224,
    mpp: float = 0.5,
    overlap: int = 0,
    min_tissue: float = 0.5,
    format: Literal["jpg", "png"] = "jpg",
    quality: int = 90,
    per_shard: int = 2048,
    mpp_of_slide: float | None = None,
    workers: int | None = None,
    cluster: str | None = None,
) -> Summary:
    """Cut whole-slide images into tissue tiles, in tar shards to train on.

    The tissue is cut into tiles of one size and one resolution, packed in tar shards with an index.
      glpretrain tiles slides/ --out tiles/ --workers 8                             224 px at 0.5 microns per pixel (20x)
      glpretrain tiles a.svs b.ndpi --out tiles/ --size 256 --mpp 1.0 --overlap 32
      glpretrain pretrain dino --data tiles/
    Look at DIR/overviews/: each slide with its tissue outlined and its tiles drawn. The same command goes on where a run was
    stopped; a slide that is damaged is reported and left out. Slides of slides/<class>/ keep their class.
    Reads what OpenSlide reads (pip install 'glpretrain[slides]') and other TIFF, tiled or in strips, 8-bit RGB.
      glpretrain tiles slides/ --out tiles/ --cluster tcp://host:8786               on the machines of a Dask cluster

    Args:
        slides: files, and folders that are searched for slides
        out: a new folder, or one of an earlier run with the same settings
        size: side of a tile in pixels
        mpp: microns per pixel of a tile; 0.5 is about 20x
        overlap: number of pixels that neighbouring tiles share
        min_tissue: least share of tissue in a tile
        format: format of the tiles
        quality: quality of JPEG, 1 to 100
        per_shard: number of tiles in one tar file at most
        mpp_of_slide: microns per pixel of slides that do not say (0.25 at 40x)
        workers: number of processes; as many as there are cores, at most 8, when left out
        cluster: work on many machines that share the folders: the address of a Dask scheduler, the file that it writes, or slurm for
            --workers SLURM jobs as ~/.config/dask/jobqueue.yaml describes them (pip install 'glpretrain[cluster]')

    Raises:
        ValueError: not one slide succeeded, or see `cut_slides`.
    """
    settings = Settings(size, mpp, overlap, min_tissue, format, quality, per_shard, mpp_of_slide)
    found = find_slides(slides)
    if cluster is not None:  # whose workers have folders of their own to start from
        found, out = {name: path.absolute() for name, path in found.items()}, out.absolute()
    console = Console(highlight=False, soft_wrap=True)
    run = cutting(found, out=out, settings=settings, workers=executor(workers, cluster=cluster, preload=[cutting.__module__]))
    assert isinstance(run, Generator)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tiles"), TimeElapsedColumn())
    events = []
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as progress,
        closing(run),
    ):
        bar = progress.add_task(f"slides 0/{len(found)}", total=0)
        num_done = num_tiles = 0
        for event in run:
            events.append(event)
            if isinstance(event, SlideBegun):
                num_tiles += event.record.tiles
                progress.update(bar, total=num_tiles, advance=event.tiles_there)
            elif isinstance(event, TilesCut):
                progress.advance(bar, event.tiles)
            else:
                num_done += 1
                progress.update(bar, description=f"slides {num_done}/{len(found)}")
                if (line := _line(event)) is not None:
                    progress.console.print(printable(line), markup=False)
    summary = summary_of(events)
    if not summary.cut and not summary.before:
        raise ValueError(f"tiles: none of {len(found)} slides could be cut; the first: {next(iter(summary.failed.values()))}")
    console.print(_summary(summary, out=out), markup=False)
    return summary


def _line(event: SlideDone | SlideFailed) -> str | None:
    """What is said of one slide; nothing of one that was done before."""
    if isinstance(event, SlideFailed):
        return f"left out: {event.reason}"
    return None if event.before else f"{event.record.slide}: {_of_slide(event.record)}"


def _of_slide(record: SlideRecord) -> str:
    tissue = "no tissue" if record.tissue == 0 else f"{record.tissue:.0%} tissue"
    how = "resampled" if record.resampled else "as it is"
    mpp = record.slide_mpp * record.downsample
    return f"{record.tiles} tiles from level {record.level} ({mpp:.3g} microns per pixel, {how}), {tissue}, read by {record.reader}"


def _summary(summary: Summary, *, out: Path) -> str:
    new, there = (sum(record.tiles for record in records) for records in (summary.cut, summary.before))
    num_slides = len(summary.cut) + len(summary.before)
    parts = [f"{out}: {new + there} tiles of {num_slides} slide{'s' * (num_slides != 1)}"]
    if summary.before:
        parts.append(f"{there} of {len(summary.before)} slides were there")
    if summary.blank:
        parts.append(f"without a tile: {_some([record.slide for record in summary.blank])}")
    if summary.failed:
        parts.append(f"left out: {_some(list(summary.failed))}")
    return "; ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
