"""Rows of runs as one page that needs no network and no script: the tables, cost against score, and curves.

The pictures (`figures`) and what is said in words (`tables`) are made elsewhere.
"""

import html
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template

import glpretrain
from glpretrain.compare.figures import curves, mark, scatter
from glpretrain.compare.reading import HEADLINES
from glpretrain.compare.rows import Pair, Row, pairs
from glpretrain.compare.tables import HOW_PAIRS, PLUS_MINUS, cells, difference, heads, lines_of, notes
from glpretrain.core.files import write_whole

_HOW = (
    f"Scores in percent after training: mean {PLUS_MINUS} standard deviation over seeds, below it Student's 95 % interval of the mean and"
    " the mean of what the runs started from. The best mean of a column is bold, which says nothing about chance; the second table does."
)


def write_page(rows: Sequence[Row], scores: Sequence[str], out: Path) -> None:
    """Write the page.

    Args:
        rows: rows of the table.
        scores: names of the scores that are shown.
        out: path of the file, which is replaced.
    """
    records = [record for row in rows for record in row.records]
    text = Template((resources.files("glpretrain.compare") / "page.html").read_text()).substitute(
        style=(resources.files("glpretrain.report") / "page.css").read_text(),
        count=len(records),
        rows=len(rows),
        how=escaped(_HOW),
        table=_table(rows, scores),
        notes="".join(f'<p class="note">{escaped(note)}</p>' for note in notes(rows)),
        pairs=_pairs(rows, scores),
        scatter=panels("Cost against score", [scatter(rows, score) for score in scores]),
        curves=panels("Curves", [picture for _, picture in curves(rows)]),
        runs=simple_table(
            ["run", "recipe", "data", "seed", "steps", "seconds"],
            [[str(r.folder), r.recipe, r.data, str(r.seed), str(r.steps), f"{r.seconds:.0f}"] for r in records],
        ),
        version=glpretrain.__version__,
    )
    write_whole(out, text.encode("ascii"))


def escaped(text: str) -> str:
    """Text as ASCII that HTML shows as it is."""
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


def _table(rows: Sequence[Row], scores: Sequence[str]) -> str:
    columns = heads(rows, scores)
    named = columns[: len(columns) - len(scores)]
    head = "".join(f"<th>{escaped(name)}</th>" for name in ("", *named))
    head += "".join(f'<th class="number">{escaped(HEADLINES.get(score, score))}</th>' for score in scores)
    summaries = [[row.summary(score) for score in scores] for row in rows]
    best = [max((one.mean for one in column if one is not None), default=None) for column in zip(*summaries, strict=True)]
    body = ""
    for number, (row, own) in enumerate(zip(rows, summaries, strict=True)):
        body += f"<tr><td>{mark(number)}</td>" + "".join(f"<td>{escaped(cell)}</td>" for cell in cells(row, columns, scores)[: len(named)])
        for summary, highest in zip(own, best, strict=True):
            value, *below = lines_of(summary)
            kind = ' class="best"' if summary is not None and summary.mean == highest and len(rows) > 1 else ""
            body += f'<td class="number"><span{kind}>{escaped(value)}</span><small>{escaped(", ".join(below))}</small></td>'
        body += "</tr>\n"
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _pairs(rows: Sequence[Row], scores: Sequence[str]) -> str:
    """Those of the best row of each score, and all of them behind a click."""
    found = {score: own for score in scores if (own := pairs(rows, score))}
    if not found:
        return ""
    every = [pair for own in found.values() for pair in own]
    best = [pair for own in found.values() for pair in own if pair.first == own[0].first]
    more = f"<details><summary>all {len(every)} pairs</summary>{_pair_table(every)}</details>" if len(every) > len(best) else ""
    note = f'<p class="note">{escaped(HOW_PAIRS)}</p>'
    return f"<section><h2>Differences over common seeds</h2>{note}{_pair_table(best)}{more}</section>"


def _pair_table(found: Sequence[Pair]) -> str:
    lines = [[HEADLINES.get(p.score, p.score), p.first, p.second, difference(p), ", ".join(map(str, p.seeds))] for p in found]
    return f'<div class="wide">{simple_table(["score", "first", "second", "first minus second", "seeds"], lines)}</div>'


def simple_table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table of text as HTML."""
    head = "".join(f"<th>{escaped(name)}</th>" for name in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def panels(title: str, pictures: Sequence[str]) -> str:
    """A section of pictures in SVG side by side, as HTML; empty where there is none."""
    if not pictures:
        return ""
    every = "\n".join(f'<div class="panel">{picture}</div>' for picture in pictures)
    return f'<section><h2>{title}</h2><div class="panels">\n{every}\n</div></section>'
