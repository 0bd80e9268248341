"""From slides to shards: the choice of tiles, the same bytes in every run, bounded memory, and no tile lost or doubled by a kill."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from processes import together
from tiles_processes import PeakMemory, contents, ended, family, wait_until

from glpretrain.cli import main
from glpretrain.data import TarShards, TileFolder
from glpretrain.prepare.slides import Settings, cut_slides, find_slides, open_slide
from glpretrain.prepare.slides.cutting import TilesCut, cutting
from glpretrain.prepare.slides.plan import plan_tiles
from glpretrain.prepare.slides.synthetic import write_synthetic_slide
from glpretrain.prepare.workers import Workers

ROOT = Path(__file__).parents[3]
SVS = ROOT.parent / "shared" / "data" / "pathology_wsi_cmu1small" / "CMU-1-Small-Region.svs"
GIB = 1 << 30
SMALL = Settings(size=64, format="png", per_shard=16)
LARGE = Settings(size=160, per_shard=8)


def command(slide: Path, out: Path, **options: int) -> subprocess.Popen:
    """`glpretrain tiles` with two workers, in a process of its own."""
    arguments = [text for name, value in (options | {"workers": 2}).items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "glpretrain.cli", "tiles", str(slide), "--out", str(out), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def entries(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Synced files survive a power cut, but these tests only kill processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.tif"
    write_synthetic_slide(path, width=8_192, height=1_024, lesion=0.1)
    return path


@pytest.fixture(scope="module")
def cut_once(large: Path) -> Path:
    """The tiles of the large slide, cut by this process alone."""
    out = large.parent / "once"
    cut_slides([large], out=out, settings=LARGE)
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.tif"
    write_synthetic_slide(path, width=1_500, height=1_000, mpp=0.5, seed=1, levels=(1, 2, 4))
    return path


@pytest.fixture(scope="module")
def small_tiles(small: Path) -> Path:
    """The tiles of the small slide. No test writes there."""
    out = small.parent / "tiles"
    cut_slides([small], out=out, settings=SMALL)
    return out


def test_a_wide_slide_is_cut_in_bounded_memory_and_twice_the_same(large: Path, cut_once: Path, tmp_path: Path) -> None:
    peak = PeakMemory(command(large, tmp_path / "out", size=LARGE.size, per_shard=LARGE.per_shard))
    status = peak.wait()
    assert status == 0, peak.process.stderr.read()
    assert 50 << 20 < peak.bytes < GIB // 2
    assert len(entries(cut_once)) > 200
    assert contents(tmp_path / "out") == contents(cut_once)


def test_a_killed_run_goes_on_without_loss_or_doubles(large: Path, cut_once: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = command(large, out, size=LARGE.size, per_shard=LARGE.per_shard)
    wait_until(lambda: len(list(out.glob("shards/*.tar"))) >= 2 or process.poll() is not None)
    started = family(process.pid)
    process.kill()
    process.communicate()
    wait_until(lambda: all(map(ended, started)))  # workers finish the shard that they are writing
    there = {path: path.stat().st_mtime_ns for path in out.glob("shards/*.tar")}
    assert 2 <= len(there) < len(list(cut_once.glob("shards/*.tar")))
    assert not (out / "index.jsonl").exists()
    with pytest.raises(ValueError, match="`glpretrain tiles` with the same arguments again to finish it"):
        TileFolder(out)
    summary = cut_slides([large], out=out, settings=LARGE)
    assert [record.slide for record in summary.cut] == ["large"] and not summary.before
    assert contents(out) == contents(cut_once)
    assert all(path.stat().st_mtime_ns == written for path, written in there.items())  # kept, not cut again
    keys = [(entry["slide"], entry["x"], entry["y"]) for entry in entries(out)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("when", ["planned", "one shard", "index without shard", "all shards"])
def test_whatever_is_missing_is_made(small: Path, small_tiles: Path, tmp_path: Path, when: str) -> None:
    out = tmp_path / "out"
    run = cutting(find_slides([small]), out=out, settings=SMALL, workers=Workers(1))
    with contextlib.closing(run):
        wanted = {"planned": 0, "one shard": 1, "index without shard": 2, "all shards": len(list(small_tiles.glob("shards/*.tar")))}[when]
        while wanted > sum(1 for _ in out.glob("shards/*.tar")) or not (out / "slides" / "small.json").is_file():
            next(run)
    assert (out / "index.jsonl").read_bytes() == b""  # written even so, and of complete slides only
    if when == "index without shard":
        (out / "shards" / "small-00001.tar").unlink()
        (out / "shards" / ".small-00001.tar.77.part").write_bytes(b"half")
    cut_slides([small], out=out, settings=SMALL)
    assert contents(out) == contents(small_tiles)


def test_tiles_are_the_pixels_of_the_slide(small: Path, small_tiles: Path) -> None:
    source, found = TileFolder(small_tiles), entries(small_tiles)
    assert len(source) == len(found) > 50
    with tifffile.TiffFile(small) as opened:
        pixels = opened.pages[0].asarray()
    for index, entry in enumerate(found):
        x, y = entry["x"], entry["y"]
        assert (x % 64, y % 64, entry["side"], entry["level"], entry["mpp"]) == (0, 0, 64, 0, 0.5)
        np.testing.assert_array_equal(source[index].values.permute(1, 2, 0).numpy(), pixels[y : y + 64, x : x + 64])
        stained = (np.ptp(pixels[y : y + 64, x : x + 64], axis=-1) > 25).mean()
        assert entry["tissue"] >= 0.5 and abs(entry["tissue"] - stained) < 0.12
    corners = {(entry["x"], entry["y"]) for entry in found}
    left_out = [(x, y) for x in range(0, 1500 - 63, 64) for y in range(0, 1000 - 63, 64) if (x, y) not in corners]
    assert max((np.ptp(pixels[y : y + 64, x : x + 64], axis=-1) > 25).mean() for x, y in left_out) < 0.6


@pytest.mark.parametrize(("mpp", "level", "side"), [(1.0, 1, 128), (1.5, 1, 192), (2.0, 2, 256), (0.505, 0, 64), (0.6, 0, 77)])
def test_level_and_resampling_follow_the_microns(small: Path, tmp_path: Path, mpp: float, level: int, side: int) -> None:
    cut_slides([small], out=tmp_path, settings=SMALL._replace(mpp=mpp, min_tissue=0.2))
    source, found = TileFolder(tmp_path), entries(tmp_path)
    assert {(entry["level"], entry["side"]) for entry in found} == {(level, side)}
    assert all(abs(entry["mpp"] / mpp - 1) <= 0.02 for entry in found)
    with Image.open(small) as opened:
        for index in range(0, len(source), 5):
            x, y = source.corners[index].tolist()
            expected = opened.convert("RGB").crop((x, y, x + side, y + side)).resize((64, 64), Image.Resampling.BOX)
            difference = source[index].values.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)
            assert np.abs(difference).mean() < 12 and np.abs(difference.mean(axis=(0, 1))).max() < 1.5


def test_overlap_and_least_share(small: Path) -> None:
    with open_slide(small) as opened:
        plain, overview = plan_tiles(opened, SMALL)
        dense, _ = plan_tiles(opened, SMALL._replace(overlap=16))
        every, _ = plan_tiles(opened, SMALL._replace(min_tissue=0.0))
    assert set((dense.corners % 48).ravel().tolist()) == {0.0}
    assert dense.num_tiles > 1.5 * plain.num_tiles
    assert plain.tissue.min() >= 0.5 and 0 < every.tissue.min() < 0.1
    assert every.num_tiles > plain.num_tiles
    assert overview.thumbnail.shape == (1000, 1500, 3) and overview.factor == 1


def test_thumbnail_of_one_level_is_that_of_a_pyramid(tmp_path: Path) -> None:
    thumbnails = []
    for name, levels in (("a.tif", (1,)), ("b.tif", (1, 2))):
        write_synthetic_slide(tmp_path / name, width=4_500, height=600, levels=levels)
        with open_slide(tmp_path / name) as opened:
            _, overview = plan_tiles(opened, SMALL)
        assert overview.factor == 3 and overview.thumbnail.shape == (200, 1500, 3)
        thumbnails.append(overview.thumbnail.astype(int))
    assert np.abs(thumbnails[0] - thumbnails[1]).mean() < 6


def test_a_person_can_check_the_cut(small_tiles: Path) -> None:
    with Image.open(small_tiles / "overviews" / "small.png") as opened:
        pixels = np.asarray(opened.convert("RGB"))[-1000:]
    entry = entries(small_tiles)[10]
    assert (pixels[entry["y"], entry["x"] + 3 : entry["x"] + 60] == pixels[entry["y"], entry["x"] + 3]).all()  # its upper border is drawn
    assert ((pixels == (0, 140, 60)).all(axis=-1)).sum() > 1_000  # and the outline of the tissue


def test_damaged_and_blank_slides_cost_only_themselves(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "good.tif").write_bytes(small.read_bytes())
    (slides / "garbage.svs").write_bytes(b"garbage" * 999)
    content = bytearray(small.read_bytes())
    with tifffile.TiffFile(small) as opened:
        start = opened.pages[0].dataoffsets[14]
    content[start : start + 300] = bytes(300)
    (slides / "damaged.tif").write_bytes(content)
    blank = np.full((512, 512, 3), 243, dtype=np.uint8)
    tifffile.imwrite(
        slides / "blank.tif", blank, tile=(256, 256), photometric="rgb", resolution=(20_000, 20_000), resolutionunit="CENTIMETER"
    )
    tifffile.imwrite(slides / "silent.tif", blank, tile=(256, 256), photometric="rgb")
    for workers, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        arguments = ["--size", "64", "--format", "png", "--per_shard", "16", "--workers", str(workers)]
        assert main(["tiles", str(slides), "--out", str(out), *arguments]) == 0
        said = capsys.readouterr().out
        assert "blank: 0 tiles" in said and "no tissue" in said and "without a tile: blank" in said
        assert "left out: damaged, garbage, silent" in said or "left out: garbage" in said
        assert f"left out: {slides / 'garbage.svs'}: OpenSlide does not know" in said
        assert f"left out: {slides / 'damaged.tif'}: " in said
        assert f"left out: {slides / 'silent.tif'}: the file does not give its microns per pixel; give mpp_of_slide" in said
        assert {entry["slide"] for entry in entries(out)} == {"good"}
        assert [path.name for path in sorted(out.glob("slides/*"))] == ["blank.json", "good.json"]
        assert not list(out.glob("shards/damaged*")) and not list(out.rglob(".*.part"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert main(["tiles", str(slides / "garbage.svs"), "--out", str(tmp_path / "none"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert "none of 1 slides could be cut; the first: " in error and error.count("\n") == 1


def test_microns_can_be_given_and_must_suffice(tmp_path: Path) -> None:
    write_synthetic_slide(tmp_path / "a.tif", width=700, height=600, mpp=None)
    summary = cut_slides([tmp_path / "a.tif"], out=tmp_path / "out", settings=SMALL._replace(mpp_of_slide=0.25))
    (record,) = summary.cut
    assert record.mpp_given and record.slide_mpp == 0.25 and {entry["side"] for entry in entries(tmp_path / "out")} == {128}
    coarse = cut_slides([tmp_path / "a.tif"], out=tmp_path / "coarse", settings=SMALL._replace(mpp_of_slide=1.0))
    assert "mpp 0.5 is finer than the 1 of the slide; accepted: at least that" in coarse.failed["a"]


def test_a_folder_holds_tiles_of_one_kind(small: Path, small_tiles: Path, tmp_path: Path) -> None:
    shutil.copytree(small_tiles, tmp_path / "out")
    assert [record.slide for record in cut_slides([small], out=tmp_path / "out", settings=SMALL).before] == ["small"]
    with pytest.raises(ValueError, match=r"other settings: min_tissue is 0\.6, there it is 0\.5; give the same settings"):
        cut_slides([small], out=tmp_path / "out", settings=SMALL._replace(min_tissue=0.6))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match="holds other files"):
        cut_slides([small], out=tmp_path / "photos", settings=SMALL)
    for name, value in (
        ("size", 8),
        ("mpp", 0.0),
        ("overlap", 64),
        ("min_tissue", 1.5),
        ("quality", 0),
        ("per_shard", 0),
        ("format", "gif"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {value}; accepted: "):
            cut_slides([small], out=tmp_path / "new", settings=SMALL._replace(**{name: value}))
    assert not (tmp_path / "new").exists()


def test_two_runs_do_not_write_to_one_folder(small: Path, tmp_path: Path) -> None:
    with contextlib.closing(cutting(find_slides([small]), out=tmp_path, settings=SMALL, workers=Workers(1))) as run:
        next(run)
        with pytest.raises(ValueError, match=f"out: process {os.getpid()} on .* is writing to"):
            cut_slides([small], out=tmp_path, settings=SMALL)
    assert cut_slides([small], out=tmp_path, settings=SMALL).cut


def test_four_runs_that_start_together_cut_with_one_set_of_settings(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = (SMALL.size, 2 * SMALL.size)

    def cut(number: int) -> int:
        return len(cut_slides([small], out=out, settings=SMALL._replace(size=sizes[number % 2])).cut)

    outcomes = together(cut, count=4)
    assert 1 in [one.value for one in outcomes]
    refused = r"ValueError: out: (process \d+ on .* is writing to|another process is writing to|.* holds tiles with other settings)"
    assert all(re.match(refused, one.error) for one in outcomes if one.error)
    size = json.loads((out / "tiles.json").read_text())["size"]
    assert cut_slides([small], out=out, settings=SMALL._replace(size=size)).before  # complete, and with the settings that are written
    with pytest.raises(ValueError, match="holds tiles with other settings: size is"):
        cut_slides([small], out=out, settings=SMALL._replace(size=sum(sizes) - size))
    assert not list(out.rglob(".*"))


def test_another_slide_of_the_same_name_is_refused_once_the_first_is_complete(small: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "small.tif", tmp_path / "out"
    write_synthetic_slide(other, width=900, height=700, seed=2)
    with contextlib.closing(cutting(find_slides([small]), out=out, settings=SMALL, workers=Workers(1))) as run:
        while not isinstance(next(run), TilesCut):
            pass
    cut_slides([other], out=out, settings=SMALL)  # the first was only begun: nothing of it is left
    cut_slides([other], out=tmp_path / "alone", settings=SMALL)
    assert contents(out) == contents(tmp_path / "alone")
    failed = cut_slides([small], out=out, settings=SMALL).failed
    assert failed["small"].endswith("not the file that 'small' was cut from; give another folder, or rename the file")
    assert contents(out) == contents(tmp_path / "alone")


def test_shards_are_readable_as_any_other(small: Path, tmp_path: Path) -> None:
    cut_slides([small], out=tmp_path, settings=SMALL._replace(format="jpg"))
    tiles, shards = TileFolder(tmp_path), TarShards(tmp_path)
    assert len(tiles) == len(shards) and list(tmp_path.glob("shards/*-00001.tar"))
    for index in range(0, len(tiles), 7):
        assert (tiles[index].values == shards[index].values).all()


@pytest.mark.skipif(not SVS.is_file(), reason=f"no slide {SVS}")
def test_a_scanned_slide(tmp_path: Path) -> None:
    summary = cut_slides([SVS], out=tmp_path)
    (record,) = summary.cut
    assert (record.width, record.height, record.reader, record.slide_mpp) == (2220, 2967, "openslide", 0.499)
    assert 40 <= record.tiles <= 55 and 0.3 < record.tissue < 0.45
    source = TileFolder(tmp_path)
    assert source.slides == ["CMU-1-Small-Region"] and source[0].values.shape == (3, 224, 224)
    means = np.array([source[index].values.float().mean(dim=(1, 2)).numpy() for index in range(len(source))])
    assert (means[:, 1] < means[:, 0]).all() and (means[:, 1] < means[:, 2]).all()  # haematoxylin and eosin: least green
    assert means[:, 1].max() < 215  # none is glass


@pytest.mark.slow
def test_half_a_gigapixel_without_a_pyramid(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    write_synthetic_slide(path, width=32_768, height=16_384, levels=(1,))
    peak = PeakMemory(command(path, tmp_path / "out"))
    status = peak.wait()
    assert status == 0, peak.process.stderr.read()
    assert peak.bytes < GIB
    assert len(entries(tmp_path / "out")) > 4_000


def test_tiles_that_lie_among_the_slides_are_not_cut_again(small: Path, tmp_path: Path) -> None:
    """The output holds shards and thumbnails, which do not end like slides."""
    slides = tmp_path / "slides"
    slides.mkdir()
    shutil.copy(small, slides / "one.tif")
    for _ in range(2):
        cut_slides([slides], out=slides / "tiles", settings=SMALL)
        assert list(find_slides([slides])) == ["one"]
    assert {entry["slide"] for entry in entries(slides / "tiles")} == {"one"}
