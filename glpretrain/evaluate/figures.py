"""Pictures of dense predictions: class maps beside their truth, boxes, attention heads. Figures without pyplot, a handful of images each.

Similarity plots (`similarity`) and reports (`glpretrain.report`) are left out.
"""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

_NUM_SHOWN = 6
_IGNORED = (0.0, 0.0, 0.0)
_TRUE, _FOUND = "#009e73", "#d55e00"


def shown_positions(count: int) -> list[int]:
    """Positions of the items that pictures show: evenly spaced, at most 6 of `count`."""
    shown = min(_NUM_SHOWN, count)
    return [number * count // shown for number in range(shown)]


def curves_figure(title: str, *, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty plot of curves, with names for its axes; the legend is the caller's, once there are curves."""
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def segmentation_figure(
    images: Sequence[Tensor], *, truths: Sequence[Tensor], predictions: Sequence[Tensor], classes: Sequence[str]
) -> Figure:
    """One column per image: the image, its truth and the prediction, under one legend.

    Args:
        images: the images, UInt8[C H W] each.
        truths: true classes, Int[H W] each, -1 (black) where a pixel does not count.
        predictions: predicted classes, Int[H W] each.
        classes: names of the classes.
    """
    colours = class_colours(len(classes))
    painted = torch.tensor([*colours, _IGNORED])  # Float[C+1 3]  -1 finds the last
    figure = Figure(figsize=(1.9 * len(images), 1.9 * 3 * _aspect(images[0]) + 0.9), layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False)
    for column, (image, truth, prediction) in enumerate(zip(images, truths, predictions, strict=True)):
        shown = [picture(image), painted[truth].numpy(), painted[prediction].numpy()]
        for axis, array in zip(axes[:, column], shown, strict=True):
            _show(axis, array)
    for axis, title in zip(axes[:, 0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(title, fontsize=8, loc="left")
    present = torch.cat([mask.flatten() for mask in (*truths, *predictions)]).unique().tolist()
    handles = [Patch(color=colours[number], label=classes[number]) for number in present if number >= 0]
    if -1 in present:
        handles.append(Patch(color=_IGNORED, label="not counted"))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(2, len(images)), fontsize=7, frameon=False)
    return figure


def boxes_figure(images: Sequence[Tensor], *, found: Sequence[Tensor], true: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """One column per image, with the box that was found and the true ones.

    Args:
        images: the images, UInt8[C H W] each.
        found: the boxes that were found, Int[4] each: left, top, right, bottom in pixels, the last two exclusive.
        true: the true boxes, Int[M 4] each.
        titles: a title for each image.
    """
    figure = Figure(figsize=(1.9 * len(images), 1.9 * _aspect(images[0]) + 0.7), layout="constrained")
    axes = figure.subplots(1, len(images), squeeze=False)[0]
    for axis, image, box, boxes, title in zip(axes, images, found, true, titles, strict=True):
        _show(axis, picture(image))
        for edges in boxes.tolist():
            _box(axis, edges, _TRUE)
        _box(axis, box.tolist(), _FOUND)
        axis.set_title(title, fontsize=8)
    handles = [Patch(color=_FOUND, label="found"), Patch(color=_TRUE, label="true")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return figure


def attention_figure(images: Sequence[Tensor], *, attention: Sequence[Tensor], kept: Sequence[Tensor], jaccard: Sequence[Tensor]) -> Figure:
    """One row per image: the image, then each head's attention with the outline of what is kept; the best head's title is bold.

    Args:
        images: the images, UInt8[C H W] each.
        attention: attention of each head, Float[heads h w] each.
        kept: patches that are kept, Bool[heads h w] each.
        jaccard: Jaccard index of each head in [0, 1], Float[heads] each.
    """
    heads = len(attention[0])
    figure = Figure(figsize=(1.6 * (heads + 1), (1.6 * _aspect(images[0]) + 0.25) * len(images)), layout="constrained")
    axes = figure.subplots(len(images), heads + 1, squeeze=False)
    for row, image, maps, masks, values in zip(axes, images, attention, kept, jaccard, strict=True):
        height, width = image.shape[1:]
        _show(row[0], picture(image))
        best = int(values.argmax())
        for head, (axis, heat, mask) in enumerate(zip(row[1:], maps, masks, strict=True)):
            axis.imshow(heat.numpy(), extent=(0, width, height, 0), interpolation="nearest", cmap="viridis")
            _outline(axis, mask, (height, width))
            axis.set_axis_off()
            weight = "bold" if head == best else "normal"
            axis.set_title(f"head {head + 1}: {100 * values[head].item():.0f} %", fontsize=7, fontweight=weight)
    return figure


def prompts_figure(
    images: Sequence[Tensor],
    *,
    prompts: Sequence[tuple[float, float]],
    similarity: Sequence[Tensor],
    threshold: float,
    truths: Sequence[Tensor],
) -> Figure:
    """One column per image: the prompt on the image, the similarity to it, and the segment beside the outline of the object.

    Args:
        images: the images, UInt8[C H W] each.
        prompts: row and column of each prompt, in pixels.
        similarity: cosines, Float[H W] each.
        threshold: the segment is where the cosines exceed it.
        truths: the objects that were prompted, Bool[H W] each.
    """
    figure = Figure(figsize=(1.9 * len(images), 1.9 * 3 * _aspect(images[0]) + 0.5), layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False)
    for column, image, (row, left), heat, truth in zip(axes.T, images, prompts, similarity, truths, strict=True):
        segment = heat > threshold
        iou = (segment & truth).sum() / (segment | truth).sum()
        shown = picture(image)
        height, width = truth.shape
        for axis, array in zip(column, (shown, heat.numpy(), np.where(segment.numpy()[..., None], shown, shown // 4)), strict=True):
            axis.imshow(array, extent=(0, width, height, 0), interpolation="nearest")
            axis.set_axis_off()
        column[0].plot(left, row, marker="o", markersize=5, color=_FOUND, markeredgecolor="white")
        _outline(column[2], truth, truth.shape)
        column[2].set_title(f"IoU {100 * iou.item():.0f} %", fontsize=8)
    for axis, title in zip(axes[:2, 0], ("prompt", "similarity"), strict=True):
        axis.set_title(title, fontsize=8, loc="left")
    figure.supxlabel(f"kept: similarity above {threshold:.2f}; outline: the object", fontsize=8)
    return figure


def class_colours(count: int) -> list[tuple[float, float, float]]:
    """As many colours that can be told apart, the strong ones first; beyond 20 they go round the colour circle."""
    pairs = [colormaps["tab20"](number) for number in range(20)]  # each strong colour is followed by its pale one
    chosen = [*pairs[::2], *pairs[1::2]][:count] if count <= 20 else [colormaps["hsv"](number / count) for number in range(count)]
    return [(red, green, blue) for red, green, blue, _ in chosen]


def picture(image: Tensor) -> np.ndarray:
    """UInt8[C H W] to UInt8[H W 3] for a person: anything but three channels becomes the grey of their mean.

    Other numbers, Float[C H W], are stretched from the smallest to the largest of them; of a filterbank, time then runs downwards.
    """
    if image.is_floating_point():
        low, high = image.aminmax()
        image = ((image - low) / (high - low).clamp_min(1e-12) * 255).byte()
    shown = image if len(image) == 3 else image.float().mean(dim=0, keepdim=True).byte().expand(3, -1, -1)
    return shown.permute(1, 2, 0).numpy()


def _aspect(image: Tensor) -> float:
    return image.shape[1] / image.shape[2]


def _show(axis: Axes, array: np.ndarray) -> None:
    axis.imshow(array, interpolation="nearest")
    axis.set_axis_off()


def _box(axis: Axes, edges: Sequence[int], colour: str) -> None:
    left, top, right, bottom = edges
    # Pixel centres are whole numbers, edges lie half a pixel before them.
    axis.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5))


def _outline(axis: Axes, mask: Tensor, size: Sequence[int]) -> None:
    """The border of Bool[h w] over a picture of the given height and width, along the edges of patches."""
    rows, columns = mask.shape
    step = size[0] / rows, size[1] / columns
    padded = np.pad(mask.numpy(), 1)
    for row, column in zip(*np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1]), strict=True):
        axis.plot([column * step[1], (column + 1) * step[1]], [row * step[0]] * 2, color="white", linewidth=1)
    for row, column in zip(*np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1]), strict=True):
        axis.plot([column * step[1]] * 2, [row * step[0], (row + 1) * step[0]], color="white", linewidth=1)
