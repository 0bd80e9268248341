"""`glpretrain tiles`: what is going on while slides are cut, and what came of them.

Left out: cutting (`glpretrain.prepare.slides`).
"""

import os
from collections.abc import Sequence
from contextlib import closing

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from glpretrain.prepare.slides import Settings, find_slides
from glpretrain.prepare.slides.cutting import SlideBegun, SlideDone, SlideFailed, Summary, TilesCut, cutting, summary_of
from glpretrain.prepare.slides.folder import SlideRecord

_MOST_WORKERS = 8  # more than a disk keeps busy, unless somebody says so


def tiles(slides: Sequence[str], *, out: str, settings: Settings, workers: int | None) -> Summary:
    """Cut slides, with a line for each, a bar on a terminal, and a summary.

    Args:
        slides: files and folders.
        out: folder of the tiles.
        settings: what a tile is.
        workers: processes; None is one per core, at most 8.

    Raises:
        ValueError: not one slide succeeded, or see `cut_slides`.
    """
    found = find_slides(slides)
    workers = min(len(os.sched_getaffinity(0)), _MOST_WORKERS) if workers is None else workers
    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tiles"), TimeElapsedColumn())
    events = []
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as progress,
        closing(cutting(found, out=out, settings=settings, workers=workers)) as run,
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
                    progress.console.print(line, markup=False)
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


def _summary(summary: Summary, *, out: str) -> str:
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
