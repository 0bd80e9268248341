"""Slides that OpenSlide opens: Aperio, Hamamatsu, Leica, MIRAX, Philips, Ventana, Zeiss, tiled TIFF and others. Needs the extra `slides`.

Left out: associated images (label, macro), and DICOM slides that consist of several files.
"""

from pathlib import Path
from types import ModuleType

import numpy as np

from glpretrain.prepare.slides.slide import Level, Slide, UnreadableSlideError, plausible_mpp, require_plausible_size

_CACHE_BYTES = 64 << 20  # of decoded native tiles, because neighbouring regions share them


def load_openslide() -> ModuleType | None:
    """The package openslide; None where the package or its library is not installed."""
    try:
        import openslide
    except ImportError:
        return None
    return openslide


class OpenSlideSlide(Slide):
    """A slide that OpenSlide reads.

    Args:
        path: path of the file.

    Raises:
        ImportError: OpenSlide is not installed.
        UnreadableSlideError: OpenSlide cannot open the file.
    """

    reader = "openslide"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        openslide = load_openslide()
        if openslide is None:
            raise ImportError(f"{path}: OpenSlide is needed to read this file: pip install 'glpretrain[slides]'")
        self._error = openslide.OpenSlideError
        try:
            self._opened = openslide.OpenSlide(self.path)
        except self._error as error:
            raise UnreadableSlideError(f"{path}: {error}") from error
        self._opened.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
        sizes = zip(self._opened.level_dimensions, self._opened.level_downsamples, strict=True)
        self.levels = [Level(width, height, downsample) for (width, height), downsample in sizes]
        require_plausible_size(self)
        given = [self._opened.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        self.mpp = None if None in given else plausible_mpp(float(given[0]), float(given[1]))

    def read(self, level: int, *, x: int, y: int, width: int, height: int) -> np.ndarray:
        downsample = self.levels[level].downsample
        try:  # OpenSlide expects the corner in pixels of level 0
            region = self._opened.read_region((round(x * downsample), round(y * downsample)), level, (width, height))
        except self._error as error:
            raise UnreadableSlideError(f"{self.path}: {error}") from error
        pixels = np.asarray(region)  # [H W 4]
        colour, alpha = pixels[..., :3], pixels[..., 3:]
        if int(alpha.min()) == 255:
            return np.ascontiguousarray(colour)
        covered = alpha.astype(np.uint16)
        return ((colour * covered + 255 * (255 - covered) + 127) // 255).astype(np.uint8)

    def close(self) -> None:
        self._opened.close()
