"""Image files: which files of a folder are images, and how one becomes a tensor.

Nothing is resized here, except that a large JPEG is decoded at a reduced scale where the caller allows it. The memory of a decoded image
is in the order of its file, H W C, in which torch resizes images fastest; its tensor has the axes C H W.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from glpretrain.core.listing import LEFTOVERS, Run, State, Walk, count_kinds, expanded, has_plain_ending, say_once
from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.data.sources.images.arrays import GDAL_NODATA, TIFF_ENDINGS, from_array, load_array, read_tiff
from glpretrain.data.sources.images.heif import HEIF_ENDINGS, NEEDED, begins_as_heif, register, require_readable
from glpretrain.data.sources.paths import Paths
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of

ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".pcx", ".qoi"),
    *(".sgi", ".psd", ".dds", ".ico", ".npy", *HEIF_ENDINGS),
)
_ENDINGS = frozenset(ENDINGS)
# The formats of these files. A fixed list, since Pillow would start Ghostscript for a PostScript file, whatever its name.
_FORMATS = (
    # AVIF is asked before HEIF: pillow-heif would take an AVIF file that begins with `mif1` and fail later.
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "PCX", "QOI", "SGI", "PSD", "DDS"),
    "ICO",
    "TGA",  # last, since its files begin in no particular way
)
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
_ORIENTATION = 0x0112  # number of the tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGEST_FLOAT = 1e38  # files mark missing values by the largest float that there is
_VOID = 255
IMAGE_RULES = " ".join((*ENDINGS, *sorted(LEFTOVERS)))  # what a listing of images depends on
LEAST_SAVED = 100_000  # images, which are found in a second
MOST_SIDE = 2048  # pixels on each side of a JPEG that are enough to score on
_LONGEST_REASON = 300  # bytes
_START = 16  # bytes by which a file is known


@contextmanager
def damage_named(what: object) -> Iterator[None]:
    """Turn the errors of readers of image files into one error that names the file. A reader may raise anything for a damaged file.
    Warnings of readers are dropped: they do not name the file, and what matters is whether it can be decoded.

    Args:
        what: path of the file, or whatever else names it.

    Raises:
        UnreadableItemError: the file is missing, is no regular file, or is damaged.
    """
    try:
        if isinstance(what, Path) and not what.is_file():
            reason = "is no regular file (a folder, pipe, socket or device)" if what.exists() else "there is no such file"
            raise UnreadableItemError(f"{what}: {reason}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnreadableItemError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableItemError(f"{what}: no image file that Pillow can read") from error
    except Exception as error:
        name = "" if isinstance(error, OSError | ValueError) and str(error) else f"{type(error).__name__}: "
        raise UnreadableItemError(f"{what}: {name}{' '.join(str(error).split())}") from error


def decode(path: Path, *, channels: int, side: int | None = None, levels: np.ndarray | None = None) -> Tensor:
    """One image file as UInt8[C H W].

    PIL decodes images of 1 or 3 channels. The orientation of the EXIF tag is applied, and 16 bits are scaled to 8 over their whole range.
    Any other number of channels is read from `.npy` (H W C) or, by tifffile, from TIFF.

    Args:
        path: path of the file.
        channels: number of channels.
        side: pixels on each side that are enough: a JPEG with twice as many or more is decoded at a half, a quarter or an eighth of its
            size. When left out, every image has its own size.
        levels: Float32[2 C], the values that become 0 and 255 (`arrays.levels_of`), for `.npy`, TIFF, and grey files of more than 8 bits.

    Raises:
        UnreadableItemError: the file is damaged, is no image, or has another number of channels, or `levels` cannot be used for it.
    """
    with damage_named(path):
        if path.suffix.lower() == ".npy":
            return from_array(load_array(path), path, channels=channels, levels=levels)
        if channels not in (1, 3) or (levels is not None and path.suffix.lower() in TIFF_ENDINGS):
            array, nodata = read_tiff(path, channels=channels)
            return from_array(array, path, channels=channels, levels=levels, nodata=nodata)
        if levels is not None:
            with opened_image(path) as image:
                if not image.mode.startswith(("I", "F")):
                    raise ValueError(f"8 bits ({image.mode}); a value_range is for .npy, TIFF, and grey files of more than 8 bits")
                return from_array(np.array(image), path, channels=channels, levels=levels)
        return decode_pil(path, channels=channels, side=side)


def decode_pil(file: Path | str | BinaryIO, *, channels: int, side: int | None = None) -> Tensor:
    """UInt8[C H W] of a file that PIL opens, with 1 or 3 channels. Raises whatever PIL raises; see `damage_named`."""
    with opened_image(file, side=side) as image:
        return pixels_of(image, channels=channels)


def pixels_of(image: Image.Image, *, channels: int) -> Tensor:
    """UInt8[C H W] of an image of PIL in any mode, turned as its EXIF tag says.

    Raises:
        ValueError: no pixel has a value.
    """
    nodata = image.tag_v2.get(GDAL_NODATA) if isinstance(image, TiffImageFile) else None
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))  # ImageOps.exif_transpose would write the other tags anew
    turned = image if turn is None else image.transpose(turn)
    if turned.mode.startswith(("I", "F")):
        turned = _to_bytes(turned, nodata=nodata)
    mode = "L" if channels == 1 else "RGB"
    array = np.asarray(turned if turned.mode == mode else turned.convert(mode)).reshape(turned.height, turned.width, channels)
    return torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)  # [C H W]


@contextmanager
def opened_image(file: Path | str | BinaryIO, *, side: int | None = None) -> Iterator[Image.Image]:
    """A decoded file of one of the formats above.

    What libtiff writes to stderr is the reason that Pillow's error lacks.

    Args:
        file: path of the file, or its bytes.
        side: pixels on each side that are enough of a JPEG, as for `decode`.
    """
    with _opened(file) as image:
        if side is not None:
            image.draft(None, (side, side))  # changes nothing for files other than JPEG
        if isinstance(image, TiffImageFile):
            with stderr_held() as said:
                try:
                    image.load()
                except Exception as error:
                    if not (reason := os.pread(said, _LONGEST_REASON, 0).decode("ascii", "replace").strip()):
                        raise
                    raise ValueError(reason.splitlines()[0].removeprefix("tempfile.tif: ")) from error  # Pillow's name for every file
        else:
            image.load()
        yield image


@contextmanager
def stderr_held() -> Iterator[int]:
    """Keep what a library writes to the descriptor of stderr, past Python; gives the descriptor of a file that has it."""
    said, stderr = os.memfd_create("stderr"), os.dup(2)
    os.dup2(said, 2)
    try:
        yield said
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(said)


def _opened(file: Path | str | BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError as error:
        if isinstance(file, Path | str):
            start = _start_of(Path(file))
        else:
            file.seek(0)
            start = file.read(_START)
        if begins_as_heif(start) and not register():
            raise ValueError(NEEDED) from error
        raise


@cache
def _formats() -> tuple[str, ...]:
    """Those that this version of Pillow has."""
    Image.init()
    with_heif = register()
    return tuple(name for name in _FORMATS if name in Image.OPEN and (name != "HEIF" or with_heif))


def _to_bytes(image: Image.Image, *, nodata: object) -> Image.Image:
    """8-bit grey of wide integers or floats. Missing values (NaN, infinite, or `nodata`) become 0."""
    wide = np.array(image, dtype=np.float32)
    known = np.abs(wide) < _LARGEST_FLOAT  # not true of NaN
    if isinstance(nodata, str):
        known &= wide != np.float32(nodata.strip("\0 "))
    if not known.any():
        raise ValueError("no pixel has a value")
    wide[~known] = 0.0
    # 16-bit files use their whole range; the values of a float file are taken as [0, 1] unless one is larger.
    top = max(65535.0 if image.mode.startswith("I") else 1.0, float(wide.max()))
    return Image.fromarray(np.clip(wide * (255.0 / top), 0, 255).astype(np.uint8))


def decode_mask(path: Path, *, size: Sequence[int]) -> Tensor:
    """Values of a palette or grey file as Int[H W].

    Raises:
        UnreadableItemError: the file is damaged, holds no label per pixel, or its height and width are not `size`.
    """
    with damage_named(path), opened_image(path) as opened:
        if opened.format in ("JPEG", "HEIF"):
            raise ValueError(f"a {opened.format} file does not keep labels exactly; give a PNG file")
        values = np.array(opened)
    if values.ndim == 3:
        colours = values[..., : 1 if values.shape[-1] == 2 else 3]  # without the opacity
        if not (colours == colours[..., :1]).all():
            raise UnreadableItemError(f"{path}: holds colours; a mask has one number per pixel, in a palette or grey file")
        values = colours[..., 0]
    if values.dtype.kind == "f" and not (np.mod(values, 1) == 0).all():
        raise UnreadableItemError(f"{path}: holds fractions or missing values; a mask has one whole number per pixel")
    if values.shape != tuple(size):
        raise UnreadableItemError(f"{path}: shape {tuple(values.shape)}, but the image has {tuple(size)}; a mask has the size of its image")
    return torch.from_numpy(values.astype(np.int64))


def void_of(values: Tensor, *, first: int) -> int | None:
    """The value that marks neither background nor object: 255 where there are other labels (as in Pascal VOC), and none in a mask of 0
    and 255.

    Args:
        values: Int[...], values of a mask, or of all masks of a video.
        first: the lowest value that is a label.
    """
    others = (values >= first) & (values < _VOID)
    return _VOID if bool((values == _VOID).any()) and bool(others.any()) else None


def find_images(root: Path) -> Paths:
    """Image files below `root` in the order of their names. Hidden files and folders are left out; what else is left out is logged.

    Raises:
        ValueError: all of them need a package that is missing.
    """
    paths, note, _ = listing_of(root, walk=images_below, rules=IMAGE_RULES, least=LEAST_SAVED)
    for said in (note, require_readable(paths)):
        if said:
            say_once(f"{root}: {said}")
    return paths


def images_below(root: Path) -> Walked:
    """What `find_images` finds, by a walk through the folder."""
    walk, others = Walk(root), list[Path]()
    paths = Paths(root, _images_of(walk, others))
    note = ""
    if others or walk.passed_over:
        kinds = [path.suffix.lower() if has_plain_ending(path) else "without a known ending" for path in others]
        left_out = count_kinds([*kinds, *(kind for _, kind in walk.passed_over)])
        example = [*others, *(path for path, _ in walk.passed_over)][0].relative_to(root)
        note = f"{len(paths)} images; left out: {left_out} (such as {example})"
    return Walked(Listing(paths, note, {}), walk.states, walk.real, walk.is_certain)


def _images_of(walk: Walk, others: list[Path]) -> Iterator[Run]:
    """The images of a walk; files that are none are added to `others`."""
    for folder, names in walk:
        odd = {ending for ending in {name[name.rfind(".") :] for name in names} if ending.lower() not in _ENDINGS}
        left_out: set[str] = set()
        for path in [Path(walk.root, folder, name) for name in names if name[name.rfind(".") :] in odd] if odd else ():
            if not has_plain_ending(path):
                state = State.of(path)
                try:
                    if _begins_as_image(path):
                        continue
                except OSError:
                    walk.is_certain = False
                walk.remember(path, state)
            left_out.add(path.name)
            others.append(path)
        if kept := [name for name in names if name not in left_out] if left_out else names:
            yield Run(folder, kept)


def _begins_as_image(path: Path) -> bool:
    start = _start_of(path)
    known = start.startswith(_BEGINNINGS) or start[4:12] == b"ftypavif" or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
    return known or begins_as_heif(start)


def _start_of(path: Path) -> bytes:
    with path.open("rb") as opened:
        return opened.read(_START)


def existing_folder(root: str | Path, what: str) -> Path:
    """The folder at `root`, with `~` expanded.

    Args:
        root: path of the folder.
        what: class or argument, for the message.

    Raises:
        ValueError: there is no such folder.
    """
    folder = expanded(root)
    if not folder.is_dir():
        raise ValueError(f"{what}: {folder} is not a folder")
    return folder
