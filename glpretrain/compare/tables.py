"""Rows of runs as a table in the terminal, as Markdown and as CSV.

What a row is (`rows`) and the page (`page`) are left out. CSV holds every score; the others those that are asked for.
"""

import csv
import io
import statistics
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from glpretrain.compare.reading import HEADLINES, score_names
from glpretrain.compare.rows import Pair, Row, Summary, labels, pairs

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
HOW = (
    f"Scores are means {PLUS_MINUS} standard deviations over seeds after training, with Student's 95 % interval of the mean in brackets;"
    " before the arrow the mean of what the runs started from. Seconds are the median of training without evaluations."
)
HOW_PAIRS = (
    "Differences are those of runs with the same seed, with the 95 % interval and p of Student's paired test; Holm's p allows for the"
    " number of pairs in one score. A test over few seeds finds only what is large beside the spread of the differences."
)


def spread(values: Sequence[float]) -> str:
    """`mean +- standard deviation`, with the sign; the mean alone of one value."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} {PLUS_MINUS} {statistics.stdev(values):.1f}"


def shown(summary: Summary | None) -> str:
    """A score of a row: `18.1 -> 45.6 +- 1.7 [41.4, 49.8]`."""
    if summary is None:
        return "-"
    start = "" if summary.before is None else f"{summary.before:.1f} -> "
    if summary.std is None:
        return f"{start}{summary.mean:.1f}"
    return f"{start}{summary.mean:.1f} {PLUS_MINUS} {summary.std:.1f} [{summary.low:.1f}, {summary.high:.1f}]"


def heads(rows: Sequence[Row], scores: Sequence[str]) -> list[str]:
    """Heads of the columns: what a row was made by, its seeds, steps and seconds, and the scores."""
    names = list(dict.fromkeys(name for row in rows for name, _ in row.key))
    fixed = [name for name in ("seeds", "steps") if name.removesuffix("s") not in names and name not in names]
    return [*names, *fixed, "seconds", *(HEADLINES.get(score, score) for score in scores)]


def cells(row: Row, columns: Sequence[str], scores: Sequence[str]) -> list[str]:
    """What a row has in each column but those of scores, and then its scores."""
    steps = dict.fromkeys(record.steps for record in row.records)
    went_on = "*" if any(record.went_on for record in row.records) else ""
    known = {
        **{"seeds": ", ".join(map(str, row.seeds)), "steps": ", ".join(map(str, steps))},
        **dict(row.key),
        "seconds": f"{row.seconds:.0f}{went_on}",
    }
    return [known.get(name, "") for name in columns[: len(columns) - len(scores)]] + [shown(row.summary(score)) for score in scores]


def notes(rows: Sequence[Row]) -> list[str]:
    """What has to be said below a table of these rows."""
    found = []
    if any(record.went_on for row in rows for record in row.records):
        found.append("* A run went on after an interruption: its seconds are those of its last part.")
    judged = [(name, record) for name, row in zip(labels(rows), rows, strict=True) for record in row.records if record.verdicts]
    if judged:
        said = "; ".join(f"{name} seed {record.seed}: {', '.join(record.verdicts)}" for name, record in judged)
        found.append(f"Verdicts of health: {said}.")
    return found


def table(rows: Sequence[Row], scores: Sequence[str]) -> Table:
    """For the terminal: what is the same in all rows stands in the title."""
    columns = heads(rows, scores)
    named = columns[: len(columns) - len(scores)]
    shown = [cells(row, columns, scores) for row in rows]
    same = [place for place in range(1, len(named)) if len({row[place] for row in shown}) == 1]
    title = [f"{named[place]} {shown[0][place]}" for place in same]
    spread_title = f"mean {PLUS_MINUS} standard deviation over seeds, and the 95 % interval of the mean"
    made = Table(title="\n".join([", ".join(title), spread_title][not title :]), title_justify="left")
    for place, name in enumerate(named):
        if place not in same:
            made.add_column(name, overflow="fold")
    for score in scores:
        made.add_column(HEADLINES.get(score, score), justify="right", no_wrap=True)
    for row, own in zip(rows, shown, strict=True):
        parts = [cell for place, cell in enumerate(own[: len(named)]) if place not in same]
        made.add_row(*map(Text, parts), *(Text("\n".join(lines_of(row.summary(score)))) for score in scores))
    return made


def lines_of(summary: Summary | None) -> list[str]:
    """A score of a row in short lines: `45.6 +- 1.7`, `[41.4, 49.8]`, `from 18.1`."""
    if summary is None:
        return ["-"]
    lines = [f"{summary.mean:.1f}"] if summary.std is None else [f"{summary.mean:.1f} {PLUS_MINUS} {summary.std:.1f}"]
    lines += [] if summary.low is None else [f"[{summary.low:.1f}, {summary.high:.1f}]"]
    return lines + ([] if summary.before is None else [f"from {summary.before:.1f}"])


def pair_lines(rows: Sequence[Row], scores: Sequence[str]) -> list[str]:
    """One line per score and pair of the best row with another; the files have all pairs."""
    found = {score: pairs(rows, score) for score in scores}
    return [
        f"{HEADLINES.get(score, score)}: {pair.first} minus {pair.second}, {len(pair.seeds)} seeds: {difference(pair)}"
        for score, own in found.items()
        for pair in own
        if pair.first == own[0].first
    ]


def difference(pair: Pair) -> str:
    """`+20.1 [15.2, 25.0], p 0.002 (Holm 0.004)`."""
    if pair.p is None or pair.adjusted is None:
        return f"{pair.difference:+.1f} in every seed"
    return f"{pair.difference:+.1f} [{pair.low:.1f}, {pair.high:.1f}], p {pair.p:.2g} (Holm {pair.adjusted:.2g})"


def markdown(rows: Sequence[Row], scores: Sequence[str]) -> str:
    """Both tables, and how they are to be read."""
    columns = heads(rows, scores)
    lines = [_line(columns), _line(["---"] * len(columns)), *(_line(cells(row, columns, scores)) for row in rows), "", HOW]
    lines += [part for note in notes(rows) for part in ("", note)]
    if found := [pair for score in scores for pair in pairs(rows, score)]:
        lines += ["", _line(["score", "first", "second", "seeds", "first minus second"]), _line(["---"] * 5)]
        lines += [_line([HEADLINES.get(p.score, p.score), p.first, p.second, ", ".join(map(str, p.seeds)), difference(p)]) for p in found]
        lines += ["", HOW_PAIRS]
    return "\n".join(lines) + "\n"


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(part.replace('|', chr(92) + '|') for part in parts)} |"


def csv_table(rows: Sequence[Row]) -> str:
    """A line per row and score, with all digits; every score that a run has."""
    names = list(dict.fromkeys(name for row in rows for name, _ in row.key))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, "seeds", "steps", "seconds", "score", *Summary._fields])
    for row in rows:
        key, seeds = dict(row.key), " ".join(map(str, row.seeds))
        steps = " ".join(dict.fromkeys(str(record.steps) for record in row.records))
        for score in score_names(row.records):
            summary = row.summary(score)
            assert summary is not None
            writer.writerow([*(key.get(name, "") for name in names), seeds, steps, row.seconds, score, *summary])
    return file.getvalue()
