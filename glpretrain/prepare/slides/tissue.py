"""Tissue detection on the thumbnail of a slide: Otsu's threshold on the saturation, then morphology.

1. A thumbnail that is finer than 4 microns per pixel is reduced to about this resolution. Then it is smoothed by one pixel.
2. A pixel is tissue where the saturation, (max - min) / max over the colours, is above Otsu's threshold. The threshold is clamped to
   [0.05, 0.15], because Otsu always finds two classes: it would split the noise of the glass on a blank slide, and the tissue on a
   slide without glass.
3. Ink is removed, with 20 microns around it: green to cyan hues, strongly saturated blue, and nearly black pixels. No stain has these
   colours. Red ink has the colour of eosin and is not removed.
4. Gaps of up to 40 microns are closed, holes below 0.01 square millimetres are filled, and pieces below this area are removed.

The values are our own. Left out: out-of-focus regions, folds, and networks that segment tissue.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.morphology import isotropic_closing, isotropic_dilation

_FINEST = 4.0  # microns per pixel; single cells do not matter
_INK_MARGIN, _GAP = 20.0, 20.0  # microns, radii
_LEAST_THRESHOLD, _LARGEST_THRESHOLD = 0.05, 0.15
_LARGEST_HOLE, _LEAST_PIECE = 10_000.0, 10_000.0  # square microns
_GREEN, _BLUE = (75.0, 195.0), (195.0, 255.0)  # degrees of hue
_BLUE_SATURATION = 0.6


class Tissue(NamedTuple):
    """The tissue on a thumbnail."""

    mask: np.ndarray  # Bool[H W]
    threshold: float  # of saturation


def find_tissue(thumbnail: np.ndarray, *, mpp: float) -> Tissue:
    """Detect the tissue on a thumbnail.

    Args:
        thumbnail: UInt8[H W 3].
        mpp: microns along one pixel of the thumbnail.
    """
    factor = max(1, int(_FINEST / mpp))
    reduced = np.asarray(Image.fromarray(np.ascontiguousarray(thumbnail)).reduce(factor), dtype=np.float32)
    found = _found(reduced, mpp=mpp * factor)
    height, width, _ = thumbnail.shape
    return found._replace(mask=found.mask.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width])


def _found(pixels: np.ndarray, *, mpp: float) -> Tissue:
    """`find_tissue` on Float[H W 3], without a change of the resolution."""
    colours = ndimage.gaussian_filter(pixels / 255, sigma=(1.0, 1.0, 0))  # [H W 3]
    value = colours.max(axis=-1)  # [H W]
    spread = value - colours.min(axis=-1)  # [H W]
    saturation = spread / np.maximum(value, 1e-6)  # [H W]
    # Otsu is undefined on a single value.
    otsu = float(threshold_otsu(saturation)) if float(np.ptp(saturation)) > 1e-6 else 0.0
    threshold = min(max(otsu, _LEAST_THRESHOLD), _LARGEST_THRESHOLD)
    ink = _ink(colours, value=value, spread=spread, saturation=saturation)
    if ink.any():
        ink = isotropic_dilation(ink, _INK_MARGIN / mpp)
    mask = (saturation > threshold) & ~ink
    if mask.any():
        mask = isotropic_closing(_padded(mask, _GAP / mpp), _GAP / mpp)[_inside(mask.shape, _GAP / mpp)] & ~ink
        mask = ~_without_small(~mask, least=_LARGEST_HOLE / mpp**2) & ~ink
        mask = _without_small(mask, least=_LEAST_PIECE / mpp**2)
    return Tissue(mask, threshold)


def _ink(colours: np.ndarray, *, value: np.ndarray, spread: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """Bool[H W]: pixels that have the colour of ink."""
    red, green, blue = np.moveaxis(colours, -1, 0)
    safe = np.maximum(spread, 1e-6)
    of_others = np.where(value == blue, 4 + (red - green) / safe, ((green - blue) / safe) % 6)
    hue = 60 * np.where(value == green, 2 + (blue - red) / safe, of_others)  # [H W]
    greenish = (hue >= _GREEN[0]) & (hue < _GREEN[1]) & (saturation > _LEAST_THRESHOLD + 0.05)
    bluish = (hue >= _BLUE[0]) & (hue < _BLUE[1]) & (saturation > _BLUE_SATURATION)
    black = (value < 0.1) | ((value < 0.3) & (saturation < 0.3))
    return greenish | bluish | black


def _padded(mask: np.ndarray, radius: float) -> np.ndarray:
    """The mask with its border repeated, so that closing removes no tissue at the edge of the slide."""
    return np.pad(mask, int(np.ceil(radius)), mode="edge")


def _inside(shape: tuple[int, ...], radius: float) -> tuple[slice, ...]:
    margin = int(np.ceil(radius))
    return tuple(slice(margin, margin + side) for side in shape)


def _without_small(mask: np.ndarray, *, least: float) -> np.ndarray:
    """Bool[H W] without connected pieces of fewer than `least` pixels."""
    pieces = np.zeros(mask.shape, dtype=np.int32)
    ndimage.label(mask, output=pieces)
    large = np.bincount(pieces.ravel()) >= least
    large[0] = False
    return large[pieces]
