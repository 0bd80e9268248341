"""The pictures of the report as matplotlib figures, for notebooks and papers.

A notebook shows them after `%matplotlib inline`; nothing here touches pyplot's global state. The interactive page is left out (`page`).
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from glpretrain.encoders import Encoder
from glpretrain.report.maps import Layers, Picture, Seen, Size, attention, layer_numbers, look, patch_pca, similarity_map

COLOURS = "viridis"
OPACITY = 0.7  # of a similarity map over the grey picture
DIMMED = 0.4  # what is left of the grey picture's brightness outside a mask
_OUTLINE, _PROMPT = "#ff2d6f", "white"
_CELL, _TITLE = 1.9, 0.3  # inches


def attention_figure(encoder: Encoder, image: Picture, *, layers: Layers = "last", size: Size = None) -> Figure:
    """Where the class token looks: a row per block, a column per head, and their mean; every map from zero to its own maximum.

    Args:
        encoder: a ViT with a class token, in evaluation mode.
        image: a picture: a file, or UInt8[C H W].
        layers: blocks, counted from 0, or from the last in negative numbers; or "all", or "last".
        size: see `look`.

    Raises:
        ValueError: see `look` and `attention`.
    """
    seen = look(encoder, image, size=size)
    maps = attention(encoder, seen, layers=layers)  # [L heads h w]
    figure, axes = _grid(seen, len(maps), maps.shape[1] + 2)
    for row, number, heads in zip(axes, layer_numbers(encoder, layers), maps, strict=True):
        _show(row[0], _rgb(seen), f"block {number}")
        for column, head in enumerate(heads):
            _show(row[column + 1], head.numpy(), f"head {column}", vmin=0)
        _show(row[-1], heads.mean(dim=0).numpy(), "mean", vmin=0)
    return figure


def pca_figure(encoder: Encoder, image: Picture, *, size: Size = None) -> Figure:
    """The picture beside the first three principal components of its patches, as red, green and blue.

    Args:
        encoder: an encoder in evaluation mode.
        image: a picture: a file, or UInt8[C H W].
        size: see `look`.

    Raises:
        ValueError: see `look`.
    """
    seen = look(encoder, image, size=size)
    figure, ((left, right),) = _grid(seen, 1, 2)
    _show(left, _rgb(seen), "as the encoder sees it")
    _show(right, patch_pca(seen).numpy(), "PCA of patches")
    return figure


def similarity_figure(
    encoder: Encoder,
    image: Picture,
    *,
    patch: tuple[int, int],
    threshold: float = 0.5,
    size: Size = None,
) -> Figure:
    """The prompt, the similarity of all patches to it, and the mask above the threshold.

    Args:
        encoder: an encoder in evaluation mode.
        image: a picture: a file, or UInt8[C H W].
        patch: row and column of the prompt.
        threshold: the mask is where the upsampled cosine exceeds it.
        size: see `look`.

    Raises:
        ValueError: see `look`, or there is no such patch.
    """
    seen = look(encoder, image, size=size)
    figure, ((prompt, heat, mask),) = _grid(seen, 1, 3)
    _show(prompt, _rgb(seen), f"patch {patch}")
    _mark(prompt, seen, patch)
    _draw_similarity(heat, mask, seen, patch=patch, threshold=threshold)
    return figure


def compare_figure(
    encoders: Mapping[str, Encoder],
    image: Picture,
    *,
    point: tuple[float, float] = (0.5, 0.5),
    threshold: float = 0.5,
    size: Size = None,
) -> Figure:
    """A row per encoder: the prompt, similarity, mask and PCA.

    Args:
        encoders: encoders by the name that they are shown under; in evaluation mode.
        image: a picture: a file, or UInt8[C H W].
        point: of the prompt, down and across, as shares of height and width; each encoder is prompted with its patch there.
        threshold: the mask is where the upsampled cosine exceeds it.
        size: see `look`.

    Raises:
        ValueError: there is no encoder, or the point is outside the picture, or see `look`.
    """
    if not encoders:
        raise ValueError("inspect: no encoders given; accepted: at least one")
    if not all(0 <= share < 1 for share in point):
        raise ValueError(f"inspect: point={point}; accepted: two shares from 0 up to, not including, 1")
    views = {name: look(encoder, image, size=size) for name, encoder in encoders.items()}
    figure, axes = _grid(next(iter(views.values())), len(views), 4)
    for (prompt, heat, mask, pca), (name, seen) in zip(axes, views.items(), strict=True):
        patch = int(point[0] * seen.grid[0]), int(point[1] * seen.grid[1])
        _show(prompt, _rgb(seen), name)
        _mark(prompt, seen, patch)
        _draw_similarity(heat, mask, seen, patch=patch, threshold=threshold)
        _show(pca, patch_pca(seen).numpy(), "PCA of patches")
    return figure


def _draw_similarity(heat: Axes, mask: Axes, seen: Seen, *, patch: tuple[int, int], threshold: float) -> None:
    similarity = similarity_map(seen, patch=patch)  # [H W]
    above = similarity > threshold  # [H W]
    rgb = _rgb(seen)
    grey = rgb.mean(axis=-1, keepdims=True)
    _show(heat, grey, "cosine similarity", cmap="gray", vmin=0, vmax=1)
    drawn = heat.imshow(similarity.numpy(), cmap=COLOURS, alpha=OPACITY, interpolation="nearest")
    heat.figure.colorbar(drawn, ax=heat, shrink=0.8, pad=0.02).ax.tick_params(labelsize=6)
    _mark(heat, seen, patch)
    _show(mask, np.where(above.numpy()[:, :, None], rgb, DIMMED * grey), f"above {threshold:g}: {above.float().mean():.0%}")
    if above.any() and not above.all():
        mask.contour(above.numpy(), levels=[0.5], colors=[_OUTLINE], linewidths=1.0)


def _grid(seen: Seen, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, [rows columns]."""
    height, width = seen.pixels.shape[1:]
    figure = Figure(figsize=(_CELL * columns, (_CELL * height / width + _TITLE) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: Axes, picture: np.ndarray, title: str, **how: str | float) -> None:
    axes.imshow(picture, interpolation="nearest", **{"cmap": COLOURS, **how})
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()


def _mark(axes: Axes, seen: Seen, patch: tuple[int, int]) -> None:
    """Frame the prompt's patch."""
    height, width = (length / count for length, count in zip(seen.pixels.shape[1:], seen.grid, strict=True))
    corner = patch[1] * width - 0.5, patch[0] * height - 0.5
    for colour, line in (("black", 2.6), (_PROMPT, 1.2)):
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line))


def _rgb(seen: Seen) -> np.ndarray:
    """Float[H W 3] in [0, 1]."""
    return (seen.pixels.float() / 255).expand(3, -1, -1).permute(1, 2, 0).numpy()
