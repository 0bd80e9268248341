"""The tiles of a slide: level, grid, and the share of tissue in each tile. Left out: reading their pixels (`cutting`).

The side of a tile is `size * mpp` microns long. A tile is read from the coarsest level that is at least as fine as `mpp`, and resampled;
the pixels of a level within 2 % of `mpp` are taken as they are. Only whole tiles are cut: nothing is padded at the right and lower edge.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from glpretrain.prepare.slides.folder import Settings
from glpretrain.prepare.slides.slide import Slide
from glpretrain.prepare.slides.tissue import find_tissue

_THUMBNAIL = 2048  # pixels along its longer side at most
_BLOCK = 2048  # pixels along the side of the region of a level that is held while the thumbnail is computed
_NATIVE = 0.02  # relative difference of resolutions up to which the pixels of a level are taken as they are
_NEIGHBOURHOOD = 8  # tiles: neighbouring tiles are cut one after the other, so that a native tile is decoded only once


class Plan(NamedTuple):
    """The tiles of one slide, in the order in which they are cut."""

    level: int  # index into the levels of the slide
    slide_mpp: float  # microns along one pixel of level 0
    span: float  # pixels of the level along the side of a tile
    native: bool  # whether the pixels of a tile are pixels of the level
    corners: np.ndarray  # Float[N 2]  x, y of the upper left corner, in pixels of the level
    tissue: np.ndarray  # Float[N]  share of tissue

    @property
    def num_tiles(self) -> int:
        return len(self.tissue)


class Overview(NamedTuple):
    """The slide as a whole."""

    thumbnail: np.ndarray  # UInt8[H W 3]
    mask: np.ndarray  # Bool[H W]  tissue
    factor: int  # pixels of level 0 along one pixel of the thumbnail


def plan_tiles(slide: Slide, settings: Settings) -> tuple[Plan, Overview]:
    """Choose the tiles of a slide.

    Raises:
        ValueError: neither the file nor the settings give the microns per pixel of the slide, or the slide is coarser than the tiles.
        UnreadableSlideError: the slide is damaged.
    """
    slide_mpp = slide.mpp if slide.mpp is not None else settings.mpp_of_slide
    if slide_mpp is None:
        raise ValueError(f"{slide.path}: the file does not give its microns per pixel; give mpp_of_slide (for example 0.25 at 40x)")
    if slide_mpp > settings.mpp * (1 + _NATIVE):
        raise ValueError(f"{slide.path}: mpp {settings.mpp} is finer than the {slide_mpp:.3g} of the slide; accepted: at least that")
    level = _level_for(slide, wanted=settings.mpp / slide_mpp)
    scale = settings.mpp / (slide_mpp * slide.levels[level].downsample)  # pixels of the level along one pixel of a tile
    native = abs(scale - 1) <= _NATIVE
    scale = 1.0 if native else scale
    span, stride = settings.size * scale, (settings.size - settings.overlap) * scale
    columns, rows = (_whole(side, span=span, stride=stride) for side in slide.levels[level][:2])
    overview = _overview(slide, slide_mpp=slide_mpp)
    row, column = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    near = np.lexsort((column, row, column // _NEIGHBOURHOOD, row // _NEIGHBOURHOOD))
    corners = np.stack([column, row], axis=1)[near] * stride  # [N 2]
    tissue = _share(overview, corners * slide.levels[level].downsample, side=span * slide.levels[level].downsample)
    # Tiles without any tissue are never cut, even with min_tissue 0.
    kept = (tissue >= settings.min_tissue) & (tissue > 0)
    return Plan(level, slide_mpp, span, native, corners[kept], tissue[kept]), overview


def _level_for(slide: Slide, *, wanted: float) -> int:
    """The coarsest level whose downsampling is at most `wanted`."""
    return max(index for index, level in enumerate(slide.levels) if level.downsample <= wanted * (1 + _NATIVE) or index == 0)


def _whole(side: int, *, span: float, stride: float) -> int:
    """Number of tiles that fit along a side. A last tile that would not fit because of a rounding error counts."""
    return max(0, math.floor((side - span) / stride + 1e-6) + 1)


def _overview(slide: Slide, *, slide_mpp: float) -> Overview:
    width, height, _ = slide.levels[0]
    factor = max(1, math.ceil(max(width, height) / _THUMBNAIL))
    thumbnail = thumbnail_of(slide, factor=factor)
    return Overview(thumbnail, find_tissue(thumbnail, mpp=slide_mpp * factor).mask, factor)


def thumbnail_of(slide: Slide, *, factor: int) -> np.ndarray:
    """The slide reduced block by block, because it may have only one level.

    Args:
        slide: an opened slide.
        factor: pixels of level 0 along one pixel of the result.

    Returns:
        UInt8[H W 3].
    """
    level = _level_for(slide, wanted=factor)
    ratio = factor / slide.levels[level].downsample  # pixels of the level along one pixel of the thumbnail
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
    """A region with fractional borders, resampled to a size.

    Args:
        slide: an opened slide.
        level: index into the levels of the slide.
        corner: x, y of the upper left corner in pixels of the level.
        span: width and height in pixels of the level.
        size: width and height in pixels of the result.
        filter: antialiased filter of Pillow.

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
    left, top = (max(0.0, start - begin) for start, begin in zip(corner, first, strict=True))
    right, bottom = (min(start + length, end) - begin for start, length, begin, end in zip(corner, span, first, last, strict=True))
    return np.asarray(Image.fromarray(region).resize(size, filter, box=(left, top, right, bottom)))


def _share(overview: Overview, corners: np.ndarray, *, side: float) -> np.ndarray:
    """Float[N]: share of tissue in squares. Their corners, Float[N 2], and their side are in pixels of level 0."""
    height, width = overview.mask.shape
    sums = np.zeros((height + 1, width + 1), dtype=np.int64)
    sums[1:, 1:] = overview.mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    limits = np.array([width, height])
    first = np.clip(np.rint(corners / overview.factor).astype(np.int64), 0, limits - 1)  # [N 2]
    last = np.clip(np.rint((corners + side) / overview.factor).astype(np.int64), first + 1, limits)  # [N 2]
    (x0, y0), (x1, y1) = first.T, last.T
    return (sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]) / ((x1 - x0) * (y1 - y0))
