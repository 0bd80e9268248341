"""`glpretrain report`: the page that ends a run, made after it or again, and the commands that go on from there.

What is on the page is left out (`glpretrain.run_report`).
"""

import json
import shlex
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from glpretrain import modalities
from glpretrain.callbacks import KeepStart
from glpretrain.cli.parsing import parse
from glpretrain.cli.trust import Parser, read_part, read_yaml
from glpretrain.compare import read_record
from glpretrain.core.listing import expanded
from glpretrain.data.sources.base import Source
from glpretrain.encoders import Encoder
from glpretrain.report import untrained
from glpretrain.run_report import MOST_ITEMS, Written, write_run_report
from glpretrain.runs import BACKBONE, CONFIG, RESULTS, START
from glpretrain.use import own_source
from glpretrain.weights import export, load_backbone

PAGE = "report.html"
_MOST = 20_000  # items on a page
# What can go wrong in a page, but must not in a run: its results are there already.
_FAILURES = (ArithmeticError, AssertionError, ImportError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


def report(run: Path, *, data: str | None = None, out: Path | None = None, max_items: int = MOST_ITEMS) -> None:
    """Write the report of a run: curves, scores, a map of your items, their neighbours before and after.

    Every run of `glpretrain pretrain` ends with it (--report false leaves it out); this makes it again, also on other items. The page is
    one file that needs no network: report.html in the folder of the run, and report.csv with near duplicates and items that stand apart.
      glpretrain report runs/mmc/latest
      glpretrain report runs/mmc/latest --data new_photos/ --out new.html

    Args:
        run: folder of a finished run
        data: items that are shown, as `pretrain` takes them; those of the run when left out
        out: file of the page; report.html in the folder of the run when left out
        max_items: items that are encoded and shown at most; evenly spaced ones
    """
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out: {out}; accepted: a file that ends in .html")
    if not 2 <= max_items <= _MOST:
        raise ValueError(f"max_items: {max_items}; accepted: 2 to {_MOST}")
    settings = read_part(run / CONFIG, "data")
    source = _source(settings) if data is None else own_source(data, load_backbone(run / BACKBONE).card)
    for line in _made(run, source, out=out or run / PAGE, items=data or _items(settings), max_items=max_items):
        print(line)


def keeping_start(folder: Path | None) -> KeepStart:
    """The callback that keeps what a run starts from in its folder, which is None in a process that writes nothing."""
    return KeepStart(None if folder is None else folder / START, partial(export, source="what the run started from"))


def after_run(run: Path, source: Source) -> None:
    """Write the report of a run that has just ended, and say where it is and what to do next. If it fails, that costs a line.

    Args:
        run: folder of the run.
        source: its items.
    """
    try:
        lines = _made(run, source, out=run / PAGE, items=_items(read_part(run / CONFIG, "data")), max_items=MOST_ITEMS)
    except _FAILURES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"no report: {reason}; the run itself is complete (glpretrain report {run} tries again)", file=sys.stderr, flush=True)
        return
    for line in lines:
        print(line, flush=True)


def _made(run: Path, source: Source, *, out: Path, items: str | None, max_items: int) -> list[str]:
    """Write the page, and say so in lines."""
    begin = time.perf_counter()
    record = read_record(run, settings=read_yaml)
    after = load_backbone(run / BACKBONE)
    before, start = _start(run, after, seed=record.seed)
    commands = _next(run, items=items, source=source)
    encoders = {"before": before, "after": after}
    if torch.cuda.is_available():
        encoders = {name: encoder.cuda() for name, encoder in encoders.items()}
    results = json.loads((run / RESULTS).read_text())
    options = {"out": out, "start": start, "commands": commands, "max_items": max_items}
    written = write_run_report(record, results, encoders, source, **options)
    return [_said(written, time.perf_counter() - begin), "next:", *(f"  {command}" for command in commands)]


def _said(written: Written, seconds: float) -> str:
    size = f"{written.page.stat().st_size / 1e6:.1f} MB in {seconds:.0f} s"
    found = f"{written.num_copies} near duplicate{'' if written.num_copies == 1 else 's'}, {written.num_apart} that stand apart"
    return f"report: {written.page} ({size}): scores, a map of {written.num_shown} items, their neighbours before and after; {found}"


def _start(run: Path, after: Encoder, *, seed: int) -> tuple[Encoder, str]:
    """What a run started from, and what that is in words."""
    if (run / START).is_dir():
        return load_backbone(run / START), "the weights that the run started from"
    return untrained(after, seed=seed), "fresh weights of the same architecture, since the run did not keep those that it started from"


def _source(settings: Mapping[str, object]) -> Source:
    """The items of a run, by the `data` of its configuration."""
    parser = Parser(exit_on_error=False)
    parser.add_argument("--source", type=Source, required=True)
    return parser.instantiate(parse(parser, [], values={"source": settings.get("source")})).source


def _items(settings: Mapping[str, object]) -> str | None:
    """The folder or file of a run's items; None where they are computed."""
    source = settings.get("source")
    arguments = source.get("init_args") if isinstance(source, dict) else None
    given = (arguments.get(name) for name in ("root", "path")) if isinstance(arguments, dict) else ()
    return next((value for value in given if isinstance(value, str) and expanded(value).exists()), None)


def _next(run: Path, *, items: str | None, source: Source) -> list[str]:
    """Commands that go on from a run."""
    backbone = shlex.quote(str(run / BACKBONE))
    own = shlex.quote(items) if items is not None else "YOUR_FOLDER"
    others = shlex.quote(str(run.parent))
    labelled = own if source.classes and items is not None else "FOLDER_WITH_CLASSES"
    options = modalities.get(source.modality).tuning
    fine = [] if options is None else [" ".join(["glpretrain finetune", backbone, *options, f"--data {labelled}"])]
    return [
        f"glpretrain inspect {backbone} {own} --untrained",
        f"glpretrain embed {backbone} {own} --out features.npy",
        *fine,
        f"glpretrain compare {others} --out page.html",
    ]
