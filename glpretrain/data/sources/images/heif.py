"""HEIC and HEIF files, as telephones and cameras write them. Pillow reads them with the package pillow-heif, which is an extra, since its
wheels carry libraries under the LGPL and the GPL.

What a file says of its orientation is applied by libheif, 10 and 12 bits become 8, and of several images the primary one is read.
"""

from functools import cache

from glpretrain.data.sources.paths import Paths

HEIF_ENDINGS = (".heic", ".heif", ".hif")
NEEDED = "HEIC and HEIF files need the package pillow-heif: pip install 'glpretrain[heic]'"
_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))


@cache
def register() -> bool:
    """Make Pillow open these files as its format HEIF; whether the package is there."""
    try:
        import pillow_heif
    except ImportError:
        return False
    # Workers are processes with one thread each. Pictures inside a picture (thumbnails, depth) are not used.
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    return True


def begins_as_heif(start: bytes) -> bool:
    """Whether a file with these first 12 bytes is one. An AVIF file may begin so too (`mif1`)."""
    return start[4:8] == b"ftyp" and start[8:12] in _BRANDS


def require_readable(paths: Paths) -> str:
    """What to know about the HEIC files among these where the package is missing: the count and the command, or nothing.

    Raises:
        ValueError: there is nothing else among them.
    """
    if register() or not any(paths.name_holds(way) for ending in HEIF_ENDINGS for way in (ending, ending.upper(), ending.capitalize())):
        return ""
    count = sum(name.lower().endswith(HEIF_ENDINGS) for name in paths.names)
    if count and count == len(paths):
        raise ValueError(f"{paths.root}: all of its {count} images are HEIC files. {NEEDED}")
    return f"{count} of {len(paths)} images cannot be read. {NEEDED}" if count else ""
