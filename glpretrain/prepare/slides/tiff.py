"""TIFF slides that are read by tifffile: pyramids in SubIFDs (OME-TIFF) and strips, which OpenSlide does not read, and any other TIFF
where OpenSlide is not installed.

Only the tiles or strips that a region touches are read. Supported is 8-bit RGB with interleaved samples: uncompressed, deflate, LZMA,
PackBits, and JPEG (decoded by Pillow), and further compressions (LZW, JPEG 2000, WebP) where the package imagecodecs is installed. Left
out: separate planes, other bit depths, palettes.
"""

import io
import logging
import lzma
import math
import re
import struct
import xml.etree.ElementTree
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from glpretrain.prepare.slides.slide import Level, Slide, UnreadableSlideError, plausible_mpp, require_plausible_size

# What tifffile, its decoders (those of imagecodecs raise RuntimeError) and Pillow raise for a damaged file. A tag whose type or number of
# values is damaged gives a tuple where a number is expected, or zero.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    RuntimeError,
    TypeError,
    ArithmeticError,
    struct.error,
    tifffile.TiffFileError,
    zlib.error,
    lzma.LZMAError,
)
_CACHE_BYTES = 64 << 20
_LARGEST_SEGMENT = 128 << 20  # bytes of one decoded tile or strip; a larger one cannot be read in bounded memory
_MICRONS = {2: 25400.0, 3: 10000.0, 4: 1000.0, 5: 1.0}  # per unit of the TIFF tag: inch, centimetre, millimetre, micrometre
_OME_MICRONS = {"nm": 1e-3, "\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "mm": 1e3}
_RGB, _YCBCR, _JPEG, _CONTIGUOUS = 2, 6, 7, 1
_SAME_ASPECT = 0.02  # a smaller version of the slide has its aspect ratio; a photograph of the label has another one


class TiffSlide(Slide):
    """A slide in a TIFF file.

    Args:
        path: path of the file.

    Raises:
        UnreadableSlideError: the file is no TIFF, is damaged, or holds no image of the supported kinds.
    """

    reader = "tifffile"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs does not name the file
        try:
            self._file = tifffile.TiffFile(self.path)
        except _DAMAGE as error:
            raise UnreadableSlideError(f"{path}: {error}") from error
        try:
            self._pages = self._pyramid()
            self.mpp = self._microns_per_pixel()
        except _DAMAGE as error:
            self._file.close()
            raise error if isinstance(error, UnreadableSlideError) else UnreadableSlideError(f"{path}: {error}") from error
        width = self._pages[0].imagewidth
        self.levels = [Level(page.imagewidth, page.imagelength, width / page.imagewidth) for page in self._pages]
        require_plausible_size(self)
        self._segments: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cached_bytes = 0

    def _all_pages(self) -> list[tifffile.TiffPage]:
        """Pages of the file and, in SubIFDs, pages of its pages."""
        pages: dict[int, tifffile.TiffPage] = {}  # by their offset
        for page in (one.aspage() for one in self._file.pages):
            if page.offset in pages:  # tifffile would read them again and again
                raise UnreadableSlideError(f"{self.path}: its last page leads back to page {list(pages).index(page.offset)}")
            pages[page.offset] = page
        return [*pages.values(), *(below.aspage() for page in pages.values() for below in page.pages or ())]

    def _pyramid(self) -> list[tifffile.TiffPage]:
        """Pages that show the whole slide, largest first."""
        pages = self._all_pages()
        base = max(pages, key=lambda page: page.imagewidth * page.imagelength)
        self._check(base)
        kept = {base.imagewidth: base}
        for page in pages:
            ratio = base.imagewidth / page.imagewidth
            same_aspect = abs(base.imagelength / page.imagelength - ratio) <= _SAME_ASPECT * ratio
            if ratio > 1.5 and same_aspect and _is_supported(page) and page.is_tiled == base.is_tiled:
                kept.setdefault(page.imagewidth, page)
        for page in kept.values():
            self._check_segments(page)
        return [kept[width] for width in sorted(kept, reverse=True)]

    def _check(self, page: tifffile.TiffPage) -> None:
        if not _is_supported(page):
            found = (
                f"{page.samplesperpixel} samples of {page.dtype}, photometric {page.photometric}, planar configuration {page.planarconfig}"
            )
            raise UnreadableSlideError(f"{self.path}: {found}; accepted: 8-bit RGB with interleaved samples")
        if (size := math.prod(page.chunks)) > _LARGEST_SEGMENT:
            kind = "tile" if page.is_tiled else "strip"
            raise UnreadableSlideError(f"{self.path}: one {kind} decodes to {size >> 20} MiB; accepted: 128 MiB; store the image in tiles")

    def _check_segments(self, page: tifffile.TiffPage) -> None:
        rows, columns = page.chunks[0], page.chunks[1]
        needed = -(-page.imagelength // rows) * -(-page.imagewidth // columns)
        if (listed := min(len(page.dataoffsets), len(page.databytecounts))) < needed:
            kind = "tiles" if page.is_tiled else "strips"
            raise UnreadableSlideError(
                f"{self.path}: {page.imagewidth} x {page.imagelength} pixels are {needed} {kind}, but {listed} are listed"
            )

    def _microns_per_pixel(self) -> float | None:
        if self._file.is_ome and (mpp := _ome_mpp(self._file.ome_metadata or "")) is not None:
            return mpp
        page = self._pages[0]
        if page.is_svs and (found := re.search(r"MPP\s*=\s*([0-9.]+)", page.description)):
            return plausible_mpp(float(found[1]), float(found[1]))
        unit = _MICRONS.get(int(page.resolutionunit))
        if unit is None or min(page.resolution) <= 0:
            return None
        return plausible_mpp(unit / page.resolution[0], unit / page.resolution[1])

    def read(self, level: int, *, x: int, y: int, width: int, height: int) -> np.ndarray:
        page = self._pages[level]
        rows, columns = page.chunks[0], page.chunks[1]
        per_row = -(-page.imagewidth // columns)
        region = np.full((height, width, 3), 255, dtype=np.uint8)
        for row in range(y // rows, -(-(y + height) // rows)):
            for column in range(x // columns, -(-(x + width) // columns)):
                segment = self._segment(level, row * per_row + column)
                if segment is None:
                    continue
                top, left = row * rows, column * columns
                y0, y1 = max(y, top), min(y + height, top + segment.shape[0])
                x0, x1 = max(x, left), min(x + width, left + segment.shape[1])
                region[y0 - y : y1 - y, x0 - x : x1 - x] = segment[y0 - top : y1 - top, x0 - left : x1 - left]
        return region

    def _segment(self, level: int, index: int) -> np.ndarray | None:
        """One decoded tile or strip, UInt8[H W 3]; None where it is empty in the file."""
        if (found := self._segments.get((level, index))) is not None:
            self._segments.move_to_end((level, index))
            return found
        page = self._pages[level]
        if page.databytecounts[index] == 0:
            return None
        try:
            self._file.filehandle.seek(page.dataoffsets[index])
            data = self._file.filehandle.read(page.databytecounts[index])
            if len(data) < page.databytecounts[index]:
                raise ValueError("the file ends within its data")
            segment = _jpeg(data, page) if page.compression == _JPEG else _decoded(data, page, index)
        except _DAMAGE as error:
            raise UnreadableSlideError(f"{self.path}: {'tile' if page.is_tiled else 'strip'} {index} of level {level}: {error}") from error
        segment = segment[..., :3]
        self._segments[level, index] = segment
        self._cached_bytes += segment.nbytes
        while self._cached_bytes > _CACHE_BYTES and len(self._segments) > 1:
            self._cached_bytes -= self._segments.popitem(last=False)[1].nbytes
        return segment

    def close(self) -> None:
        self._file.close()


def _is_supported(page: tifffile.TiffPage) -> bool:
    colour = page.photometric == _RGB or (page.photometric == _YCBCR and page.compression == _JPEG)
    return colour and page.samplesperpixel in (3, 4) and page.dtype == np.uint8 and page.planarconfig == _CONTIGUOUS


def _decoded(data: bytes, page: tifffile.TiffPage, index: int) -> np.ndarray:
    """UInt8[H W 3+] of a compressed or plain segment."""
    segment, _, _ = page.decode(data, index)
    assert segment is not None  # only for empty data, which was handled before
    return segment[0]


def _jpeg(data: bytes, page: tifffile.TiffPage) -> np.ndarray:
    """UInt8[H W 3] of an abbreviated JPEG stream: the tables are stored once per page, and a TIFF tag gives the colour space."""
    tables = b"" if page.jpegtables is None else page.jpegtables[2:-2]
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x01" if page.photometric == _YCBCR else b"\x00")
    with Image.open(io.BytesIO(data[:2] + adobe + tables + data[2:])) as opened:
        return np.asarray(opened.convert("RGB"))


def _ome_mpp(text: str) -> float | None:
    try:
        root = xml.etree.ElementTree.fromstring(text)
    except xml.etree.ElementTree.ParseError:
        return None
    pixels = root.find(".//{*}Pixels")
    if pixels is None:
        return None
    # The value 0 stands for a size or unit that is missing; it is not plausible.
    sizes = [float(pixels.get(f"PhysicalSize{axis}", 0.0)) for axis in "XY"]
    units = [_OME_MICRONS.get(pixels.get(f"PhysicalSize{axis}Unit", "um"), 0.0) for axis in "XY"]
    return plausible_mpp(sizes[0] * units[0], sizes[1] * units[1])
