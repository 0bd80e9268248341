"""Tissue: a pure function of the index, disjoint parts, masks and classes that agree, and no download."""

import socket

import pytest
import torch
from skimage.data import immunohistochemistry

from glpretrain.data import Tissue, TissueSlides
from glpretrain.data.sources.images.tissue import CLASSES, _photo


def test_a_tile_depends_on_seed_split_and_index_alone() -> None:
    one, longer = Tissue(11, size=32), Tissue(1000, size=32)
    assert torch.equal(one[7].values, longer[7].values) and torch.equal(one[7].instances, longer[7].instances)
    others = [one[6], Tissue(11, size=32, seed=1)[7], Tissue(11, size=32, split="test")[7]]
    assert not any(torch.equal(one[7].values, other.values) for other in others)
    with pytest.raises(IndexError):
        one[11]


def test_splits_of_the_photograph_share_no_column_and_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *args, **options: pytest.fail("the network was used"))
    _photo.cache_clear()
    train, test = (_photo(split).image for split in ("train", "test"))
    whole = torch.from_numpy(immunohistochemistry()).permute(2, 0, 1)
    assert train.shape[2] + test.shape[2] < whole.shape[2]
    assert torch.equal(train, whole[:, :, : train.shape[2]]) and torch.equal(test, whole[:, :, -test.shape[2] :])


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_say_how_much_of_a_tile_is_gland(split: str) -> None:
    items = [Tissue(150, size=64, split=split)[index] for index in range(150)]
    assert {item.label for item in items} == set(range(len(CLASSES)))
    for item in items:
        share = item.semantic.float().mean().item()
        assert (item.label == 0) == (share < 0.15) and (item.label == 2) == (share > 0.75)
        assert item.values.shape == (3, 64, 64) and item.values.dtype == torch.uint8
        assert item.instances.shape == (64, 64) and (item.semantic[item.instances > 0] == 1).all()


def test_both_splits_have_all_classes_and_glands_are_brown() -> None:
    train, test = Tissue(5000).train_test_split()
    assert (len(train), len(test)) == (2400, 1200) and train.classes == test.classes == CLASSES
    items = [test[index] for index in range(60)]
    pixels = torch.cat([item.values.flatten(1) for item in items], dim=1).float()
    gland = torch.cat([item.semantic.flatten() for item in items]) == 1
    red_over_blue = pixels[0] - pixels[2]
    assert red_over_blue[gland].mean() > 60 and red_over_blue[~gland].mean() < 20


@pytest.mark.parametrize(
    ("settings", "message"), [({"length": 0}, "length is 0"), ({"size": 8}, "size is 8"), ({"split": "val"}, "split is 'val'")]
)
def test_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tissue(**({"length": 3} | settings))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_slide_has_one_class_and_shows_gland_in_so_many_tiles(split: str) -> None:
    slides = TissueSlides(40, tiles=8, glands=2, split=split)
    assert len(set(slides.groups)) == 5 and slides.groups[7] == "slide 0" and slides.groups[8] == "slide 1"
    for index in range(40):
        item, share = slides[index], slides[index].semantic.float().mean().item()
        of_slide, place = divmod(index, 8)
        assert item.label == slides.label_of(index) == of_slide % 2
        assert (share > 0.75) if item.label == 1 and place < 2 else (share < 0.15)
    assert torch.equal(slides[9].values, TissueSlides(400, tiles=8, glands=2, split=split)[9].values)


def test_slides_refuse_more_glands_than_tiles() -> None:
    with pytest.raises(ValueError, match="glands is 9; expected 1 to tiles, which is 8"):
        TissueSlides(16, tiles=8, glands=9)
