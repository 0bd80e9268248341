"""Preparing faces: detection, parsers, and a preparation that can be interrupted."""

import json
import re
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from image_files import write_image, write_map
from PIL import Image
from processes import together
from skimage.data import astronaut

from glpretrain.cli import main
from glpretrain.cli.faces import faces
from glpretrain.data import Faces, UnreadableItemError
from glpretrain.masking import FACE_REGIONS
from glpretrain.prepare.faces import Box, CascadeDetector, FacerParser, Preparation, TemplateParser
from glpretrain.prepare.faces.preparation import crop_box

ID = {name: number for number, name in enumerate(FACE_REGIONS)}


# Detection and parsers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def astronaut_image() -> torch.Tensor:
    return torch.from_numpy(astronaut()).permute(2, 0, 1).contiguous()


def test_the_face_of_a_photograph_is_found(astronaut_image: torch.Tensor) -> None:
    box = CascadeDetector().detect(astronaut_image)
    # From the forehead to below the mouth, and not the shuttle beside her.
    assert 60 < box.top < 110 and 160 < box.left < 200 and 165 < box.top + box.height < 230 and 250 < box.left + box.width < 300
    assert CascadeDetector().detect(astronaut_image[:, 250:, :200]) is None
    assert CascadeDetector().detect(torch.zeros(3, 4, 400, dtype=torch.uint8)) is None


def test_a_crop_is_a_square_about_the_face_within_the_picture() -> None:
    assert crop_box(Box(40, 60, 50, 40), margin=1.4, size=(200, 200)) == Box(30, 45, 70, 70)
    edge = crop_box(Box(0, 170, 50, 30), margin=2.0, size=(200, 200))
    assert edge == Box(0, 135, 65, 65)


def test_the_template_follows_the_face_box() -> None:
    image = torch.zeros(3, 100, 120, dtype=torch.uint8)
    whole = TemplateParser().parse(image, name=Path("a"), crop=Box(0, 0, 100, 120), face=Box(20, 30, 60, 60))
    assert (
        whole[20 + 31, 30 + 30] == ID["nose"] and whole[20 + 22, 30 + 18] == ID["right_eye"] and whole[20 + 22, 30 + 42] == ID["left_eye"]
    )
    assert whole[0, 0] == ID["background"] and set(whole.unique().tolist()) == set(range(11))
    part = TemplateParser().parse(image, name=Path("a"), crop=Box(10, 15, 70, 80), face=Box(20, 30, 60, 60))
    assert torch.equal(part, Box(10, 15, 70, 80).of(whole))


class _Facer(ModuleType):
    """The package's functions, answering with two faces of which the second is surer, and with labels by column."""

    def face_detector(self, name: str, device: str, threshold: float):
        assert (name, threshold) == ("retinaface/mobilenet", 0.3)
        rects = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 9.0, 9.0]])
        return lambda images: {"rects": rects[: 2 * int(images.any())], "scores": torch.tensor([0.5, 0.9])}

    def face_parser(self, name: str, device: str):
        assert name == "farl/lapa/448"

        def parse(images: torch.Tensor, found: dict[str, torch.Tensor]) -> dict:
            assert found["rects"].tolist() == [[1.0, 1.0, 9.0, 9.0]]
            labels = (torch.arange(images.shape[3]) % 11).expand(images.shape[2], -1)
            return {"seg": {"logits": torch.nn.functional.one_hot(labels, 11).permute(2, 0, 1)[None]}}

        return parse


def test_facer_is_asked_for_the_surest_face_of_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _Facer("facer")
    module.__spec__ = ModuleSpec("facer", loader=None)
    monkeypatch.setitem(sys.modules, "facer", module)
    parser, crop = FacerParser(), Box(3, 5, 10, 12)
    image = torch.ones(3, 30, 30, dtype=torch.uint8)
    assert torch.equal(parser.parse(image, name=Path("a.png"), crop=crop, face=crop), (torch.arange(12) % 11).expand(10, -1))
    with pytest.raises(UnreadableItemError, match=r"a.png: the parser finds no face in the crop"):
        parser.parse(torch.zeros_like(image), name=Path("a.png"), crop=crop, face=crop)


# Preparation -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path, astronaut_image: torch.Tensor) -> Path:
    folder = tmp_path / "pictures"
    for name in ("real/a.jpg", "real/b.png", "fake/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(astronaut_image[:, :300, 100:400].permute(1, 2, 0).numpy()).save(folder / name)
    (folder / "real/damaged.jpg").write_bytes(b"no picture")
    write_image(folder / "fake/sky.png", size=(100, 100))
    return folder


def test_pictures_become_faces_with_maps_and_bad_ones_a_line(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "faces"
    assert main(["faces", str(pictures), "--out", str(out), "--size", "64", "--workers", "0"]) == 0
    shown = capsys.readouterr()
    assert "3 faces in" in shown.out and "2 skipped" in shown.out
    skipped = (out / "skipped.txt").read_text().splitlines()
    assert (
        len(skipped) == 2 and any("damaged.jpg" in line for line in skipped) and any("sky.png: no face found" in line for line in skipped)
    )
    assert all(line in shown.err for line in skipped)
    source = Faces(out)
    assert len(source) == 3 and source.classes == ["fake", "real"] and source[0].values.shape == (3, 64, 64)
    assert {ID["nose"], ID["skin"], ID["hair"]} <= set(source[0].regions.unique().tolist())


def test_an_interrupted_preparation_goes_on(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "faces"
    assert faces(pictures, out=out, size=64, workers=0) == {"written": 3, "skipped": 2}
    before = (out / "images/real/a.png").stat().st_mtime_ns
    (out / "images/real/b.png").unlink()  # its map is there: the image is written last
    (out / "images/fake/.c.png.77.part").write_bytes(b"half")
    assert faces(pictures, out=out, size=64, workers=1) == {"written": 1, "there": 2, "skipped": 2}
    assert (out / "images/real/a.png").stat().st_mtime_ns == before
    assert not list(out.rglob(".*"))
    with pytest.raises(ValueError, match=r"out: .* was written with .*'size': 64.*; give the same settings, or a new folder"):
        faces(pictures, out=out, size=32, workers=0)


def test_two_preparations_do_not_write_to_one_folder(pictures: Path, tmp_path: Path) -> None:
    options = {"parser": TemplateParser(), "detector": None, "workers": 0}
    run = Preparation(pictures, tmp_path / "faces", size=64, **options).run()
    next(run)
    for size in (64, 32):  # 32: refused for its settings, which the first has written
        (second,) = together(lambda _, size=size: next(Preparation(pictures, tmp_path / "faces", size=size, **options).run()), count=1)
        assert re.search(r"out: process \d+ on .* is writing to .*faces; wait" if size == 64 else "was written with", second.error)
    run.close()
    assert faces(pictures, out=tmp_path / "faces", detector="none", size=64, workers=0)["there"] == 1


def test_of_four_preparations_that_start_together_one_or_more_write_whole_faces(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "faces"
    sizes = (64, 48)
    outcomes = together(lambda number: faces(pictures, out=out, size=sizes[number % 2], workers=0), count=4)
    assert any(not one.error for one in outcomes)
    refused = r"ValueError: out: (process \d+ on .* is writing to|another process is writing to|.* was written with)"
    assert all(re.match(refused, one.error) for one in outcomes if one.error)
    size = json.loads((out / "faces.json").read_text())["size"]
    assert {Image.open(path).size for path in out.rglob("*.png")} == {(size, size)}
    assert len(list(out.rglob("*.png"))) == 6 and len((out / "skipped.txt").read_text().splitlines()) == 2
    assert not list(out.rglob(".*"))


def test_maps_of_the_user_are_cut_with_the_face(pictures: Path, tmp_path: Path, astronaut_image: torch.Tensor) -> None:
    for name in ("real/a", "fake/c"):
        rows = np.arange(300)[:, None].repeat(300, axis=1)
        write_map(tmp_path / "maps" / f"{name}.png", np.where(rows < 150, 2, 1))
    counts = faces(pictures, out=tmp_path / "faces", parser="maps", maps=tmp_path / "maps", table="fasseg", size=64, workers=0)
    assert counts == {"written": 2, "skipped": 3}
    assert "real/b.png has no region map" in (tmp_path / "faces/skipped.txt").read_text()
    item = Faces(tmp_path / "faces")[0]
    boundary = int((item.regions == ID["skin"]).any(dim=1).float().argmax())
    crop = crop_box(CascadeDetector().detect(astronaut_image[:, :300, 100:400]), margin=1.3, size=(300, 300))
    assert set(item.regions.unique().tolist()) == {ID["hair"], ID["skin"]} and abs(boundary - (150 - crop.top) * 64 / crop.height) <= 1


def test_pictures_that_are_faces_already_are_kept_whole(pictures: Path, tmp_path: Path) -> None:
    assert faces(pictures, out=tmp_path / "faces", detector="none", size=50, workers=0) == {"written": 4, "skipped": 1}
    assert Faces(tmp_path / "faces")[0].values.shape == (3, 50, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parser": "maps"}, "maps: None given with parser 'maps'"),
        ({"maps": "."}, "maps: . given with parser 'template'"),
        ({"table": "lapa"}, "table: lapa given with parser 'template'; accepted with parser 'maps' only"),
        ({"size": 8}, "size: 8 given; accepted: at least 16 pixels"),
        ({"margin": 0.5}, "margin: 0.5 given; accepted: at least 1, the face itself"),
        ({"workers": -1}, "workers: -1 given; accepted: at least 0"),
        ({"parser": "facer"}, "parser: facer given, but the package is not installed (pip install pyfacer)"),
    ],
)
def test_mistakes_are_named(options: dict, message: str, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        faces(pictures, out=tmp_path / "faces", **options)
    assert str(caught.value).startswith(message)


def test_two_pictures_of_one_name_and_empty_folders_are_named(pictures: Path, tmp_path: Path) -> None:
    shutil.copy(pictures / "real/b.png", pictures / "real/a.png")
    with pytest.raises(ValueError, match=r"real/a.jpg and real/a.png would both become .*; rename one of them"):
        Preparation(pictures, tmp_path / "out", parser=TemplateParser(), detector=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="faces: no image in"):
        Preparation(tmp_path / "empty", tmp_path / "out", parser=TemplateParser(), detector=None)
    write_image(tmp_path / "sky/sky.png", size=(100, 100))
    with pytest.raises(ValueError, match="faces: none of 1 pictures could be used"):
        faces(tmp_path / "sky", out=tmp_path / "out", workers=0)
