"""DICOM files: what their headers say of where a picture belongs, and one picture of a file as numbers and as bytes.

No text of a header leaves this module except in memory. Patients and series are compared, never shown, and a reason is never the text of an
error of the reader, which may quote the header. Left out: how files become items (`dicom`).
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.data.sources.images.arrays import MOST_BYTES
from glpretrain.data.sources.images.decoding import damage_named, stderr_held

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

DICOM_ENDINGS = (".dcm", ".dicom", ".dic", ".ima")
NEEDED = "DICOM files need the package pydicom: pip install 'glpretrain[dicom]'"
WITHOUT_PIXELS, DAMAGED, INDEX = "DICOM files without pixels (such as reports)", "damaged DICOM files", "DICOMDIR"
ONE_BIT = "DICOM files of one bit per pixel (masks)"
_PREAMBLE = 128  # bytes before the letters DICM
_MOST_FRAMES = 100_000
_HEADER = (
    *("SOPClassUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "Rows", "Columns", "BitsAllocated", "PhotometricInterpretation"),
)
_FUNCTIONAL = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
_COLOURS = ("Red", "Green", "Blue")
_PIXELS = (
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "PhotometricInterpretation", "BitsStored", "PixelRepresentation"),
    *("Rows", "Columns", "SamplesPerPixel", "BitsAllocated"),
    *(f"{colour}PaletteColorLookupTable{part}" for colour in _COLOURS for part in ("Descriptor", "Data")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in _COLOURS),
)
# Packages that decode compressed pixels, the first choice first: GDCM decodes what the others cannot, and is the least careful of them.
_DECODERS = ("pydicom", "pylibjpeg", "pyjpegls", "pillow", "gdcm")
_TWELVE_BITS = "1.2.840.10008.1.2.4.51"  # JPEG Extended, of which Pillow reads 8 bits only


class Header(NamedTuple):
    """What tells where the pictures of a file belong. It is kept in memory only."""

    patient: str
    study: str
    series: tuple[object, ...]  # pictures of one series have the same size and orientation
    position: float | None  # mm along the normal of the slice
    number: int  # of the picture in its series
    num_frames: int
    is_grey: bool


class Scale(NamedTuple):
    """Which values become black and white."""

    low: float
    high: float
    is_sigmoid: bool = False

    @classmethod
    def of_window(cls, centre: float, width: float) -> "Scale":
        """Half of the width on either side of the centre."""
        return cls(centre - width / 2, centre + width / 2)

    def bytes_of(self, values: np.ndarray) -> np.ndarray:
        """UInt8 of the same shape."""
        span = self.high - self.low
        if span <= 0:
            return (values > self.low).astype(np.uint8) * 255
        share = (values - self.low) / span
        if self.is_sigmoid:
            share = 1 / (1 + np.exp(np.clip(2 - 4 * share, -50, 50)))
        return np.round(np.clip(share, 0, 1) * 255).astype(np.uint8)


class Grey(NamedTuple):
    """A grey picture in the units of its file, such as Hounsfield units."""

    values: np.ndarray  # Float[H W]
    known: np.ndarray  # Bool[H W], False where the scanner saw nothing
    scale: Scale | None  # that of the file
    is_inverted: bool  # MONOCHROME1: the largest value is black

    def bytes_of(self, scale: Scale) -> np.ndarray:
        """UInt8[H W]; pixels without a value are black."""
        pixels = scale.bytes_of(self.values)
        return np.where(self.known, 255 - pixels if self.is_inverted else pixels, 0).astype(np.uint8)


def begins_as_dicom(path: Path) -> bool:
    """Whether the letters DICM stand where they belong. Raises an OSError where the file cannot be read."""
    with path.open("rb") as opened:
        return opened.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"


def read_header(path: Path) -> Header | str:
    """The header of a file, or in words why its pictures are left out."""
    try:
        with _nothing_quoted(path, "the header cannot be read"):
            found = _dataset(path, tags=_HEADER)
            if "DirectoryRecordSequence" in found or str(found.get("SOPClassUID", "")) == "1.2.840.10008.1.3.10":
                return INDEX
            if "Rows" not in found and "PhotometricInterpretation" not in found:
                return WITHOUT_PIXELS if "SOPClassUID" in found else DAMAGED
            if found.BitsAllocated == 1:
                return ONE_BIT
            num_frames = int(found.get("NumberOfFrames") or 1)
            if not 1 <= num_frames <= min(_MOST_FRAMES, path.stat().st_size) or int(found.Rows) < 1 or int(found.Columns) < 1:
                return DAMAGED
            orientation, position = _numbers(found.get("ImageOrientationPatient"), 6), _numbers(found.get("ImagePositionPatient"), 3)
            along = None
            if orientation is not None and position is not None:
                along = float(np.cross(orientation[:3], orientation[3:]) @ position)
            size, turn = (int(found.Rows), int(found.Columns)), None if orientation is None else tuple(np.round(orientation, 2).tolist())
            series = (str(found.get("SeriesInstanceUID", "")), size, turn)
            patient, study = str(found.get("PatientID") or ""), str(found.get("StudyInstanceUID") or "")
            is_grey = str(found.PhotometricInterpretation).startswith("MONOCHROME")
            return Header(patient, study, series, along, int(found.get("InstanceNumber") or 0), num_frames, is_grey)
    except UnreadableItemError:
        return DAMAGED


def read_picture(path: Path, *, frame: int, window: Scale | None) -> Grey | np.ndarray:
    """One picture of a file: grey, or UInt8[H W 3] where it has colours.

    Args:
        path: path of the file.
        frame: number of the picture in the file.
        window: scale that replaces what the file says; where it is given, tables of the file for display are not applied.

    Raises:
        UnreadableItemError: it cannot be decoded.
    """
    with _nothing_quoted(path, "its pixels cannot be decoded"):
        array, found = _decoded(path, frame)
        if str(found.PhotometricInterpretation) == "PALETTE COLOR":
            from pydicom.pixels.processing import apply_color_lut

            colours = apply_color_lut(array, found)
            return colours if colours.dtype == np.uint8 else (colours >> 8).astype(np.uint8)
        if array.ndim == 3:
            bits = int(found.BitsStored)
            return array[..., :3].astype(np.uint8) if bits <= 8 else (array[..., :3] >> (bits - 8)).astype(np.uint8)
        return _grey(array, found, frame, window)


def _grey(array: np.ndarray, found: "Dataset", frame: int, window: Scale | None) -> Grey:
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    known = np.isfinite(array)
    if (padding := found.get("PixelPaddingValue")) is not None:
        limit = found.get("PixelPaddingRangeLimit", padding)
        known &= ~((array >= min(padding, limit)) & (array <= max(padding, limit)))
    display = _functional(found, frame, "FrameVOILUTSequence")
    if "ModalityLUTSequence" in found:
        values = np.asarray(apply_modality_lut(array, found), dtype=np.float32)
    else:
        rescale = _functional(found, frame, "PixelValueTransformationSequence")
        slope, intercept = float(rescale.get("RescaleSlope", 1)), float(rescale.get("RescaleIntercept", 0))
        values = array.astype(np.float64 if array.itemsize > 2 else np.float32) * slope + intercept
    bits, scale = int(found.get("BitsStored", 32)), window
    if scale is None and display.get("VOILUTSequence"):
        table = display.VOILUTSequence[0].LUTDescriptor
        values = np.asarray(apply_voi(values.astype(np.int64), display, index=0), dtype=np.float32)
        scale = Scale(0.0, 2.0 ** int(table[2]) - 1)
    elif scale is None and display.get("WindowWidth") is not None:
        scale = _window_of(display)
    elif scale is None and bits <= 8 and array.dtype.kind == "u":
        scale = Scale(0.0, 2.0**bits - 1)
    if not known.any():
        raise ValueError("no pixel has a value")
    return Grey(values, known, scale, str(found.PhotometricInterpretation) == "MONOCHROME1")


def _window_of(found: "Dataset") -> Scale | None:
    """The first window of a file, by part 3 of the standard, C.11.2.1.2; None where it has none that can be used."""
    centre, width = (np.atleast_1d(np.asarray(found.get(name), dtype=float)) for name in ("WindowCenter", "WindowWidth"))
    if not (centre.size and width.size and math.isfinite(centre[0]) and width[0] > 0):
        return None
    function = str(found.get("VOILUTFunction") or "LINEAR")
    if function == "LINEAR":  # values are whole numbers, and half of one is added on either side
        return Scale(centre[0] - 0.5 - (width[0] - 1) / 2, centre[0] - 0.5 + (width[0] - 1) / 2)
    return Scale(*Scale.of_window(centre[0], width[0])[:2], is_sigmoid=function == "SIGMOID")


def _functional(found: "Dataset", frame: int, name: str) -> "Dataset":
    """Where the settings of a frame are: in newer files in a sequence of the frame, or of all frames, otherwise beside the pixels."""
    own, shared = (found.get(sequence) for sequence in _FUNCTIONAL)
    for groups in (own[frame] if own and frame < len(own) else None, shared[0] if shared else None):
        if groups is not None and groups.get(name):
            return groups[name][0]
    return found


def _numbers(given: object, count: int) -> np.ndarray | None:
    if not isinstance(given, Sequence):
        return None
    numbers = np.array([float(number) for number in given])
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


def _dataset(path: Path, *, tags: tuple[str, ...]) -> "Dataset":
    """These elements before the pixels. A file that lacks the letters DICM is read too: its name says that it is one."""
    from pydicom import dcmread

    return dcmread(path, stop_before_pixels=True, force=True, specific_tags=[*tags, "DirectoryRecordSequence"])


def _decoded(path: Path, frame: int) -> tuple[np.ndarray, "Dataset"]:
    """The stored values of a frame, with colours as RGB, and the elements that say what they mean."""
    from pydicom import dcmread
    from pydicom.dataset import FileMetaDataset
    from pydicom.pixels.utils import pixel_array
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    found = _dataset(path, tags=(*_PIXELS, *_FUNCTIONAL))
    size = int(found.Rows) * int(found.Columns) * int(found.get("SamplesPerPixel", 1)) * -(-int(found.BitsAllocated) // 8)
    if size > MOST_BYTES:
        raise UnreadableItemError(f"{path}: a picture of {size} bytes; accepted: up to {MOST_BYTES} bytes")
    if begins_as_dicom(path):
        return pixel_array(path, index=frame, decoding_plugin=_plugin_for(path, found)), found
    whole = dcmread(path, force=True)
    whole.file_meta = FileMetaDataset()
    whole.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if whole.original_encoding[0] else ExplicitVRLittleEndian
    return pixel_array(whole, index=frame), found


def _plugin_for(path: Path, found: "Dataset") -> str:
    """Name of the package that decodes the pixels; empty where they are not compressed.

    Raises:
        UnreadableItemError: none of those that are installed can.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    syntax = UID(str(found.file_meta.get("TransferSyntaxUID", "")))
    if not syntax.is_transfer_syntax:
        raise UnreadableItemError(f"{path}: its pixels are stored in no way that the standard knows")
    if not syntax.is_compressed or syntax.is_deflated:
        return ""
    try:
        available = get_decoder(syntax).available_plugins
    except NotImplementedError:
        raise UnreadableItemError(f"{path}: compressed as {syntax.name}, which pydicom does not decode") from None
    order = sorted(_DECODERS, key=lambda name: name != "gdcm") if syntax == _TWELVE_BITS else _DECODERS
    chosen = next((name for name in order if name in available), None)
    if chosen is None:
        needed = "a package that is not installed: pip install 'glpretrain[dicom]'"
        raise UnreadableItemError(f"{path}: compressed as {syntax.name}, which needs {needed}")
    return chosen


@contextmanager
def _nothing_quoted(path: Path, what: str) -> Iterator[None]:
    """Turn the errors of the reader into one error that names the file, and quotes neither the header nor the reader.

    Raises:
        UnreadableItemError: the file is missing, is no regular file, or is damaged.
    """
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote values
    try:
        with damage_named(path), stderr_held():  # GDCM writes there by itself
            yield
    except UnreadableItemError as error:
        if (cause := error.__cause__) is None:
            raise
        raise UnreadableItemError(f"{path}: {what} ({type(cause).__name__})") from None


def is_installed() -> bool:
    """Whether the package pydicom is there."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        return False
    return True
