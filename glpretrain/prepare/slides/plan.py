"""Which tiles a slide gives: level, grid, and the share of tissue under each. Reading their pixels at full detail is `cutting`.

A tile covers `size * mpp` microns. It is read from the coarsest level that is at least as fine as `mpp` and resampled; a level within
2 % of `mpp` is taken pixel by pixel. Only whole tiles are cut: what is left over at the right and lower edge is not padded.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from glpretrain.prepare.slides.settings import Settings
from glpretrain.prepare.slides.slide import Slide
from glpretrain.prepare.slides.tissue import find_tissue

_THUMBNAIL = 2048  # pixels of its longer side at most
_BLOCK = 2048  # pixels of a level that are held at a time while the thumbnail is made
_NATIVE = 0.02
_NEIGHBOURHOOD = 8  # tiles: near ones are cut one after the other, so that a native tile is decoded once


class Plan(NamedTuple):
    """The tiles of one slide, in the order in which they are cut."""

    level: int  # index into the slide's levels
    slide_mpp: float  # microns along one pixel of level 0
    span: float  # pixels of the level along a tile's side
    native: bool  # whether a tile's pixels are the level's own
    corners: np.ndarray  # Float[N 2]  x, y of the upper left corner, in pixels of the level
    tissue: np.ndarray  # Float[N]  share of tissue

    @property
    def num_tiles(self) -> int:
        return len(self.tissue)


class Overview(NamedTuple):
    """The slide as a whole."""

    thumbnail: np.ndarray  # UInt8[H W 3]
    mask: np.ndarray  # Bool[H W]  tissue
    factor: int  # pixels of level 0 along one of its own


def plan_tiles(slide: Slide, settings: Settings) -> tuple[Plan, Overview]:
    """Choose the tiles of a slide.

    Raises:
        ValueError: the slide does not say its microns per pixel and the settings do not either, or it is coarser than the tiles.
        UnreadableSlideError: the slide is damaged.
    """
    slide_mpp = slide.mpp if slide.mpp is not None else settings.mpp_of_slide
    if slide_mpp is None:
        raise ValueError(f"{slide.path}: the file does not say how many microns a pixel has; give mpp_of_slide (0.25 at 40x, say)")
    if slide_mpp > settings.mpp * (1 + _NATIVE):
        raise ValueError(f"{slide.path}: mpp {settings.mpp} is finer than the slide's {slide_mpp:.3g}; accepted: at least that")
    level = _level_for(slide, wanted=settings.mpp / slide_mpp)
    scale = settings.mpp / (slide_mpp * slide.levels[level].downsample)  # pixels of the level along one of a tile
    native = abs(scale - 1) <= _NATIVE
    scale = 1.0 if native else scale
    span, stride = settings.size * scale, (settings.size - settings.overlap) * scale
    columns, rows = (_whole(side, span=span, stride=stride) for side in slide.levels[level][:2])
    overview = _overview(slide, slide_mpp=slide_mpp)
    row, column = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    near = np.lexsort((column, row, column // _NEIGHBOURHOOD, row // _NEIGHBOURHOOD))
    corners = np.stack([column, row], axis=1)[near] * stride  # [N 2]
    tissue = _share(overview, corners * slide.levels[level].downsample, side=span * slide.levels[level].downsample)
    # A tile without any tissue is never one, whatever the least share.
    kept = (tissue >= settings.min_tissue) & (tissue > 0)
    return Plan(level, slide_mpp, span, native, corners[kept], tissue[kept]), overview


def _level_for(slide: Slide, *, wanted: float) -> int:
    """The coarsest level whose downsampling does not exceed the wanted one."""
    return max(index for index, level in enumerate(slide.levels) if level.downsample <= wanted * (1 + _NATIVE) or index == 0)


def _whole(side: int, *, span: float, stride: float) -> int:
    """How many tiles fit; a last one that a rounding error would push out counts."""
    return max(0, math.floor((side - span) / stride + 1e-6) + 1)


def _overview(slide: Slide, *, slide_mpp: float) -> Overview:
    width, height, _ = slide.levels[0]
    factor = max(1, math.ceil(max(width, height) / _THUMBNAIL))
    thumbnail = thumbnail_of(slide, factor=factor)
    return Overview(thumbnail, find_tissue(thumbnail, mpp=slide_mpp * factor).mask, factor)


def thumbnail_of(slide: Slide, *, factor: int) -> np.ndarray:
    """The slide made small, block by block: it may have one level only.

    Args:
        slide: any.
        factor: pixels of level 0 along one of the result.

    Returns:
        UInt8[H W 3].
    """
    level = _level_for(slide, wanted=factor)
    ratio = factor / slide.levels[level].downsample  # pixels of the level along one of the thumbnail
    width, height = (max(1, side // factor) for side in slide.levels[0][:2])
    thumbnail = np.empty((height, width, 3), dtype=np.uint8)
    step = max(1, int(_BLOCK / ratio))
    for top in range(0, height, step):
        for left in range(0, width, step):
            size = (min(step, width - left), min(step, height - top))
            corner, span = (left * ratio, top * ratio), (size[0] * ratio, size[1] * ratio)
            block = read_resampled(slide, level, corner=corner, span=span, size=size, filter=Image.Resampling.BOX)
            thumbnail[top : top + size[1], left : left + size[0]] = block
    return thumbnail


def read_resampled(
    slide: Slide, level: int, *, corner: tuple[float, float], span: tuple[float, float], size: tuple[int, int], filter: Image.Resampling
) -> np.ndarray:
    """A region with fractional borders, brought to a size.

    Args:
        slide: where it is.
        level: index into its levels.
        corner: x, y in pixels of the level.
        span: width and height in pixels of the level.
        size: width and height in pixels of the result.
        filter: Pillow's, antialiased.

    Returns:
        UInt8[H W 3].
    """
    limits = slide.levels[level][:2]
    first = [min(math.floor(start + 1e-6), limit - 1) for start, limit in zip(corner, limits, strict=True)]
    last = [
        min(max(math.ceil(start + length - 1e-6), begin + 1), limit)
        for start, length, begin, limit in zip(corner, span, first, limits, strict=True)
    ]
    region = slide.read(level, x=first[0], y=first[1], width=last[0] - first[0], height=last[1] - first[1])
    low = [max(0.0, start - begin) for start, begin in zip(corner, first, strict=True)]
    high = [min(start + length, end) - begin for start, length, begin, end in zip(corner, span, first, last, strict=True)]
    return np.asarray(Image.fromarray(region).resize(size, filter, box=(*low, *high)))


def _share(overview: Overview, corners: np.ndarray, *, side: float) -> np.ndarray:
    """Share of tissue, Float[N], under squares whose corners, Float[N 2], and side are in pixels of level 0."""
    height, width = overview.mask.shape
    sums = np.zeros((height + 1, width + 1), dtype=np.int64)
    sums[1:, 1:] = overview.mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    limits = np.array([width, height])
    first = np.clip(np.rint(corners / overview.factor).astype(np.int64), 0, limits - 1)  # [N 2]
    last = np.clip(np.rint((corners + side) / overview.factor).astype(np.int64), first + 1, limits)  # [N 2]
    (x0, y0), (x1, y1) = first.T, last.T
    return (sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]) / ((x1 - x0) * (y1 - y0))
