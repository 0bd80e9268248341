"""The verbs that look at runs that were made: `glpretrain compare` and `glpretrain runs`.

Rows, tests, tables and the page (`glpretrain.compare`) are left out.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from glpretrain.cli.trust import read_yaml
from glpretrain.compare import Row, csv_table, headlines, markdown, pair_lines, records_below, rows_of, table, write_page
from glpretrain.core.files import write_whole

_ENDINGS = (".html", ".md", ".csv")


def compare(runs: list[Path], *, by: str | None = None, scores: str | None = None, out: Path | None = None) -> None:
    """Compare runs: means and spread over seeds, paired tests, curves, cost against score.

    Runs that differ in nothing but their seed are one row; the newest run of a seed counts.
      glpretrain compare runs                                       every finished run below runs/
      glpretrain compare runs/mmc runs/mae --out page.html          two recipes, as one page that needs no network
      glpretrain compare runs/mmc --by recipe,data.batch_size       a row for every size of the batch
    Intervals are Student's 95 % intervals of the mean over seeds; rows scored on the same items are compared by a paired test over the
    seeds that both have.

    Args:
        runs: folders of runs, or folders that hold such folders
        by: what makes a row, with commas between: recipe, method, data, seed, steps, or names of settings as in config.yaml
            (data.batch_size); recipe, data and whatever settings differ when left out
        scores: names of scores in results.json, with commas between; the headline scores when left out
        out: file that is written, by its ending: .html (page), .md (Markdown), .csv (every score)
    """
    if out is not None and out.suffix not in _ENDINGS:
        raise ValueError(f"out: {out}; accepted: a file that ends in {', '.join(_ENDINGS)}")
    records, lines = records_below(runs, settings=read_yaml)
    rows, replaced = rows_of(records, by=_names(by))
    for line in (*lines, *replaced):
        print(line)
    shown = headlines([record for row in rows for record in row.records], asked=_names(scores))
    show(rows, shown)
    if out is not None:
        if out.suffix == ".html":
            write_page(rows, shown, out)
        else:
            write_whole(out, (markdown(rows, shown) if out.suffix == ".md" else csv_table(rows)).encode())
        print(f"written: {out}")


def show(rows: Sequence[Row], scores: Sequence[str]) -> None:
    """Print the table, and the differences over common seeds."""
    Console().print(table(rows, scores))
    for line in pair_lines(rows, scores):
        print(line)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]
