"""Draw the pictures of docs/measurements.md: prompts before and after training, and scores and health over a run.

    python docs/pictures.py prompts NAME=BACKBONE... [--masks FOLDER] [--size 128] --out docs/pictures/prompts.jpg
    python docs/pictures.py curves NAME=RUN... --out docs/pictures/curves.svg

`prompts`: each row is an encoder, the first one with fresh weights, each column an image. All images are spaced evenly over those that were
scored, and every encoder has its own calibrated threshold, so nothing is chosen by eye. `curves`: each line is a run that was scored on the
way (`RunEvaluators` with `every_n_steps`).
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from glpretrain.data import MaskedFolder, Scenes, Source
from glpretrain.encoders import Encoder
from glpretrain.evaluate import Features, PromptSegmentation, Sources
from glpretrain.evaluate.figures import picture
from glpretrain.evaluate.patches.prompt_segmentation import GridPlaces, Prompted, upsampled
from glpretrain.report import untrained
from glpretrain.weights import load_backbone

_CLICK = "#d55e00"
_PER_ROW, _FEW = 3, 20  # plots side by side; points that are marked one by one
_TITLES = {
    "health/cls_cosine": "cosine of cls and patches",
    "health/gram_drift": "change of similarities since the anchor",
    "health/rank_cls": "rank of cls",
    "health/rank_patches": "rank of patches",
}
_SCORES = {"eval/knn/accuracy": "k-NN", "eval/linear/accuracy": "linear probe", "eval/prompt/miou": "prompt IoU", "eval/prompt/auc": "AUC"}


@dataclass(frozen=True, kw_only=True)
class _Kept(PromptSegmentation):
    """Keeps what the evaluator would draw."""

    kept: list[tuple[Sequence[Prompted], float]] = field(default_factory=list)

    def figure(self, shown: Sequence[Prompted], *, threshold: float) -> Figure:
        self.kept.append((shown, threshold))
        return Figure()


def segments(encoder: Encoder, masks: Source, *, size: int | None) -> tuple[Sequence[Prompted], float]:
    """What the evaluator draws of an encoder, and its calibrated threshold of a careful click."""
    evaluator = _Kept(features=replace(Features(), size=size))
    evaluator.pictures(encoder, Sources({"masked": masks}), None)
    if not evaluator.kept:
        raise ValueError(f"{masks.name}: no object to calibrate on, or none to score")
    return evaluator.kept[0]


def prompts_figure(rows: dict[str, tuple[Sequence[Prompted], float]]) -> Figure:
    """The images with the click in the first row; below, what each encoder keeps, and in white the outline of the object."""
    columns = next(iter(rows.values()))[0]
    height, width = columns[0].truth.shape
    figure = Figure(figsize=(1.8 * len(columns) + 1, 1.8 * height / width * (len(rows) + 1) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows) + 1, len(columns), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for axis, one in zip(axes[0], columns, strict=True):
        axis.imshow(picture(one.item), extent=(0, width, height, 0))
        row, column = _place(one)
        axis.plot(column, row, marker="o", markersize=6, color=_CLICK, markeredgecolor="white")
    axes[0, 0].set_ylabel("click")
    for line, (name, (shown, threshold)) in zip(axes[1:], rows.items(), strict=True):
        for axis, one in zip(line, shown, strict=True):
            assert isinstance(one.places, GridPlaces)
            cosines = (one.tokens @ one.tokens[one.places.click(one.truth)])[None].unflatten(1, one.places.grid)
            segment = upsampled(cosines, one.truth.shape)[0] > threshold
            image = torch.from_numpy(picture(one.item))
            axis.imshow(torch.where(segment[..., None], image, image // 5).numpy(), extent=(0, width, height, 0))
            axis.contour(one.truth.numpy(), levels=[0.5], colors="white", linewidths=1, extent=(0, width, 0, height))
            iou = (segment & one.truth).sum() / (segment | one.truth).sum()
            axis.set_title(f"IoU {100 * iou.item():.0f} %", fontsize=8)
        line[0].set_ylabel(f"{name}\ncosine > {threshold:.2f}")
    return figure


def _place(one: Prompted) -> tuple[float, float]:
    """Row and column, in pixels, of the centre of the patch that is clicked."""
    assert isinstance(one.places, GridPlaces)
    row, column = divmod(one.places.click(one.truth), one.places.grid[1])
    return (row + 0.5) * one.truth.shape[0] / one.places.grid[0], (column + 0.5) * one.truth.shape[1] / one.places.grid[1]


def curves_figure(runs: dict[str, Path], columns: dict[str, str]) -> Figure:
    """A plot for each column of the runs' metrics.csv, with a line for each run.

    Raises:
        ValueError: no run has one of the columns.
    """
    rows = -(-len(columns) // _PER_ROW)
    figure = Figure(figsize=(3.4 * min(len(columns), _PER_ROW), 2.4 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, min(len(columns), _PER_ROW), squeeze=False).flat
    for axis, (column, title) in zip(axes, columns.items(), strict=False):
        for number, (name, folder) in enumerate(runs.items()):
            with (folder / "metrics.csv").open(newline="") as file:
                points = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=name, color=f"C{number}", linewidth=1.2, marker="." if len(points) < _FEW else None
                )
        if not axis.lines:
            raise ValueError(f"{column}: in no metrics.csv of {', '.join(map(str, runs.values()))}")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("prompts", "curves"))
    parser.add_argument("given", nargs="+", help="backbones or runs, each NAME=PATH")
    parser.add_argument("--masks", type=Path, help="prompts: folder of images and masks; the scenes on which runs are scored when left out")
    parser.add_argument("--size", type=int, help="prompts: side of the images, in pixels; the encoder's own when left out")
    parser.add_argument("--ignore", type=int, help="prompts: mask value that does not count")
    parser.add_argument("--offset", type=int, help="prompts: added to the other mask values")
    parser.add_argument("--columns", nargs="+", help="curves: columns of metrics.csv; k-NN, linear probe, prompt IoU and AUC when left out")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    named = {name: Path(path) for name, _, path in (one.partition("=") for one in given.given)}
    if given.kind == "curves":
        figure = curves_figure(
            named, _SCORES if given.columns is None else {column: (_SCORES | _TITLES).get(column, column) for column in given.columns}
        )
    else:
        masks = Scenes(400, size=64, split="test")
        if given.masks is not None:
            masks = MaskedFolder(given.masks, ignore=given.ignore, offset=given.offset)
        encoders = {name: load_backbone(path) for name, path in named.items()}
        encoders = {"random weights": untrained(next(iter(encoders.values()))), **encoders}
        figure = prompts_figure({name: segments(encoder, masks, size=given.size) for name, encoder in encoders.items()})
    figure.savefig(given.out, dpi=100)
    print(f"{given.out}: {given.out.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
