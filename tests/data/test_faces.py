"""Faces as sources: label maps of several kinds as one set of ids, folders of faces, embedded faces, and batches with region masks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_image, write_map
from view_parts import card_of, flips

from glpretrain.data import Faces, FaceSwaps, ImageFolder, LFWSubset, Subset, UnreadableItemError, source_for
from glpretrain.data.module import DataModule
from glpretrain.data.sources.images import face_regions
from glpretrain.data.sources.images.face_regions import TABLES, read_map
from glpretrain.data.views import MultiCrop, ViewSpec
from glpretrain.encoders import ViT
from glpretrain.masking import FACE_REGIONS, CRFRPMask, FRPMask, RandomMask

FASSEG = Path(__file__).parents[2] / "../shared/data/faces_parsing_fasseg"
ID = {name: number for number, name in enumerate(FACE_REGIONS)}


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


def test_maps_are_found_by_listing_their_folders_once(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(prepared / "regions/fake/a/2.npy", np.zeros((20, 30)))  # the .png comes first
    (prepared / "regions/real/b/1.png").rename(prepared / "regions/real/b/1.npy")
    listed: list[Path] = []
    files_in = face_regions._files_in
    monkeypatch.setattr(face_regions, "_files_in", lambda folder: listed.append(folder) or files_in(folder))
    monkeypatch.setattr(face_regions, "find_map", lambda folder, name: pytest.fail(f"asked for the map of {name} alone"))
    maps = Faces(prepared)._maps
    assert [str(path.relative_to(prepared / "regions")) for path in maps] == [
        "fake/a/1.png",
        "fake/a/2.png",
        "real/b/1.npy",
        "real/b/2.png",
    ]
    assert len(listed) == len(set(listed)) == 3


def test_a_file_that_is_no_label_map_is_named(tmp_path: Path) -> None:
    unknown = write_map(tmp_path / "unknown.png", np.array([[0, 12]]))
    with pytest.raises(UnreadableItemError, match=r"unknown.png: label 12; the table accepts: 0, 1, 2"):
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
    assert item.label == 0 and item.values.shape == (3, 20, 30) and torch.equal(item.regions, (torch.arange(30) // 3).expand(20, -1))
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
    with pytest.raises(ValueError, match="table: id 11 given; accepted: ids of background, skin"):
        Faces(prepared, table={0: 11})


def test_views_move_image_and_map_together() -> None:
    """The image shows the map: left part, right part and a bar. After crop and flip the cut map still says what is shown."""

    class Painted(LFWSubset):
        def __getitem__(self, index: int):
            regions = torch.ones(96, 96, dtype=torch.long)
            regions[:, 40:], regions[70:80] = 10, 5
            return super().__getitem__(index)._replace(values=(regions * 20).to(torch.uint8).repeat(3, 1, 1), regions=regions)

    views = MultiCrop([ViewSpec(48, (0.4, 1.0), count=2, interpolation="bilinear")])
    source, keys, card = Painted(40, size=96), torch.arange(8), card_of((0.0,) * 3, (1.0,) * 3)
    parts = views.prepare([views.read(source, index) for index in range(8)], keys=keys, card=card)
    made = views.make(parts, changes=views.draw(keys), keys=keys, card=card)
    shown = (made.groups["global"].items[:, :, 0] * 255 / 20).round().long()  # [G B 48 48]
    assert (shown == made.regions).float().mean() > 0.93  # all but the mixed pixels at edges
    assert (shown == made.regions.flip(3)).float().mean() < 0.85
    assert flips(made.groups["global"].frame).unique().numel() == 2  # some flipped, some not


def _batch(mask, **options):
    encoder = ViT("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    views = MultiCrop([ViewSpec(48, (0.6, 1.0), count=2)])
    data = DataModule(LFWSubset(12, size=56), views, batch_size=4, mask=mask, **options)
    return data, data.make_batch(data.raw_batch(range(4), encoder=encoder, epoch=0), encoder=encoder)


def test_a_batch_has_the_covered_tokens_where_its_mask_covers_some() -> None:
    data, batch = _batch(CRFRPMask())
    group = batch.views["global"]
    assert group.mask.shape == group.region_mask.shape == (2, 4, 36) and (group.mask.sum(dim=2) == 27).all()
    assert not (group.region_mask & ~group.mask).any() and group.region_mask.any()
    assert data.made()["global"].parts == {"mask", "region_mask"}
    for mask in (FRPMask(), RandomMask(0.75)):
        data, batch = _batch(mask)
        group = batch.views["global"]
        assert group.region_mask is None and (group.mask.sum(dim=2) == 27).all() and data.made()["global"].parts == {"mask"}
    with pytest.raises(ValueError, match="CRFRPMask needs region maps"):
        DataModule(FaceSwaps(), MultiCrop([ViewSpec(48, (0.6, 1.0))]), batch_size=4, mask=CRFRPMask())


def test_the_embedded_faces_have_splits_and_all_regions() -> None:
    source = LFWSubset(170, size=48)
    assert len(source) == 170 and source[165].values.shape == (3, 48, 48) and torch.equal(source[165].values, source[5].values)
    assert set(source[0].regions.unique().tolist()) == set(range(11))
    train, test = source.train_test_split()
    assert len(train) == 160 and len(test) == 40 and {test[index].label for index in range(40)} == {0, 1}
    seen = {tuple(train[index].values.flatten().tolist()) for index in range(160)}
    assert not any(tuple(test[index].values.flatten().tolist()) in seen for index in range(40))
    with pytest.raises(ValueError, match="LFWSubset: split is 'val'; expected 'faces' or 'train' or 'test'"):
        LFWSubset(split="val")


def test_swapped_faces_differ_inside_and_keep_the_rest() -> None:
    source = FaceSwaps(size=50, split="test")
    assert len(source) == 40 and source.classes == ("real", "fake")
    real, fake = source[6], source[7]
    changed = (real.values.float() - fake.values.float()).abs().amax(dim=0) > 0
    assert (real.label, fake.label) == (0, 1) and 0.1 < changed.float().mean() < 0.7
    assert not changed[:, :2].any() and not changed[-4:].any()
    with pytest.raises(ValueError, match="frames is 0; expected at least 16 pixels and 1 frame"):
        FaceSwaps(frames=0)


@pytest.mark.skipif(not FASSEG.is_dir(), reason=f"no real faces in {FASSEG}")
def test_real_maps_make_exact_masks() -> None:
    source = Faces(FASSEG / "train", regions="masks", table="fasseg")
    views = MultiCrop([ViewSpec(224, (0.5, 1.0))])
    data = DataModule(source, views, batch_size=8, mask=CRFRPMask(region_per="item"), cache=False)
    encoder = ViT("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3)
    batch = data.make_batch(data.raw_batch(range(0, len(source), 25), encoder=encoder, epoch=0), encoder=encoder)
    assert (batch.views["global"].mask.sum(dim=2) == 147).all() and batch.views["global"].region_mask.any(dim=2).float().mean() > 0.5
