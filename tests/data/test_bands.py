"""More than three channels: ranges of values, ten bands of fields, and what views make of them."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from image_files import write_image, write_map
from PIL import Image
from view_parts import views_of

from glpretrain.core import keys as rng
from glpretrain.data import Bands, ImageFolder, ImageList, MaskedFolder, UnreadableItemError
from glpretrain.data.sources.images.bands import BANDS, CLASSES
from glpretrain.data.views import MultiCrop, ViewSpec


def ramp(channels: int, *, high: float = 10_000) -> np.ndarray:
    """Float[7 11 C]."""
    return np.linspace(0, high, 7 * 11 * channels).reshape(7, 11, channels)


@pytest.mark.parametrize("kind", ["uint16", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("ending", ["npy", "tif"])
def test_a_range_makes_bytes_of_every_kind_of_number(kind: str, ending: str, tmp_path: Path) -> None:
    values = ramp(5).astype(kind)
    path = tmp_path / f"a.{ending}"
    if ending == "npy":
        np.save(path, values)
    else:
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
    found = ImageFolder(tmp_path, channels=5, value_range=[1000, 9000])[0].values
    expected = np.clip((values.astype(np.float64) - 1000) / 8000, 0, 1) * 255
    assert found.dtype == torch.uint8 and np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 0.501
    assert {int(found.min()), int(found.max())} == {0, 255}


def test_each_channel_may_have_a_range_and_holes_are_black(tmp_path: Path) -> None:
    values = np.full((4, 6, 3), 50.0, dtype=np.float32)
    values[0, 0], values[0, 1] = np.nan, np.inf
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=[(42113, 2, 0, "-9999", True)])
    found = ImageFolder(tmp_path, value_range=[[0, 100], [0, 50], [50, 100]])[0].values
    assert found[:, 2, 2].tolist() == [128, 255, 0] and not found[:, 0, :2].any()
    values[:, 3] = -9999
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=[(42113, 2, 0, "-9999", True)])
    assert not ImageFolder(tmp_path, value_range=[-20_000, 100])[0].values[:, :, 3].any()


def test_bands_in_pages_of_a_file_are_channels(tmp_path: Path) -> None:
    values = ramp(5).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values.transpose(2, 0, 1), photometric="minisblack")
    np.save(tmp_path / "b.npy", values)
    source = ImageFolder(tmp_path, channels=5, value_range=[0, 10_000])
    assert torch.equal(source[0].values, source[1].values) and source[0].values.float().mean() > 100
    plain = ImageFolder(tmp_path, channels=5)
    assert plain[1].values.max() == 10_000 >> 8  # nearly black: what a range is for
    assert source.stored(1) != plain.stored(1)


def test_lists_masks_and_grey_files_take_a_range_too(tmp_path: Path) -> None:
    Image.fromarray(ramp(1)[..., 0].astype(np.uint16)).save(tmp_path / "images.png")
    (tmp_path / "list.txt").write_text("images.png\n")
    found = ImageList(tmp_path / "list.txt", channels=1, value_range=[0, 10_000])[0].values
    assert (int(found.min()), int(found.max())) == (0, 255)
    (tmp_path / "set" / "images").mkdir(parents=True)
    np.save(tmp_path / "set" / "images" / "a.npy", ramp(4).astype(np.float32))
    write_map(tmp_path / "set" / "masks" / "a.png", np.ones((7, 11)))
    item = MaskedFolder(tmp_path / "set", channels=4, value_range=[0, 10_000])[0]
    assert item.values.shape == (4, 7, 11) and int(item.values.max()) == 255


def test_wrong_ranges_and_files_without_numbers_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.full((4, 6, 3), np.nan))
    np.save(tmp_path / "c.npy", np.zeros((4, 6, 3), dtype=np.complex64))
    np.save(tmp_path / "d.npy", np.zeros((4, 6, 3)))
    source = ImageFolder(tmp_path, value_range=[0, 1])
    reasons = (r"a\.png: 8 bits \(RGB\); a value_range is for", r"b\.npy: no pixel has a value", r"c\.npy: type complex64")
    for index, reason in enumerate(reasons):
        with pytest.raises(UnreadableItemError, match=reason):
            source[index]
    with pytest.raises(UnreadableItemError, match=r"d\.npy: type float64, expected uint8 or uint16, or a value_range"):
        ImageFolder(tmp_path)[3]
    for wrong in ([1], [1, 1], [0, float("nan")], [[0, 1]], [[0, 1], [0, 1], [1, 0]], [[0, 1], 3]):
        with pytest.raises(ValueError, match="ImageFolder: value_range is"):
            ImageFolder(tmp_path, value_range=wrong)


def test_a_picture_of_fields_depends_on_seed_split_and_index_alone() -> None:
    one, longer = Bands(11, size=32), Bands(1000, size=32)
    assert torch.equal(one[7].values, longer[7].values) and torch.equal(one[7].instances, longer[7].instances)
    others = [one[6], Bands(11, size=32, seed=1)[7], Bands(11, size=32, split="test")[7]]
    assert not any(torch.equal(one[7].values, other.values) for other in others)
    train, test = one.train_test_split()
    assert (len(train), len(test)) == (11, 1200) and torch.equal(train[3].values, one[3].values)
    with pytest.raises(IndexError):
        one[11]
    with pytest.raises(ValueError, match="size is 8"):
        Bands(3, size=8)


def test_fields_masks_and_labels_agree() -> None:
    items = [Bands(120, size=(40, 56))[index] for index in range(120)]
    assert {item.label for item in items} == set(range(len(CLASSES)))
    for item in items:
        assert item.values.shape == (len(BANDS), 40, 56) and item.values.dtype == torch.uint8
        assert torch.equal(item.semantic == 0, item.instances == 0)
        assert 0.01 < (item.semantic == 0).float().mean() < 0.4
        largest = item.instances[item.instances > 0].bincount().argmax()
        assert (item.semantic[item.instances == largest] == item.label + 1).all()


def test_some_land_covers_differ_in_the_infrared_only() -> None:
    items = [Bands(150, size=32)[index] for index in range(150)]
    pixels = torch.cat([item.values.flatten(1) for item in items], dim=1).float()
    cover = torch.cat([item.semantic.flatten() for item in items])
    needle, leaf = (pixels[:, cover == 1 + CLASSES.index(name)] for name in ("needle forest", "leaf forest"))
    gap = (needle.mean(dim=1) - leaf.mean(dim=1)).abs() / (needle.std(dim=1) + leaf.std(dim=1))
    assert gap[BANDS.index("B4")] < 0.3 < 1.0 < gap[BANDS.index("B8")]


def test_views_of_ten_bands_have_all_of_them_and_operations_on_colours_are_refused_by_name() -> None:
    images = torch.stack([Bands(5, size=32)[index].values for index in range(5)])
    given = {"images": images, "keys": rng.item_keys(seed=3, epoch=2, index=torch.arange(5)), "mean": (0.5,) * 10, "std": (0.5,) * 10}
    spec = {"size": 24, "scale": (0.4, 1.0), "brightness": 0.4, "contrast": 0.4, "blur_prob": 0.5, "solarize_prob": 0.2}
    views = views_of(MultiCrop([ViewSpec(**spec)]), **given).groups["global"].items
    assert views.shape == (1, 5, 10, 24, 24) and views.isfinite().all()
    assert (views.flatten(3).std(dim=3) > 0).all() and not torch.equal(views[:, :, 2], views[:, :, 6])
    with pytest.raises(ValueError, match=r"views: hue=0\.1 needs RGB items, but these have 10 channels; set hue to 0"):
        views_of(MultiCrop([ViewSpec(**spec, hue=0.1)]), **given)
