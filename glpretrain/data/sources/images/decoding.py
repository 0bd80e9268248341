"""Image files: which files of a folder are images, and how one becomes a tensor. Nothing is resized here."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps
from torch import Tensor

from glpretrain.data.sources.base import UnreadableItemError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".npy")
# What readers raise for a damaged file: PIL's plugins raise SyntaxError and ValueError for broken headers, EOFError and OSError for
# truncated data, and they refuse a file that would decode to an absurd size.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@contextmanager
def damage_named(what: object) -> Iterator[None]:
    """Turn the errors of readers of image files into one error that names the file.

    Args:
        what: path of the file, or whatever else names it.

    Raises:
        UnreadableItemError: the file is damaged.
    """
    try:
        yield
    except UnreadableItemError:
        raise
    except _DAMAGE as error:
        raise UnreadableItemError(f"{what}: {error}") from error


def decode(path: Path, *, channels: int) -> Tensor:
    """One image file as UInt8[C H W].

    PIL decodes images of 1 or 3 channels. The orientation of the EXIF tag is applied, and 16 bits are scaled to 8 over their whole range.
    Any other number of channels is read from `.npy` (H W C) or, by tifffile, from TIFF.

    Raises:
        UnreadableItemError: the file is damaged, is no image, or has another number of channels.
    """
    with damage_named(path):
        if path.suffix.lower() == ".npy":
            return _from_array(np.load(path, allow_pickle=False), path, channels=channels)
        if channels not in (1, 3):
            return _from_array(_read_tiff(path), path, channels=channels)
        return decode_pil(path, channels=channels)


def decode_pil(file: Path | str | BinaryIO, *, channels: int) -> Tensor:
    """UInt8[C H W] of a file that PIL opens, with 1 or 3 channels. Raises whatever PIL raises; see `damage_named`."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):
        wide = np.asarray(image, dtype=np.float32)
        # 16-bit files use their whole range; the values of a float file are taken as [0, 1] unless one is larger.
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(wide.max()))
        image = Image.fromarray(np.clip(wide * (255.0 / top), 0, 255).astype(np.uint8))
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1).contiguous()  # [C H W]


def decode_mask(path: Path, *, size: Sequence[int]) -> Tensor:
    """Values of a palette or grey file as Int[H W].

    Raises:
        UnreadableItemError: the file is damaged, or its height and width are not `size`.
    """
    with damage_named(path), Image.open(path) as opened:
        values = torch.from_numpy(np.array(opened)).long()
    if values.shape != tuple(size):
        raise UnreadableItemError(f"{path}: shape {tuple(values.shape)}, but the image has {tuple(size)}; a mask has the size of its image")
    return values


def _read_tiff(path: Path) -> np.ndarray:
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError("only .tif, .tiff and .npy files can have a number of channels other than 1 or 3")
    return tifffile.imread(path)


def _from_array(array: np.ndarray, path: Path, *, channels: int) -> Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] != channels:
        raise UnreadableItemError(f"{path}: shape {array.shape}, expected (height, width, {channels})")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UnreadableItemError(f"{path}: type {array.dtype}, expected uint8 or uint16")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))  # [C H W]


def find_images(root: Path) -> list[Path]:
    """Image files below `root` in the order of their names. Hidden files and folders are left out."""
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.lower().endswith(ENDINGS) and not name.startswith(".")]
    return sorted(found)


def existing_folder(root: str | Path, what: str) -> Path:
    """The folder at `root`, with `~` expanded.

    Args:
        root: path of the folder.
        what: class or argument, for the message.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{what}: {folder} is not a folder")
    return folder
