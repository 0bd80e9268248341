"""From paths to slides: which files in a folder are slides, the name of each slide, and which reader opens it.

Left out: reading (`slide`).
"""

from collections.abc import Sequence
from pathlib import Path

from glpretrain.core.listing import count_kinds, expanded, files_below, say_once
from glpretrain.prepare.slides.slide import Slide, UnreadableSlideError
from glpretrain.prepare.slides.tiff import TiffSlide
from glpretrain.prepare.slides.vendor import OpenSlideSlide, load_openslide

_TIFF_ENDINGS = (".tif", ".tiff", ".btf", ".tf8")
_VENDOR_ENDINGS = (".svs", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm")
ENDINGS = (*_VENDOR_ENDINGS, *_TIFF_ENDINGS)
_OME_ENDINGS = (".ome.tif", ".ome.tiff", ".ome.btf")


def open_slide(path: str | Path) -> Slide:
    """Open a slide with OpenSlide if it knows the format, and any other TIFF with tifffile.

    Raises:
        ImportError: the file is no plain TIFF, and OpenSlide is not installed.
        UnreadableSlideError: neither of them reads the file.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.is_file():
        raise UnreadableSlideError(f"{path}: no such file")
    if name.endswith(_OME_ENDINGS):  # OpenSlide reads only the full resolution of such files
        return TiffSlide(path)
    check_readers([path])
    openslide = load_openslide()
    if openslide is not None and openslide.OpenSlide.detect_format(path) is not None:
        return OpenSlideSlide(path)
    if name.endswith(_TIFF_ENDINGS):
        return TiffSlide(path)
    raise UnreadableSlideError(
        f"{path}: OpenSlide does not know its format: it is damaged or no slide; accepted endings: {' '.join(ENDINGS)}"
    )


def check_readers(paths: Sequence[Path]) -> None:
    """Fail before any work is done where a package for one of the files is missing.

    Raises:
        ImportError: a file is no plain TIFF, and OpenSlide is not installed.
    """
    for path in paths:
        if not path.name.lower().endswith(_TIFF_ENDINGS) and load_openslide() is None:
            raise ImportError(f"{path}: OpenSlide is needed to read this file: pip install 'glpretrain[slides]'")


def find_slides(given: Sequence[str | Path]) -> dict[str, Path]:
    """Slides by name, in the order of their names.

    The name of a file that is given is its file name without the ending. The name of a file that is found in a given folder is its path
    relative to this folder without the ending: `slides/tumour/a.svs` in the folder `slides` is `tumour/a`.

    Args:
        given: files, and folders that are searched for files with the endings of slides.

    Raises:
        ValueError: a path does not exist, a folder holds no slide, or two slides have the same name.
    """
    found: dict[str, Path] = {}
    for path in (expanded(one) for one in given):
        if not path.exists():
            raise ValueError(f"slides: {path} does not exist; give files and folders")
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
    files, passed_over = files_below(root)
    if passed_over:
        say_once(f"slides: left out below {root}: {count_kinds(kind for _, kind in passed_over)} (such as {passed_over[0][0]})")
    return sorted(path for path in files if path.name.lower().endswith(ENDINGS))


def _without_ending(name: str) -> str:
    ending = next((ending for ending in (*_OME_ENDINGS, *ENDINGS) if name.lower().endswith(ending)), Path(name).suffix)
    return name[: len(name) - len(ending)] if ending else name
