"""What every reader of a whole-slide image offers: a pyramid of levels, microns per pixel, and any region of a level.

Left out: the readers (`vendor` for what OpenSlide opens, `tiff` for other TIFF) and every choice of what is cut.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_LEAST_MPP, _LARGEST_MPP = 0.05, 20.0  # outside: a printer's resolution (72 dpi is 353 microns), or a number never set


class UnreadableSlideError(ValueError):
    """A slide that cannot be read; the message names the file and the reason."""


class Level(NamedTuple):
    """One resolution of a slide."""

    width: int  # pixels
    height: int
    downsample: float  # pixels of level 0 along one of this level's


class Slide(ABC):
    """An opened slide. Close it, or use it as a context."""

    reader: str  # what opened it

    @property
    @abstractmethod
    def path(self) -> Path:
        """The file."""

    @property
    @abstractmethod
    def levels(self) -> Sequence[Level]:
        """From the full resolution down."""

    @property
    @abstractmethod
    def mpp(self) -> float | None:
        """Microns along one pixel of level 0; None where the file does not say, or nothing plausible."""

    @abstractmethod
    def read(self, level: int, *, x: int, y: int, width: int, height: int) -> np.ndarray:
        """A region, white where the slide holds no pixels.

        Args:
            level: index into `levels`.
            x: left edge in the level's own pixels.
            y: top edge.
            width: in the level's own pixels; the region lies inside the level.
            height: likewise.

        Returns:
            UInt8[H W 3].

        Raises:
            UnreadableSlideError: the file is damaged there.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the file back."""

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def plausible_mpp(along_x: float, along_y: float) -> float | None:
    """The mean of the two, None where they are no microns per pixel of a microscope or differ by more than a twentieth."""
    if not all(_LEAST_MPP <= value <= _LARGEST_MPP for value in (along_x, along_y)):
        return None
    mean = (along_x + along_y) / 2
    return mean if abs(along_x - along_y) <= 0.05 * mean else None
