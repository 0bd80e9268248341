"""Pictures of any number of channels: `.npy` files (H W C), TIFF files by tifffile, and how their numbers become bytes.

Views, masks and memory work on bytes, so a range of values is chosen once, when a file is read. Left out: files that Pillow opens with one
or three channels (`decoding`).
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor

from glpretrain.data.sources.base import UnreadableItemError

MOST_BYTES = 1 << 30  # of one decoded array
TIFF_ENDINGS = (".tif", ".tiff")
GDAL_NODATA = 42113  # number of the tag that holds the value of pixels without one
ValueRange = Sequence[float] | Sequence[Sequence[float]]


def levels_of(value_range: ValueRange | None, *, channels: int, owner: str) -> np.ndarray | None:
    """Float32[2 C], the values that become 0 and 255 in each channel; None where no range is given.

    Args:
        value_range: [low, high], or such a pair for each channel; an empty one is none.
        channels: number of channels.
        owner: class, for the message.

    Raises:
        ValueError: it is neither, or a low value is not below its high one.
    """
    if not value_range:
        return None
    pairs = [pair if isinstance(pair, Sequence) else None for pair in value_range]
    if all(pair is None for pair in pairs) and len(pairs) == 2:
        levels = np.tile(np.array(value_range, dtype=np.float32)[:, None], (1, channels))
    elif len(pairs) == channels and all(pair is not None and len(pair) == 2 for pair in pairs):
        levels = np.array(value_range, dtype=np.float32).T.copy()
    else:
        raise ValueError(f"{owner}: value_range is {value_range}; expected [low, high], or such a pair for each of the {channels} channels")
    if not (np.isfinite(levels).all() and (levels[0] < levels[1]).all()):
        raise ValueError(f"{owner}: value_range is {value_range}; expected numbers with low below high")
    return levels


def ranges_of(levels: np.ndarray | None) -> tuple[tuple[float, float], ...]:
    """The low and the high value of each channel; none where no range is given."""
    return () if levels is None else tuple((float(low), float(high)) for low, high in levels.T)


def way_of(levels: np.ndarray | None) -> str:
    """What a range adds to the way in which an item is stored."""
    return "" if levels is None else f" in {levels.T.tolist()}"


def load_array(path: Path) -> np.ndarray:
    """The array of a `.npy` file. It is mapped, so that a header that claims more than the file holds costs no memory."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("an .npz archive of several arrays; give one .npy file per image")
    return array


def read_tiff(path: Path, *, channels: int) -> tuple[np.ndarray, float | None]:
    """The first picture of a TIFF file (H W C), or (H W), and the value of its pixels without one. Channels may be pages, too."""
    if path.suffix.lower() not in TIFF_ENDINGS:
        raise ValueError("only .tif, .tiff and .npy files can have a number of channels other than 1 or 3")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs does not name the file
    with tifffile.TiffFile(path) as file:
        if not file.pages:
            raise ValueError("a TIFF file without pages")
        series = file.series[0]
        if series.nbytes > MOST_BYTES:
            raise ValueError(f"a TIFF file of shape {series.shape}; accepted: up to {MOST_BYTES} bytes")
        tag = file.pages.first.tags.get(GDAL_NODATA)
        nodata = float(tag.value.strip("\0 ")) if tag is not None and isinstance(tag.value, str) else None
        array = series.asarray()
        in_pages = array.ndim == 3 and array.shape[0] == channels != array.shape[-1]
        return np.moveaxis(array, 0, -1) if series.axes == "SYX" or in_pages else array, nodata


def from_array(array: np.ndarray, path: Path, *, channels: int, levels: np.ndarray | None = None, nodata: float | None = None) -> Tensor:
    """UInt8[C H W] of an array (H W C) or (H W).

    Args:
        array: whole or floating-point numbers; without `levels`, of uint8, or of uint16, of which the upper eight bits are taken.
        path: path of the file, for messages.
        channels: number of channels C.
        levels: Float32[2 C], the values that become 0 and 255; others are clipped, and pixels without a value become 0.
        nodata: the value of pixels without one.

    Raises:
        UnreadableItemError: it has another shape or type, is too large, or no pixel has a value.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] != channels or 0 in array.shape:
        raise UnreadableItemError(f"{path}: shape {array.shape}, expected (height, width, {channels})")
    if array.nbytes > MOST_BYTES:
        raise UnreadableItemError(f"{path}: shape {array.shape}; accepted: up to {MOST_BYTES} bytes")
    if levels is not None:
        array = _scaled(array, path, levels=levels, nodata=nodata)
    elif array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UnreadableItemError(f"{path}: type {array.dtype}, expected uint8 or uint16, or a value_range")
    return torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)  # [C H W]


def _scaled(array: np.ndarray, path: Path, *, levels: np.ndarray, nodata: float | None) -> np.ndarray:
    """UInt8 of the same shape."""
    if array.dtype.kind not in "uif":
        raise UnreadableItemError(f"{path}: type {array.dtype}, expected whole or floating-point numbers")
    with np.errstate(all="ignore"):
        wide = array.astype(np.float32)
        known = np.isfinite(wide) if nodata is None else np.isfinite(wide) & (wide != np.float32(nodata))
        if not known.any():
            raise UnreadableItemError(f"{path}: no pixel has a value")
        share = np.clip((wide - levels[0]) / (levels[1] - levels[0]), 0, 1)
        return np.where(known, np.rint(share * 255), 0).astype(np.uint8)
