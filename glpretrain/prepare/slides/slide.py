"""What every reader of a whole-slide image offers: a pyramid of levels, the microns per pixel, and any region of a level.

Left out: the readers themselves (`vendor` for files that OpenSlide opens, `tiff` for other TIFF files), and the choice of tiles.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Other values are the resolution of a printer (72 dpi is 353 microns) or were never set.
_LEAST_MPP, _LARGEST_MPP = 0.05, 20.0
_MOST_PIXELS_PER_BYTE = 2000  # of a TIFF file; white tiles have 200, and a canvas that was scanned in small part only some more


class UnreadableSlideError(ValueError):
    """A slide cannot be read. The message names the file and the reason."""


class Level(NamedTuple):
    """One resolution of a slide."""

    width: int  # pixels
    height: int
    downsample: float  # pixels of level 0 per pixel of this level, along one axis


class Slide(ABC):
    """An opened slide. Close it, or use it as a context manager. The constructor of a subclass sets the attributes."""

    reader: str  # name of the package that reads the file
    path: Path
    levels: Sequence[Level]  # full resolution first
    mpp: float | None  # microns along one pixel of level 0; None where the file gives no plausible value

    @abstractmethod
    def read(self, level: int, *, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Read a region. Pixels that the slide does not hold are white.

        Args:
            level: index into `levels`.
            x: left edge in pixels of the level.
            y: top edge in pixels of the level.
            width: width in pixels of the level; the region lies inside the level.
            height: height in pixels of the level.

        Returns:
            UInt8[H W 3].

        Raises:
            UnreadableSlideError: the file is damaged there.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def plausible_mpp(along_x: float, along_y: float) -> float | None:
    """The mean of both values; None where they are implausible for a microscope or differ by more than a twentieth of it."""
    if not all(_LEAST_MPP <= value <= _LARGEST_MPP for value in (along_x, along_y)):
        return None
    mean = (along_x + along_y) / 2
    return mean if abs(along_x - along_y) <= 0.05 * mean else None


def require_plausible_size(slide: Slide) -> None:
    """Refuse a damaged header, because a slide is searched for tissue from edge to edge.

    Raises:
        UnreadableSlideError: a TIFF file has far more pixels than its bytes can hold.
    """
    width, height, _ = slide.levels[0]
    num_bytes = slide.path.stat().st_size
    with slide.path.open("rb") as file:
        is_tiff = file.read(2) in (b"II", b"MM")  # other slides have their pixels in files beside this one
    if is_tiff and width * height > _MOST_PIXELS_PER_BYTE * num_bytes:
        raise UnreadableSlideError(f"{slide.path}: {width} x {height} pixels in a file of {num_bytes} bytes: it is damaged or cut short")
