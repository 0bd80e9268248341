"""Damaged slides of every kind that is read: each is read or refused by name, soon, and in little memory."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from fuzzing import counted, damaged, time_limit

from glpretrain.prepare.slides import Settings, open_slide
from glpretrain.prepare.slides.plan import plan_tiles
from glpretrain.prepare.slides.slide import UnreadableSlideError
from glpretrain.prepare.slides.synthetic import write_synthetic_slide

SETTINGS = Settings(size=32, mpp=0.5, min_tissue=0.0)


def _picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([(x * 7 + y) % 251, (y * 5 + x * 3) % 241, (x * y) % 239], axis=-1).astype(np.uint8)


def _tiled(path: Path) -> None:
    write_synthetic_slide(path, width=160, height=128, mpp=0.5, seed=3, lesion=0.2, levels=(1, 4))


def _sub_directories(path: Path) -> None:
    full = _picture(96, 128)
    with tifffile.TiffWriter(path, ome=True) as writer:
        metadata = {"axes": "YXS", "PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "um"}
        writer.write(full, subifds=1, tile=(32, 32), photometric="rgb", compression="zlib", metadata=metadata)
        writer.write(full[::4, ::4], tile=(32, 32), photometric="rgb", compression="zlib", subfiletype=1)


def _strips(path: Path) -> None:
    density = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, _picture(90, 71), rowsperstrip=16, photometric="rgb", compression="lzma", **density)


def _aperio(path: Path) -> None:
    said = "Aperio Image Library v11.2.1\r\n128x96 (64x64)|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(path, _picture(96, 128), tile=(64, 64), photometric="rgb", compression="zlib", description=said, metadata=None)


KINDS: dict[str, Callable[[Path], None]] = {"a.tif": _tiled, "a.ome.tif": _sub_directories, "strips.tif": _strips, "a.svs": _aperio}


def _look(path: Path) -> None:
    """Read what cutting reads: the overview of the whole slide, and the first tiles."""
    with open_slide(path) as slide:
        plan, _ = plan_tiles(slide, SETTINGS)
        for x, y in plan.corners[:4].astype(int).tolist():
            slide.read(plan.level, x=x, y=y, width=32, height=32)


def _fuzz(kind: str, folder: Path, *, count: int) -> Counter[str]:
    path, draw = folder / kind, random.Random(f"slides {kind}")
    KINDS[kind](path)
    _look(path)
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        pages = [page.aspage() for page in file.pages]
        heads = [0, *(page.offset for page in pages), *(page.offset + 96 for page in pages), *(page.dataoffsets[0] for page in pages)]
    with counted(f"slides {kind}", megabytes=400) as outcomes:
        for number in range(count):
            path.write_bytes(damaged(whole, draw, heads=heads))
            with time_limit(f"file {number} of {kind}"):
                try:
                    _look(path)
                    outcomes["read"] += 1
                except (UnreadableSlideError, ValueError) as error:
                    assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1500, f"file {number}: {error!r}"
                    outcomes["refused"] += 1
    return outcomes


def test_pages_that_lead_back_to_one_another_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, _picture(64, 64), rowsperstrip=16, photometric="rgb")
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        place = page.offset + 2 + 12 * len(page.tags)  # of the offset of the next page
    content = bytearray(path.read_bytes())
    content[place : place + 4] = page.offset.to_bytes(4, "little")
    path.write_bytes(content)
    with time_limit("a loop"), pytest.raises(UnreadableSlideError, match=r"a\.tif: its last page leads back to page 0"):
        open_slide(path)


def test_a_header_that_claims_a_huge_slide_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    _aperio(path)
    with tifffile.TiffFile(path, mode="r+") as file:
        for tag in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[tag].overwrite(60_000)
    with pytest.raises(UnreadableSlideError, match=r"a\.svs: 60000 x 60000 pixels in a file of \d+ bytes: it is damaged or cut short"):
        open_slide(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_damaged_slides_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    outcomes = _fuzz(kind, tmp_path, count=20)
    assert outcomes["refused"] > 0 and outcomes.total() == 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_slides_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    assert _fuzz(kind, tmp_path, count=2500).total() == 2500
