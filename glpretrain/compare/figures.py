"""Pictures of runs as SVG that takes the colours of the page around it: cost against score, and curves over the steps.

What the numbers are is left out (`rows`, and `Record.curves`).
"""

import io
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from glpretrain.compare.reading import HEADLINES
from glpretrain.compare.rows import Row

_INK = "#010203"  # stands for the colour of the page's text
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccaa33", "#66ccee", "#aa3377", "#888888", "#ee8866")  # Tol's, told apart by most eyes
_MARKERS = "osD^vPX*"
_WIDTH, _HEIGHT = 3.7, 2.9  # inches of a panel
_HEALTH = {"health/rank_cls": "rank of cls", "health/rank_patches": "rank of patches"}
_LEAST = 3  # points that make a curve
_WIDE = 8.0  # ratio of costs from which on their axis is logarithmic


def style_of(number: int) -> tuple[str, str]:
    """Colour and marker of a row by its number."""
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number // len(_COLOURS) % len(_MARKERS) if number >= len(_COLOURS) else number]


def scatter(rows: Sequence[Row], score: str) -> str:
    """Seconds of training against a score, as SVG: a small mark per seed, a large one at their means with the standard deviation."""
    figure, axes = _panel(HEADLINES.get(score, score), "seconds of training", "percent")
    seconds: list[float] = []
    for number, row in enumerate(rows):
        points = [(record.seconds, record.after[score]) for record in row.records if score in record.after]
        summary = row.summary(score)
        if summary is None:
            continue
        colour, marker = style_of(number)
        seconds += [cost for cost, _ in points]
        centre = statistics.median(cost for cost, _ in points)
        axes.errorbar(centre, summary.mean, yerr=summary.std, fmt=marker, color=colour, markersize=8, capsize=3, linewidth=1.2)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=3.5, alpha=0.6, linestyle="none")
    if seconds and min(seconds) > 0 and max(seconds) > _WIDE * min(seconds):
        axes.set_xscale("log")
    return _svg(figure, f"seconds of training against {HEADLINES.get(score, score)}")


def curves(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Pictures of what was logged, each with its title: scores on the way, the rank of features, and the loss of each method.

    Losses of different methods are different quantities, so each method has a picture of its own. A line is the mean over seeds, the band
    reaches from the least to the greatest.
    """
    logged = [[record.curves() for record in row.records] for row in rows]
    names = dict.fromkeys(name for row in logged for one in row for name, points in one.items() if len(points) >= _LEAST)
    scores = [name for name in names if name.startswith("eval/")]
    made: list[tuple[str, str]] = []
    for name in [*scores, *(name for name in _HEALTH if name in names)]:
        title = _HEALTH.get(name, name.removeprefix("eval/"))
        made.append((title, _curve(title, name, dict(enumerate(logged)))))
    for method in dict.fromkeys(row.records[0].method for row in rows) if "train/loss" in names else ():
        chosen = {number: logged[number] for number, row in enumerate(rows) if row.records[0].method == method}
        made.append((f"loss of {method}", _curve(f"loss of {method}", "train/loss", chosen)))
    return made


def _curve(title: str, name: str, logged: Mapping[int, Sequence[Mapping[str, Sequence[tuple[int, float]]]]]) -> str:
    figure, axes = _panel(title, "step", "")
    for number, records in logged.items():
        by_step: dict[int, list[float]] = defaultdict(list)
        for record in records:
            for step, value in record.get(name, ()):
                if math.isfinite(value):
                    by_step[step].append(value)
        steps = sorted(by_step)
        colour, _ = style_of(number)
        axes.plot(steps, [statistics.mean(by_step[step]) for step in steps], color=colour, linewidth=1.5)
        axes.fill_between(
            steps, [min(by_step[step]) for step in steps], [max(by_step[step]) for step in steps], color=colour, alpha=0.18, linewidth=0
        )
    return _svg(figure, f"{title} over the steps")


def mark(number: int) -> str:
    """The mark of a row, as a small SVG for the table."""
    figure = Figure(figsize=(0.2, 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    colour, marker = style_of(number)
    axes.plot([0], [0], marker, color=colour, markersize=8)
    return _svg(figure, "")


def _panel(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    axes.set_xlabel(across, fontsize=9, color=_INK)
    axes.set_ylabel(up, fontsize=9, color=_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
    axes.margins(0.08)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
        spine.set_linewidth(0.6)
    return figure, axes


def _svg(figure: Figure, description: str) -> str:
    """The picture as an element of a page. Its names are made unique, since those of another picture of the page would hide them."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description, "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'width="([\d.]+)pt" height="([\d.]+)pt"', r'style="max-width: \1pt"', text, count=1)
    label = f'role="img" aria-label="{description}"' if description else 'aria-hidden="true"'
    return text.replace("<svg", f"<svg {label}", 1).encode("ascii", "xmlcharrefreplace").decode()
