"""Finished runs as they are compared: what results.json, config.yaml and metrics.csv of a run folder say.

How a configuration is read safely is left to the caller, and so is what is made of the runs (`rows`).
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glpretrain.runs import CONFIG, RESULTS, run_folders, settings_that_count

# Scores that tables show where nothing else is asked for, by their names in results.json, and what they are called there.
HEADLINES = {"knn": "k-NN", "linear": "linear probe", "prompt_miou": "prompt IoU", "svm": "linear SVM"}
SEED_SETTINGS = ("seed_everything", "data.seed")

Settings = Callable[[Path], Mapping[str, object]]  # reads config.yaml


@dataclass(frozen=True)
class Record:
    """A finished run.

    Args:
        folder: folder of the run.
        recipe: name of its recipe.
        method: name of its method.
        data: name of the source that it was trained on.
        seed: its seed.
        steps: number of optimizer steps.
        seconds: seconds of training, without evaluations; of the last part where the run went on after an interruption.
        before: scores of what it started from, with their intervals; empty where there are none.
        after: scores of what was trained.
        scored_on: name of the items by evaluator.
        verdicts: names of what its health said.
        went_on: whether it was interrupted and went on.
        settings: its settings by dotted name, without those that do not change what is learned; empty without config.yaml.
    """

    folder: Path
    recipe: str
    method: str
    data: str
    seed: int
    steps: int
    seconds: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    scored_on: Mapping[str, str]
    verdicts: tuple[str, ...]
    went_on: bool
    settings: Mapping[str, object]

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Every number of metrics.csv by its name, as pairs of step and value; none where the run wrote no such file."""
        path, found = self.folder / "metrics.csv", {}
        if path.is_file():
            with path.open(newline="") as file:
                for line in csv.DictReader(file):
                    for name, value in line.items():
                        if value and name not in ("step", "epoch", None):
                            found.setdefault(name, []).append((int(line["step"]), float(value)))
        return found


def read_record(folder: Path, *, settings: Settings) -> Record:
    """Read a finished run.

    Args:
        folder: folder of the run.
        settings: function that reads its configuration.

    Raises:
        ValueError: it is no finished run, or its results.json lacks something.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"{folder} is no finished run: there is no {RESULTS}; accepted: folders of runs that ended, or folders of them")
    try:
        found = _plain(json.loads(path.read_text()))
        health = found.get("health") or {"verdicts": []}
        return Record(
            folder=folder,
            recipe=str(found["recipe"]),
            method=str(found.get("method", found["recipe"])),
            data=str(found["data"]),
            seed=int(found["seed"]),
            steps=int(found["steps"]),
            seconds=float(found["seconds"]),
            before=_numbers(found["before"]),
            after=_numbers(found["after"]),
            scored_on=found.get("measured_on") or {},
            verdicts=tuple(verdict["name"] for verdict in health["verdicts"]),
            went_on=found.get("resumed_from") is not None,
            settings=settings_that_count(settings(folder / CONFIG)) if (folder / CONFIG).is_file() else {},
        )
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: this is not what a run writes ({type(error).__name__}: {error}); leave this run out") from error


def _plain(found: dict) -> dict:
    """What a fine-tuned run writes, in the terms of a pretraining; the latter as it is."""
    if "task" not in found:
        return found
    scores = {
        name if end == "value" else f"{name}_{end}": score[end]
        for name, score in found["scores"].items()
        for end in ("value", "low", "high", "n")
    }
    scored_on = {name: score["measured_on"] for name, score in found["scores"].items()}
    return {
        **found,
        "method": found["task"],
        "data": found["data"]["train"]["name"],
        "before": None,
        "after": scores,
        "measured_on": scored_on,
    }


def _numbers(scores: Mapping[str, float | None] | None) -> dict[str, float]:
    return {name: float(value) for name, value in (scores or {}).items() if value is not None}


def records_below(places: Iterable[Path], *, settings: Settings) -> tuple[list[Record], list[str]]:
    """The finished runs at these paths and below them, the oldest first, each once, and a line for what was left out.

    Args:
        places: folders of runs, or folders of those; a link such as `latest` may be given.
        settings: function that reads a configuration.

    Raises:
        ValueError: a path is no folder, or there is no finished run.
    """
    folders: dict[Path, Path] = {}
    unfinished: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise ValueError(
                f"{place} is not a folder; accepted: folders of runs, such as runs/mmc/latest, or folders of those, such as runs"
            )
        for folder in run_folders(place):
            if (folder / RESULTS).is_file():
                folders.setdefault(folder.resolve(), folder)
            else:
                unfinished.append(folder)
    if not folders:
        where = ", ".join(map(str, places))
        raise ValueError(f"no finished run in {where}: no {RESULTS} there; give the folder of runs, such as runs")
    lines = [f"left out, not finished: {', '.join(map(str, unfinished))}"] if unfinished else []
    records = [read_record(folder, settings=settings) for folder in folders.values()]
    return sorted(records, key=lambda record: (record.folder.resolve().name, record.folder)), lines


def score_names(records: Iterable[Record]) -> list[str]:
    """Names of all scores of some runs, headlines first; what an evaluator has only chosen is none."""
    found = dict.fromkeys(name for record in records for name in record.after if _is_score(name, record.after))
    return [*(name for name in HEADLINES if name in found), *(name for name in found if name not in HEADLINES)]


def _is_score(name: str, scores: Mapping[str, float]) -> bool:
    ends = name.endswith(("_low", "_high", "_n"))
    return f"{name}_n" in scores or (name in HEADLINES and not ends)


def headlines(records: Sequence[Record], *, asked: Sequence[str] = ()) -> list[str]:
    """Names of the scores that a table shows: those asked for, else the headlines, else all.

    Raises:
        ValueError: no run has a score that was asked for.
    """
    names = score_names(records)
    for name in asked:
        if name not in names:
            raise ValueError(f"scores: no run has {name!r}; accepted: {', '.join(names) or 'none, since these runs were not scored'}")
    return list(asked) or [name for name in names if name in HEADLINES] or names
