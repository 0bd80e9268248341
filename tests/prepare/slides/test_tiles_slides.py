"""Readers of slides: both agree on every pixel, levels and microns are those of the file, and an unreadable file is named."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from glpretrain.prepare.slides import find_slides, open_slide
from glpretrain.prepare.slides.slide import UnreadableSlideError
from glpretrain.prepare.slides.synthetic import write_synthetic_slide
from glpretrain.prepare.slides.tiff import TiffSlide
from glpretrain.prepare.slides.vendor import OpenSlideSlide

SVS = Path(__file__).parents[4] / "shared" / "data" / "pathology_wsi_cmu1small" / "CMU-1-Small-Region.svs"


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([(x * 7 + y) % 251, (y * 5 + x * 3) % 241, (x * y) % 239], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "a.tif"
    write_synthetic_slide(path, width=1100, height=700, mpp=0.25, seed=3, lesion=0.2, levels=(1, 4))
    return path


@pytest.mark.parametrize("call", ["", "glpretrain.cli.main(['tiles', '/no/slides', '--out', 'out'])"])
def test_cutting_slides_needs_no_torch(call: str) -> None:
    command = f"import sys, glpretrain.cli, glpretrain.prepare.slides; {call or 0}; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    assert subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True).stdout == "False\n"


def test_both_readers_see_the_same(slide: Path) -> None:
    with OpenSlideSlide(slide) as first, TiffSlide(slide) as second:
        assert first.reader != second.reader
        assert [level[:2] for level in first.levels] == [level[:2] for level in second.levels] == [(1100, 700), (275, 175)]
        assert first.mpp == pytest.approx(0.25, rel=1e-4) and second.mpp == pytest.approx(0.25, rel=1e-4)
        for level, x, y, width, height in ((0, 0, 0, 1100, 700), (0, 250, 250, 17, 300), (0, 1099, 699, 1, 1), (1, 200, 100, 75, 75)):
            regions = [one.read(level, x=x, y=y, width=width, height=height) for one in (first, second)]
            assert regions[0].shape == (height, width, 3) and regions[0].dtype == np.uint8
            np.testing.assert_array_equal(*regions)
        assert len(np.unique(first.read(0, x=300, y=300, width=64, height=64))) > 20


@pytest.mark.skipif(not SVS.is_file(), reason=f"no slide {SVS}")
def test_both_readers_agree_on_a_scanned_slide() -> None:
    with OpenSlideSlide(SVS) as first, TiffSlide(SVS) as second:
        assert [level[:2] for level in first.levels] == [level[:2] for level in second.levels] == [(2220, 2967)]
        assert first.mpp == second.mpp == 0.499
        regions = [one.read(0, x=1000, y=1200, width=700, height=500).astype(int) for one in (first, second)]
        assert np.abs(regions[0] - regions[1]).max() <= 2  # two JPEG decoders
        assert regions[0].std() > 20


def test_pyramids_in_sub_directories_are_found(tmp_path: Path) -> None:
    path, full = tmp_path / "a.ome.tif", picture(600, 900)
    with tifffile.TiffWriter(path, ome=True) as writer:
        metadata = {"axes": "YXS", "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "um"}
        writer.write(full, subifds=1, tile=(128, 128), photometric="rgb", compression="zlib", metadata=metadata)
        writer.write(full[::4, ::4], tile=(128, 128), photometric="rgb", compression="zlib", subfiletype=1)
    with open_slide(path) as opened:
        assert opened.reader == "tifffile" and opened.mpp == pytest.approx(0.25)
        assert [level[:2] for level in opened.levels] == [(900, 600), (225, 150)]
        assert [level.downsample for level in opened.levels] == [1.0, 4.0]
        np.testing.assert_array_equal(opened.read(0, x=101, y=99, width=333, height=222), full[99:321, 101:434])
        np.testing.assert_array_equal(opened.read(1, x=5, y=7, width=150, height=140), full[::4, ::4][7:147, 5:155])


@pytest.mark.parametrize("compression", [None, "zlib", "lzma", "packbits"])
def test_strips_are_read(tmp_path: Path, compression: str | None) -> None:
    path, full = tmp_path / "a.tif", picture(300, 211)
    if compression == "packbits":
        pytest.importorskip("imagecodecs", reason="tifffile writes packbits through imagecodecs only")
    tifffile.imwrite(path, full, rowsperstrip=64, photometric="rgb", compression=compression, resolution=(72, 72), resolutionunit="INCH")
    with open_slide(path) as opened:
        assert opened.reader == "tifffile"  # OpenSlide takes tiles only
        assert opened.mpp is None  # 72 dpi is a printer's resolution
        np.testing.assert_array_equal(opened.read(0, x=50, y=60, width=161, height=240), full[60:300, 50:211])


def test_what_is_no_slide_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(UnreadableSlideError) as caught:
            open_slide(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "a.svs").write_bytes(b"no slide at all" * 100)
    assert "OpenSlide does not know its format" in refusal("a.svs")
    (tmp_path / "b.tif").write_bytes(b"II*\0" + b"\xff" * 100)
    refusal("b.tif")
    assert "no such file" in refusal("c.tif")
    tifffile.imwrite(tmp_path / "d.tif", picture(64, 64).astype(np.uint16), photometric="rgb", rowsperstrip=8)
    assert "uint16" in refusal("d.tif") and "accepted: 8-bit RGB" in refusal("d.tif")
    tifffile.imwrite(tmp_path / "e.tif", picture(64, 64)[..., 0], photometric="minisblack", rowsperstrip=8)
    assert "1 samples of uint8, photometric 1" in refusal("e.tif")
    tifffile.imwrite(tmp_path / "f.tif", picture(64, 64), photometric="rgb", rowsperstrip=64)
    monkeypatch.setattr("glpretrain.prepare.slides.tiff._LARGEST_SEGMENT", 1 << 10)
    assert "one strip decodes to" in refusal("f.tif")


def test_a_damaged_tile_is_named(slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    content = bytearray(slide.read_bytes())
    with tifffile.TiffFile(slide) as opened:
        start = opened.pages[0].dataoffsets[7]
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    for reader in (OpenSlideSlide, TiffSlide):
        with reader(path) as opened:
            opened.read(0, x=0, y=0, width=256, height=256)
            with pytest.raises(UnreadableSlideError, match=str(path)):
                opened.read(0, x=0, y=0, width=1100, height=700)


def test_without_openslide_plain_tiff_opens_and_the_rest_says_what_to_install(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)
    with open_slide(slide) as opened:
        assert opened.reader == "tifffile" and len(opened.levels) == 2
    (tmp_path / "a.svs").write_bytes(b"whatever")
    with pytest.raises(ImportError, match=r"a\.svs: OpenSlide is needed to read this file: pip install 'glpretrain\[slides\]'"):
        open_slide(tmp_path / "a.svs")


def test_slides_are_called_by_their_place(tmp_path: Path) -> None:
    for name in ("tumour/a.svs", "tumour/b.v2.ome.tif", "normal/a.ndpi", "normal/notes.txt", ".hidden/c.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(find_slides([tmp_path])) == ["normal/a", "tumour/a", "tumour/b.v2"]
    assert find_slides([tmp_path / "tumour" / "a.svs", tmp_path / "tumour"]) == find_slides([tmp_path / "tumour"])
    with pytest.raises(ValueError, match="are both called 'a'; give a folder above both"):
        find_slides([tmp_path / "tumour" / "a.svs", tmp_path / "normal" / "a.ndpi"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no slide in .*empty; accepted endings: \.svs"):
        find_slides([tmp_path / "empty"])
    with pytest.raises(ValueError, match="does not exist; give files and folders"):
        find_slides([tmp_path / "missing.svs"])
