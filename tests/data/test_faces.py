"""Faces: maps in one set of ids, sources that name what is missing, parsers, detection, and a preparation that can be interrupted."""

import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from glpretrain.cli import main
from glpretrain.cli.faces import faces
from glpretrain.data import Faces, FaceSwaps, ImageFolder, LFWSubset, Subset, UnreadableItemError, source_for
from glpretrain.data.module import DataModule
from glpretrain.data.sources.face_regions import TABLES, read_map
from glpretrain.data.views import MultiCrop, ViewSpec
from glpretrain.encoders import ViT
from glpretrain.masking import FACE_REGIONS, CRFRPMask, FRPMask, RandomMask
from glpretrain.prepare.faces import Box, CascadeDetector, FacerParser, MapParser, Preparation, TemplateParser
from glpretrain.prepare.faces.preparation import crop_box

FASSEG = Path(__file__).parents[2] / "../shared/data/faces_parsing_fasseg"
ID = {name: number for number, name in enumerate(FACE_REGIONS)}


def write_map(path: Path, labels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(np.uint8)).save(path)
    return path


def write_image(path: Path, *, size: tuple[int, int] = (20, 30), value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Two classes of two faces; every map has the label of its place in a row."""
    for name in ("fake/a/1", "fake/a/2", "real/b/1", "real/b/2"):
        write_image(tmp_path / "images" / f"{name}.jpg", value=10 * int(name[-1]))
        write_map(tmp_path / "regions" / f"{name}.png", np.arange(30)[None].repeat(20, axis=0) // 3)
    return tmp_path


# Maps ----------------------------------------------------------------------------------------------------------------------------


def test_tables_lead_to_the_same_regions() -> None:
    celeba = ("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip", "l_lip", "hair", "hat")
    assert TABLES["lapa"] == {number: number for number in range(11)}
    assert [
        TABLES["celebamask"][1 + celeba.index(name)] for name in ("skin", "nose", "eye_g", "l_brow", "u_lip", "mouth", "hair", "hat")
    ] == [ID[name] for name in ("skin", "nose", "skin", "left_brow", "upper_lip", "inner_mouth", "hair", "background")]
    # The other order: skin, brows, eyes, glasses, ears, earrings, nose, mouth, lips, neck, necklace, cloth, hair, hat.
    assert TABLES["bisenet"] == dict(enumerate([0, 1, 3, 2, 5, 4, 1, 0, 0, 0, 6, 8, 7, 9, 0, 0, 0, 10, 0]))
    assert sorted(TABLES["celebamask"].values()) == sorted(TABLES["bisenet"].values())
    assert all(len(TABLES[name]) == 19 for name in ("celebamask", "bisenet"))


def test_a_map_is_translated_and_stretched_to_its_image(tmp_path: Path) -> None:
    path = write_map(tmp_path / "map.png", np.array([[0, 3], [5, 2]]))
    expected = torch.tensor([[0, 4], [7, 10]])
    assert torch.equal(read_map(path, table=TABLES["fasseg"], size=(2, 2)), expected)
    large = read_map(path, table=TABLES["fasseg"], size=(4, 6))
    assert torch.equal(large, expected.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1))
    np.save(tmp_path / "map.npy", np.array([[[0, 3], [5, 2]]], dtype=np.int64))  # as the official preparation writes them
    assert torch.equal(read_map(tmp_path / "map.npy", table=TABLES["fasseg"], size=(2, 2)), expected)


def test_a_map_that_is_none_is_named(tmp_path: Path) -> None:
    unknown = write_map(tmp_path / "unknown.png", np.array([[0, 12]]))
    with pytest.raises(UnreadableItemError, match=r"unknown.png: label 12; accepted by its table: 0, 1, 2"):
        read_map(unknown, table=TABLES["lapa"], size=(1, 2))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    with pytest.raises(UnreadableItemError, match=r"damaged\.png"):
        read_map(damaged, table=TABLES["lapa"], size=(1, 2))
    with pytest.raises(UnreadableItemError, match=r"shape \(4, 4, 3\) of uint8; expected one integer label per pixel"):
        read_map(write_image(tmp_path / "colour.png", size=(4, 4)), table=TABLES["lapa"], size=(4, 4))


# Sources -------------------------------------------------------------------------------------------------------------------------


def test_faces_read_images_with_their_maps(prepared: Path) -> None:
    source = Faces(prepared)
    assert len(source) == 4 and source.classes == ["fake", "real"] and source.has_regions and Subset(source, indices=[0]).has_regions
    assert source.groups == ["fake/a", "fake/a", "real/b", "real/b"] == ImageFolder(prepared / "images").groups
    assert Subset(source, indices=[3, 0]).groups == ["real/b", "fake/a"]
    item = source[1]
    assert item.label == 0 and item.image.shape == (3, 20, 30) and torch.equal(item.regions, (torch.arange(30) // 3).expand(20, -1))
    assert source_for(prepared, "image") == "glpretrain.data.Faces" and not Faces.reads(prepared / "images")


def test_a_missing_map_is_an_error_that_names_the_file(prepared: Path) -> None:
    (prepared / "regions/real/b/2.png").unlink()
    with pytest.raises(ValueError, match=r"faces: real/b/2.jpg has no region map; expected .*/regions/real/b/2.png or .*2.npy"):
        Faces(prepared)
    shutil.rmtree(prepared / "regions")
    with pytest.raises(ValueError, match=r"regions is not a folder"):
        Faces(prepared)
    with pytest.raises(ValueError, match=r"table: 'voc' given; accepted: lapa, celebamask, bisenet, fasseg"):
        Faces(prepared, table="voc")
    with pytest.raises(ValueError, match="table: it leads to 11; accepted: ids of background, skin"):
        MapParser(prepared, table={0: 11})


def test_views_move_image_and_map_together() -> None:
    """The image shows the map: left part, right part and a bar. After crop and flip the cut map still says what is shown."""

    class Painted(LFWSubset):
        def __getitem__(self, index: int):
            regions = torch.ones(96, 96, dtype=torch.long)
            regions[:, 40:], regions[70:80] = 10, 5
            return super().__getitem__(index)._replace(image=(regions * 20).to(torch.uint8).repeat(3, 1, 1), regions=regions)

    views = MultiCrop([ViewSpec(48, (0.4, 1.0), count=2, interpolation="bilinear")])
    raw = DataModule(Painted(40, size=96), views, batch_size=8, image_size=96, mask=CRFRPMask()).raw_batch(range(8))
    options = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "regions": raw.regions.long()}
    made = views(raw.images, aspect=raw.aspect, keys=torch.arange(8), **options)
    shown = (made.global_views[:, :, 0] * 255 / 20).round().long()  # [G B 48 48]
    assert (shown == made.regions).float().mean() > 0.93  # all but the mixed pixels at edges
    assert (shown == made.regions.flip(3)).float().mean() < 0.85
    assert made.boxes[..., 4].unique().numel() == 2  # some flipped, some not


def _batch(mask, **options):
    encoder = ViT("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    views = MultiCrop([ViewSpec(48, (0.6, 1.0), count=2)])
    data = DataModule(LFWSubset(12, size=48), views, batch_size=4, image_size=56, mask=mask, **options)
    return data, data.make_batch(data.raw_batch(range(4)), encoder=encoder, epoch=0)


def test_a_batch_has_the_covered_tokens_where_its_mask_covers_some() -> None:
    data, batch = _batch(CRFRPMask())
    assert batch.mask.shape == batch.region_mask.shape == (2, 4, 36) and (batch.mask.sum(dim=2) == 27).all()
    assert not (batch.region_mask & ~batch.mask).any() and batch.region_mask.any()
    assert data.optional_fields == {"mask", "region_mask"}
    for mask in (FRPMask(), RandomMask(0.75)):
        data, batch = _batch(mask)
        assert batch.region_mask is None and (batch.mask.sum(dim=2) == 27).all() and data.optional_fields == {"mask"}
    with pytest.raises(ValueError, match="mask CRFRPMask needs region maps"):
        DataModule(FaceSwaps(), MultiCrop([ViewSpec(48, (0.6, 1.0))]), batch_size=4, mask=CRFRPMask())


def test_the_embedded_faces_are_divided_and_have_all_regions() -> None:
    source = LFWSubset(170, size=48)
    assert len(source) == 170 and source[165].image.shape == (3, 48, 48) and torch.equal(source[165].image, source[5].image)
    assert set(source[0].regions.unique().tolist()) == set(range(11))
    train, test = source.train_test_split()
    assert len(train) == 160 and len(test) == 40 and {test[index].label for index in range(40)} == {0, 1}
    seen = {tuple(train[index].image.flatten().tolist()) for index in range(160)}
    assert not any(tuple(test[index].image.flatten().tolist()) in seen for index in range(40))
    with pytest.raises(ValueError, match="LFWSubset: split is 'val'; expected faces, train, test"):
        LFWSubset(split="val")


def test_swapped_faces_differ_inside_and_keep_the_rest() -> None:
    source = FaceSwaps(size=50, split="test")
    assert len(source) == 40 and source.classes == ("real", "fake")
    real, fake = source[6], source[7]
    changed = (real.image.float() - fake.image.float()).abs().amax(dim=0) > 0
    assert (real.label, fake.label) == (0, 1) and 0.1 < changed.float().mean() < 0.7
    assert not changed[:, :2].any() and not changed[-4:].any()
    with pytest.raises(ValueError, match="frames 0; expected at least 16 pixels and 1 frame"):
        FaceSwaps(frames=0)


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
    with pytest.raises(UnreadableItemError, match=r"a.png: the parser finds no face in it"):
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
    assert len(source) == 3 and source.classes == ["fake", "real"] and source[0].image.shape == (3, 64, 64)
    assert {ID["nose"], ID["skin"], ID["hair"]} <= set(source[0].regions.unique().tolist())


def test_an_interrupted_preparation_goes_on(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "faces"
    assert faces(pictures, out=out, size=64, workers=0) == {"written": 3, "skipped": 2}
    before = (out / "images/real/a.png").stat().st_mtime_ns
    (out / "images/real/b.png").unlink()  # its map is there: the image is written last
    (out / "images/fake/c.part").write_bytes(b"half")
    assert faces(pictures, out=out, size=64, workers=2) == {"written": 1, "there": 2, "skipped": 2}
    assert (out / "images/real/a.png").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"out: .* was made with .*'size': 64.*; accepted: the same settings, or a new folder"):
        faces(pictures, out=out, size=32, workers=0)


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
    assert Faces(tmp_path / "faces")[0].image.shape == (3, 50, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parser": "maps"}, "maps: None given with parser 'maps'"),
        ({"maps": "."}, "maps: . given with parser 'template'"),
        ({"table": "lapa"}, "table: lapa given with parser 'template'; accepted with parser 'maps' only"),
        ({"size": 8}, "size: 8 given; accepted: at least 16 pixels"),
        ({"margin": 0.5}, "margin: 0.5 given; accepted: at least 1, the face itself"),
        ({"workers": -1}, "workers: -1 given; accepted: 0 or more"),
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


@pytest.mark.skipif(not FASSEG.is_dir(), reason=f"no real faces in {FASSEG}")
def test_real_maps_make_exact_masks() -> None:
    source = Faces(FASSEG / "train", regions="masks", table="fasseg")
    views = MultiCrop([ViewSpec(224, (0.5, 1.0))])
    data = DataModule(source, views, batch_size=8, mask=CRFRPMask(region_per="item"), cache=False)
    encoder = ViT("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3)
    batch = data.make_batch(data.raw_batch(range(0, len(source), 25)), encoder=encoder, epoch=0)
    assert (batch.mask.sum(dim=2) == 147).all() and batch.region_mask.any(dim=2).float().mean() > 0.5
