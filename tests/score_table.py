"""Scores of finished runs as the tables of the README and the headers of the recipes have them: a developer's tool.

    python tests/score_table.py RUNS                      a line per recipe and data set: mean and standard deviation over seeds
    python tests/score_table.py RUNS --write README.md    the same, and the columns of that data set in the table of the README

RUNS is the folder of runs. They are read and put together as `glpretrain compare` does it, by recipe and data. Left out: runs of several
evaluations (`glpretrain evaluate` writes those tables itself).
"""

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from glpretrain.cli.trust import read_yaml
from glpretrain.compare import HEADLINES, Row, records_below, rows_of, spread

# Names of the methods in the README's table, by recipe.
METHODS = {"mmc": "MMC", "dino": "DINO", "ibot": "iBOT", "mae": "MAE", "mugs": "Mugs", "local_contrast": "local contrast"}
_TABLED = ("knn", "linear", "prompt_miou")  # in the README's table
_MARKS = re.compile(r"(?<=<!-- numbers -->\n).*?(?=<!-- /numbers -->)", re.DOTALL)


def read(folder: Path) -> list[Row]:
    """The runs below a folder, by recipe and data set.

    Raises:
        ValueError: there is none, or runs of one recipe differ in more than their seed.
    """
    records, _ = records_below([folder], settings=read_yaml)
    rows, _ = rows_of(records, by=("recipe", "data"))
    return sorted(rows, key=lambda row: row.key)


def before(row: Row, score: str) -> list[float]:
    """A score of what the runs started from, by seed."""
    return [record.before[score] for record in row.records if score in record.before]


def line(row: Row) -> str:
    """One line: recipe, data, seeds, and each score before and after."""
    found = [(label, before(row, name), list(row.values(name).values())) for name, label in HEADLINES.items() if row.values(name)]
    scores = "   ".join(f"{label} {f'{statistics.mean(start):.1f} -> ' if start else ''}{spread(end)}" for label, start, end in found)
    said = ", ".join(verdict for record in row.records for verdict in record.verdicts) or "none"
    (_, recipe), (_, data) = row.key
    seeds, steps = ", ".join(map(str, row.seeds)), row.records[0].steps
    return f"{recipe} on {data}, seeds {seeds}, {steps} steps, {row.seconds:.0f} s: {scores}; verdicts of health: {said}"


def tabled(text: str, rows: Sequence[Row], *, data: str, column: str | None = None) -> str:
    """The text with the columns of one data set, between its marks, replaced by what was found; lines that were not found stay.

    Args:
        text: text of the README.
        rows: what was found.
        data: data set, as the runs name it.
        column: what the columns are called, where it is something else.

    Raises:
        ValueError: the text has no table with these columns.
    """
    if (marked := _MARKS.search(text)) is None:
        raise ValueError("no table between the marks numbers; give the README")
    header, rule, *lines = marked[0].strip().splitlines()
    names = _cells(header)
    wanted = column or data
    first = next((place for place, cell in enumerate(names) if cell.startswith(f"{wanted}:")), None)
    if first is None:
        raise ValueError(f"the table has no columns of {wanted}; it has {', '.join(names[1:])}")
    measured: dict[str, list[list[float]]] = {}
    for row in rows:
        (_, recipe), (_, on) = row.key
        if on == data:
            after = [list(row.values(name).values()) for name in _TABLED]
            started = [before(row, name) for name in _TABLED]
            if recipe in METHODS and all(after):
                measured[METHODS[recipe]] = after
            if all(started):
                measured.setdefault("random weights", started)  # the same encoder in all of them
    for number, cells in enumerate(map(_cells, lines)):
        if cells[0] in measured:
            cells[first : first + 3] = map(spread, measured[cells[0]])
            lines[number] = f"| {' | '.join(cells)} |"
    return text[: marked.start()] + "\n".join([header, rule, *lines, ""]) + text[marked.end() :]


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def main(arguments: Sequence[str]) -> int:
    """Print the lines, and write the table where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of runs")
    parser.add_argument("--write", type=Path, metavar="README.md", help="file whose table is written")
    parser.add_argument("--data", default="scenes", help="data set whose columns are written (default: scenes)")
    parser.add_argument("--column", help="what its columns are called in the table (default: as the data set)")
    given = parser.parse_args(arguments)
    try:
        found = read(given.runs)
        for row in found:
            print(line(row))
        if given.write is not None:
            given.write.write_text(tabled(given.write.read_text(), found, data=given.data, column=given.column))
    except ValueError as error:
        print(f"score_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
