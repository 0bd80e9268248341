"""Scores of finished runs as the tables of the README and the headers of the recipes have them: a developer's tool.

    python tests/score_table.py RUNS                      a line per recipe and data set: mean and standard deviation over seeds
    python tests/score_table.py RUNS --write README.md    the same, and the columns of that data set in the table of the README

RUNS is the folder of runs, `runs/<recipe>/<time>/results.json`. Runs of one recipe that differ in nothing but their seed are one line; the
newest run of a seed counts. Left out: runs of several evaluations (`glpretrain evaluate` writes those tables itself).
"""

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Names of the methods in the README's table, by recipe, and of the scores in results.json.
METHODS = {"mmc": "MMC", "dino": "DINO", "ibot": "iBOT", "mae": "MAE", "mugs": "Mugs", "local_contrast": "local contrast"}
SCORES = {"k-NN": "knn", "linear probe": "linear", "prompt IoU": "prompt_miou", "linear SVM": "svm"}
_TABLED = ("k-NN", "linear probe", "prompt IoU")  # in the README's table
_MARKS = re.compile(r"(?<=<!-- numbers -->\n).*?(?=<!-- /numbers -->)", re.DOTALL)


class Runs(NamedTuple):
    """Runs of one recipe with different seeds."""

    seeds: tuple[int, ...]
    steps: int
    seconds: float  # median over the seeds
    before: dict[str, list[float]]  # by the name of a score
    after: dict[str, list[float]]
    verdicts: list[str]  # of all runs


def read(folder: Path) -> dict[tuple[str, str], Runs]:
    """The runs below a folder, by recipe and data set.

    Raises:
        ValueError: there is none, or runs of one recipe differ in their number of steps.
    """
    newest: dict[tuple[str, str], dict[int, dict]] = defaultdict(dict)
    for path in sorted(folder.glob("*/*/results.json")):
        if not path.parent.is_symlink():
            found = json.loads(path.read_text())
            newest[found["recipe"], found["data"]][found["seed"]] = found
    if not newest:
        raise ValueError(f"{folder}: no */*/results.json there; give the folder of runs, such as runs")
    return {key: _joined(key, by_seed) for key, by_seed in sorted(newest.items())}


def _joined(key: tuple[str, str], by_seed: dict[int, dict]) -> Runs:
    runs = [by_seed[seed] for seed in sorted(by_seed)]
    if len({run["steps"] for run in runs}) > 1:
        raise ValueError(f"{' on '.join(key)}: runs of {sorted({run['steps'] for run in runs})} steps; give runs of one number of steps")

    def scores(when: str) -> dict[str, list[float]]:
        values = {name: [run[when][score] for run in runs if run[when] and score in run[when]] for name, score in SCORES.items()}
        return {name: found for name, found in values.items() if len(found) == len(runs)}

    seconds = statistics.median(run["seconds"] for run in runs)
    verdicts = [verdict["name"] for run in runs for verdict in run["health"]["verdicts"]]
    return Runs(tuple(sorted(by_seed)), runs[0]["steps"], seconds, scores("before"), scores("after"), verdicts)


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation`; the mean alone of one value."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def line(key: tuple[str, str], runs: Runs) -> str:
    """One line: recipe, data, seeds, and each score before and after."""
    scores = "   ".join(f"{name} {statistics.mean(runs.before[name]):.1f} -> {spread(values)}" for name, values in runs.after.items())
    seeds = ", ".join(map(str, runs.seeds))
    said = ", ".join(runs.verdicts) or "none"
    return f"{key[0]} on {key[1]}, seeds {seeds}, {runs.steps} steps, {runs.seconds:.0f} s: {scores}; verdicts of health: {said}"


def tabled(text: str, found: dict[tuple[str, str], Runs], *, data: str) -> str:
    """The text with the columns of one data set, between its marks, replaced by what was found; rows that were not found stay.

    Raises:
        ValueError: the text has no table with these columns.
    """
    if (marked := _MARKS.search(text)) is None:
        raise ValueError("no table between the marks numbers; give the README")
    header, rule, *rows = marked[0].strip().splitlines()
    names = _cells(header)
    first = next((place for place, cell in enumerate(names) if cell.startswith(f"{data}:")), None)
    if first is None:
        raise ValueError(f"the table has no columns of {data}; it has {', '.join(names[1:])}")
    measured = {METHODS[recipe]: runs.after for (recipe, on), runs in found.items() if on == data and recipe in METHODS}
    for (_, on), runs in found.items():
        if on == data:
            measured.setdefault("random weights", runs.before)  # the same encoder in all of them
    for number, row in enumerate(map(_cells, rows)):
        if row[0] in measured:
            row[first : first + 3] = [spread(measured[row[0]][name]) for name in _TABLED]
            rows[number] = f"| {' | '.join(row)} |"
    return text[: marked.start()] + "\n".join([header, rule, *rows, ""]) + text[marked.end() :]


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def main(arguments: Sequence[str]) -> int:
    """Print the lines, and write the table where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of runs")
    parser.add_argument("--write", type=Path, metavar="README.md", help="file whose table is written")
    parser.add_argument("--data", default="scenes", help="data set whose columns are written (default: scenes)")
    given = parser.parse_args(arguments)
    try:
        found = read(given.runs)
        for key, runs in found.items():
            print(line(key, runs))
        if given.write is not None:
            given.write.write_text(tabled(given.write.read_text(), found, data=given.data))
    except ValueError as error:
        print(f"score_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
