"""From paths to slides: which files of a folder are slides, what each is called, and which reader opens it.

Left out: reading (`slide`).
"""

import os
from collections.abc import Sequence
from pathlib import Path

from glpretrain.prepare.slides.slide import Slide, UnreadableSlideError
from glpretrain.prepare.slides.tiff import TiffSlide
from glpretrain.prepare.slides.vendor import OpenSlideSlide, load_openslide

_TIFF_ENDINGS = (".tif", ".tiff", ".btf", ".tf8")
_VENDOR_ENDINGS = (".svs", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm")
ENDINGS = (*_VENDOR_ENDINGS, *_TIFF_ENDINGS)
_OME_ENDINGS = (".ome.tif", ".ome.tiff", ".ome.btf")


def open_slide(path: str | Path) -> Slide:
    """Open a slide: by OpenSlide where it knows the format, TIFF that it does not know by tifffile.

    Raises:
        ImportError: it is no plain TIFF and OpenSlide is not installed.
        UnreadableSlideError: neither reads it.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.is_file():
        raise UnreadableSlideError(f"{path}: no such file")
    if name.endswith(_OME_ENDINGS):  # OpenSlide opens them too, but only their full resolution
        return TiffSlide(path)
    check_readers([path])
    openslide = load_openslide()
    if openslide is not None and openslide.OpenSlide.detect_format(path) is not None:
        return OpenSlideSlide(path)
    if name.endswith(_TIFF_ENDINGS):
        return TiffSlide(path)
    raise UnreadableSlideError(f"{path}: OpenSlide does not know its format: damaged, or no slide; accepted endings: {' '.join(ENDINGS)}")


def check_readers(paths: Sequence[Path]) -> None:
    """Refuse now what could not be opened later.

    Raises:
        ImportError: one is no plain TIFF and OpenSlide is not installed.
    """
    for path in paths:
        if not path.name.lower().endswith(_TIFF_ENDINGS) and load_openslide() is None:
            raise ImportError(f"{path}: reading it needs OpenSlide: pip install 'glpretrain[slides]'")


def find_slides(given: Sequence[str | Path]) -> dict[str, Path]:
    """Slides by name, in the order of their names.

    A file is called as it is without its ending; one that was found in a folder by its path below that folder, so that
    `slides/tumour/a.svs` of the folder `slides` is `tumour/a`.

    Args:
        given: files, and folders that are searched for the endings of slides.

    Raises:
        ValueError: nothing is there, a folder holds no slide, or two slides have one name.
    """
    found: dict[str, Path] = {}
    for path in (Path(one).expanduser() for one in given):
        if not path.exists():
            raise ValueError(f"slides: {path} is no file and no folder")
        files = [(path, path.name)] if not path.is_dir() else [(file, file.relative_to(path).as_posix()) for file in _slides_below(path)]
        if not files:
            raise ValueError(f"slides: no slide in {path}; accepted endings: {' '.join(ENDINGS)}")
        for file, name in files:
            name = _without_ending(name)
            if name in found and found[name].resolve() != file.resolve():
                raise ValueError(f"slides: {found[name]} and {file} are both called {name!r}; give a folder above both, or rename one")
            found[name] = file
    return dict(sorted(found.items()))


def _slides_below(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.lower().endswith(ENDINGS) and not name.startswith(".")]
    return sorted(found)


def _without_ending(name: str) -> str:
    ending = next((ending for ending in (*_OME_ENDINGS, *ENDINGS) if name.lower().endswith(ending)), Path(name).suffix)
    return name[: len(name) - len(ending)] if ending else name
