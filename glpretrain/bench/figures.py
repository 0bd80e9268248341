"""The picture of a benchmark: a bar that is stacked of the parts of a step.

Nothing here touches pyplot's global state. Left out: the numbers (`summary`).
"""

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from glpretrain.bench.summary import Part

_COLOURS = "tab10"
_WIDTH, _BAR, _LEGEND = 8.0, 0.55, 1.9  # inches
_LEAST_LABELLED = 0.04  # share of the longest bar that a label needs


def parts_figure(bars: Mapping[str, Sequence[Part]], *, title: str, starts: Mapping[str, float] | None = None) -> Figure:
    """A bar per benchmark, stacked of the milliseconds of its parts.

    Args:
        bars: parts by the name that is written beside the bar.
        title: what is measured.
        starts: seconds until the first batch by the same names, drawn beside the bars; None leaves them out.
    """
    names = list(dict.fromkeys(part.name for parts in bars.values() for part in parts))
    longest = max(sum(part.milliseconds for part in parts) for parts in bars.values())
    figure = Figure(figsize=(_WIDTH, _BAR * len(bars) + _LEGEND), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *beside = figure.subplots(1, 1 if starts is None else 2, squeeze=False, width_ratios=[3, 1][: 1 if starts is None else 2])[0]
    labelled: set[str] = set()
    for row, parts in enumerate(bars.values()):
        start = 0.0
        for part in parts:
            colour = colormaps[_COLOURS](names.index(part.name))
            label = None if part.name in labelled else part.name
            axes.barh(row, part.milliseconds, left=start, color=colour, label=label, edgecolor="white")
            labelled.add(part.name)
            if part.milliseconds >= _LEAST_LABELLED * longest:
                axes.text(start + part.milliseconds / 2, row, f"{part.milliseconds:.0f}", ha="center", va="center", fontsize=8)
            start += part.milliseconds
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step (medians)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=9, loc="left")
    for right in beside:
        right.barh(range(len(bars)), [(starts or {})[name] for name in bars], color="0.6")
        right.set_yticks([])
        right.invert_yaxis()
        right.set_xlabel("s to the first batch", fontsize=8)
        right.tick_params(axis="x", labelsize=8)
        right.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
