"""`glpretrain runs`: what was trained here, in which state it is, and what came of it.

Comparing runs is left out (`comparing`), and so is going on with one (`resume`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from glpretrain.cli.trust import read_yaml
from glpretrain.compare import HEADLINES, read_record
from glpretrain.core.files import LOCK, is_locked
from glpretrain.core.written import last_step
from glpretrain.runs import CONFIG, FAILED, ITEMS, RESULTS, run_folders

_SHOWN = 30


class Listed(NamedTuple):
    """A run, finished or not. What is not known is empty."""

    folder: Path
    state: str  # finished, running, interrupted, failed, unreadable
    reason: str  # of a failure
    data: str
    seed: str
    steps: str  # `40 of 1000` of a run that has not finished
    scores: dict[str, tuple[float | None, float]]  # headlines before and after, by their names


def runs(folder: Path = Path("runs"), *, last: int = _SHOWN) -> None:
    """List runs: recipe, data, seed, steps, state, and scores before and after; the newest first.

    The state is one of
      finished     results.json is there
      running      a process is training it
      interrupted  ended by a signal or killed; the same command goes on from its last checkpoint
      failed       ended by an error, which is shown
      unreadable   its files are damaged, which is shown

    Args:
        folder: folder of runs
        last: number of runs that are shown
    """
    if last < 1:
        raise ValueError(f"last: {last}; accepted: numbers above 0")
    if not folder.is_dir():
        raise ValueError(f"folder: {folder} is not a folder; accepted: a folder of runs, such as runs")
    found = sorted(run_folders(folder), key=lambda path: path.name, reverse=True)
    if not found:
        raise ValueError(f"folder: there is no run in {folder}; accepted: a folder of runs, such as runs")
    shown = [listed(path) for path in found[:last]]
    table = Table(title=f"runs in {folder}, the newest first", title_justify="left")
    for name in ("recipe", "run", "data", "seed", "steps", "state", "scores in percent"):
        table.add_column(name, justify="right" if name == "seed" else "left", overflow="fold")
    for run in shown:
        scores = "\n".join(
            f"{HEADLINES[name]} {'' if before is None else f'{before:.1f} -> '}{after:.1f}" for name, (before, after) in run.scores.items()
        )
        recipe = run.folder.parent.relative_to(folder) if run.folder != folder else Path()
        table.add_row(*map(Text, (str(recipe), run.folder.name, run.data, run.seed, run.steps, run.state, scores)))
    Console().print(table)
    for run in shown:
        if run.reason:
            print(f"{run.folder}: {run.state}: {run.reason}")
    if len(found) > last:
        print(f"{len(found) - last} older runs are not shown (--last {len(found)})")


def listed(folder: Path) -> Listed:
    """What is known of a run from the files of its folder.

    Args:
        folder: folder of the run.
    """
    try:
        if (folder / RESULTS).is_file():
            run = read_record(folder, settings=read_yaml)
            scores = {name: (run.before.get(name), run.after[name]) for name in HEADLINES if name in run.after}
            return Listed(folder, "finished", "", run.data, str(run.seed), str(run.steps), scores)
        config = read_yaml(folder / CONFIG)
        trainer = config.get("trainer")
        wanted = trainer.get("max_steps") if isinstance(trainer, Mapping) else None
        step = last_step(folder / "checkpoints") or 0
        steps = str(step) if wanted in (None, -1) else f"{step} of {wanted}"
        state, reason = _state(folder)
        return Listed(folder, state, reason, _data(folder), str(config.get("seed_everything", "")), steps, {})
    except (ValueError, OSError) as error:  # a run that is damaged must not hide the others
        return Listed(folder, "unreadable", " ".join(str(error).split()), "", "", "", {})


def _state(folder: Path) -> tuple[str, str]:
    """Of a run that has not finished, with the reason of a failure."""
    if (folder / LOCK).exists() and is_locked(folder):  # asking makes the file
        return "running", ""
    if (folder / FAILED).is_file():
        return "failed", (folder / FAILED).read_text().strip()
    return "interrupted", ""


def _data(folder: Path) -> str:
    return str(json.loads((folder / ITEMS).read_text()).get("name", "")) if (folder / ITEMS).is_file() else ""
