"""The whole multi-crop: what it returns, that a sample's views depend on its key alone, and what it refuses."""

import dataclasses
import math

import pytest
import torch
from operations import made_of_fakes
from view_parts import card_of, frames_of, items_of, views_of

from glpretrain.core import keys as rng
from glpretrain.data.views import MultiCrop, ViewSpec

COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale_prob": 0.2}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
B = 11


def dino(size: int | tuple[int, int] = 24) -> MultiCrop:
    return MultiCrop(
        [
            ViewSpec(size, (0.4, 1.0), blur_prob=1.0, **COLOURS),
            ViewSpec(size, (0.4, 1.0), blur_prob=0.1, solarize_prob=0.2, **COLOURS),
        ],
        [ViewSpec(16, (0.05, 0.4), count=3, blur_prob=0.5, **COLOURS)],
    )


def inputs(channels: int = 3) -> dict:
    ramp = torch.arange(B * channels * 32 * 32, dtype=torch.float64)
    source = (127.5 + 127.5 * torch.sin(ramp**1.2)).round().to(torch.uint8).reshape(B, channels, 32, 32)
    return {
        "images": source,
        "keys": rng.item_keys(seed=3, epoch=2, index=torch.arange(B)),
    }


def plain(size: int = 24, **settings) -> ViewSpec:
    return ViewSpec(size, (0.2, 1.0), **settings)


def test_shapes_and_types_of_the_views():
    views = views_of(dino((24, 40)), **inputs(), mean=MEAN, std=STD, regions=torch.zeros(B, 32, 32, dtype=torch.int64))
    assert views.groups["global"].items.shape == (2, B, 3, 24, 40)
    assert views.groups["local"].items.shape == (3, B, 3, 16, 16)
    assert views.regions.shape == (2, B, 24, 40)
    assert views.regions.dtype == torch.int64
    assert frames_of(views).shape == (5, B, 2, 3)
    assert views.groups["global"].items.dtype == views.groups["local"].items.dtype == frames_of(views).dtype == torch.float32
    assert dino().groups(3) == {"global": (2, (3, 24, 24)), "local": (3, (3, 16, 16))}


def test_clean_views_show_the_places_of_the_global_ones_with_their_own_colours():
    """In another size, flipped and turned alike; at the global size they are what global views without colours are."""
    settings = {"scale": (0.2, 0.8), "count": 2, "turn_prob": 0.75}
    coloured, plain_specs = [ViewSpec(24, blur_prob=1.0, **settings, **COLOURS)], [ViewSpec(24, **settings)]
    large, same = (views_of(MultiCrop(coloured, clean_size=size), **inputs(), mean=MEAN, std=STD).groups for size in (48, 24))
    without = views_of(MultiCrop(coloured), **inputs(), mean=MEAN, std=STD).groups
    expected = views_of(MultiCrop(plain_specs), **inputs(), mean=MEAN, std=STD).groups["global"]
    assert large["clean"].items.shape == (2, B, 3, 48, 48) and same["clean"].items.shape == (2, B, 3, 24, 24)
    assert torch.equal(large["clean"].frame, without["global"].frame) and torch.equal(same["clean"].items, expected.items)
    for groups in (large, same):  # the others stay as they are
        torch.testing.assert_close(groups["global"].items, without["global"].items, rtol=0, atol=2e-5)
    shrunk = torch.nn.functional.avg_pool2d(large["clean"].items.flatten(0, 1), 2).unflatten(0, (2, B))
    assert (shrunk - expected.items).square().mean() < 0.05 * expected.items.square().mean()


def test_clean_views_keep_pictures_large_enough():
    assert MultiCrop([plain()], clean_size=48).ample_side() == 2 * MultiCrop([plain()]).ample_side()


def test_without_locals_and_regions_there_are_none():
    views = views_of(MultiCrop([plain(count=2)]), **inputs(), mean=MEAN, std=STD)
    assert "local" not in views.groups
    assert views.regions is None
    assert frames_of(views).shape == (2, B, 2, 3)


def test_views_of_a_sample_do_not_depend_on_its_batch():
    batch = inputs()
    whole = views_of(dino(), **batch, mean=MEAN, std=STD)
    for i in range(B):
        alone = views_of(dino(), **{name: value[i : i + 1] for name, value in batch.items()}, mean=MEAN, std=STD)
        torch.testing.assert_close(frames_of(alone), frames_of(whole)[:, i : i + 1], rtol=0, atol=0)
        # A matrix product may add in another order for another batch size; divided by std that is 5e-7 of a level.
        torch.testing.assert_close(alone.groups["global"].items, whole.groups["global"].items[:, i : i + 1], rtol=0, atol=2e-5)
        torch.testing.assert_close(alone.groups["local"].items, whole.groups["local"].items[:, i : i + 1], rtol=0, atol=2e-5)


def test_same_keys_give_the_same_views_and_other_keys_others():
    batch = inputs()
    first = views_of(dino(), **batch, mean=MEAN, std=STD)
    torch.manual_seed(5)  # the global generator has no say
    again = views_of(dino(), **batch, mean=MEAN, std=STD)
    assert torch.equal(first.groups["global"].items, again.groups["global"].items)
    assert torch.equal(first.groups["local"].items, again.groups["local"].items)
    other = views_of(dino(), **{**batch, "keys": batch["keys"] + 1}, mean=MEAN, std=STD)
    assert not (frames_of(first)[..., 2] == frames_of(other)[..., 2]).flatten(2).any(2).all()


def test_no_two_views_of_an_item_are_alike():
    views = views_of(MultiCrop([plain(count=3)], [plain(16, count=2)]), **inputs(), mean=MEAN, std=STD)
    for i in range(B):
        assert len({tuple(frame) for frame in frames_of(views)[:, i].flatten(1).tolist()}) == 5


def test_adding_a_view_leaves_the_others_as_they_were():
    batch = inputs()
    small = views_of(MultiCrop([plain(count=2)], [plain(16)]), **batch, mean=MEAN, std=STD)
    large = views_of(MultiCrop([plain(count=3)], [plain(16), plain(16)]), **batch, mean=MEAN, std=STD)
    assert torch.equal(small.groups["global"].items, large.groups["global"].items[:2])
    assert torch.equal(small.groups["local"].items, large.groups["local"].items[:1])


def test_equal_views_are_the_same_written_once_or_twice():
    batch = inputs()
    counted = views_of(MultiCrop([plain(count=2, **COLOURS)]), **batch, mean=MEAN, std=STD)
    written = views_of(MultiCrop([plain(**COLOURS), plain(**COLOURS)]), **batch, mean=MEAN, std=STD)
    torch.testing.assert_close(
        counted.groups["global"].items, written.groups["global"].items, rtol=0, atol=2e-5
    )  # as for another batch size
    assert torch.equal(frames_of(counted), frames_of(written))


def test_each_view_has_its_own_settings():
    batch = inputs()
    alike = views_of(MultiCrop([plain(), plain()]), **batch, mean=(0.5,) * 3, std=(1.0,) * 3)
    unlike = views_of(MultiCrop([plain(), plain(solarize_prob=1.0, solarize_threshold=0.0)]), **batch, mean=(0.5,) * 3, std=(1.0,) * 3)
    assert torch.equal(alike.groups["global"].items[0], unlike.groups["global"].items[0])
    torch.testing.assert_close(alike.groups["global"].items[1], -unlike.groups["global"].items[1])  # 1 - x about a mean of one half


def test_regions_move_with_the_image():
    # The image is a picture of its region map: large squares, each of one value.
    cells = (torch.arange(32).div(8, rounding_mode="floor")[:, None] * 4 + torch.arange(32).div(8, rounding_mode="floor")) * 16
    regions = cells.expand(B, 32, 32).contiguous()
    batch = {**inputs(), "images": regions.unsqueeze(1).expand(-1, 3, -1, -1).to(torch.uint8)}
    crops = MultiCrop([plain(64, count=2, interpolation="bilinear")])
    views = views_of(crops, **batch, mean=(0.0,) * 3, std=(1 / 255,) * 3, regions=regions)
    same = (views.groups["global"].items[:, :, 0] - views.regions).abs() < 0.5
    assert same.float().mean() > 0.75  # pixels at the edges of the squares are blends
    row, column = 20, 50
    place = torch.tensor([(row + 0.5) / 64, (column + 0.5) / 64])
    for view, frame in zip(views.regions.flatten(0, 1), frames_of(views).flatten(0, 1), strict=True):
        y, x = (frame[:, :2] @ place + frame[:, 2]).tolist()
        assert view[row, column] == (math.floor(y * 4) * 4 + math.floor(x * 4)) * 16


def test_normalisation_is_per_channel():
    batch = {**inputs(), "images": torch.tensor([51, 102, 153], dtype=torch.uint8).view(1, 3, 1, 1).expand(B, 3, 32, 32)}
    views = views_of(MultiCrop([plain()]), **batch, mean=(0.2, 0.2, 0.2), std=(1.0, 0.5, 0.25))
    torch.testing.assert_close(views.groups["global"].items.mean(dim=(0, 1, 3, 4)), torch.tensor([0.0, 0.4, 1.6]), rtol=0, atol=1e-5)


def test_autocast_does_not_reach_the_views():
    batch = inputs()
    outside = views_of(dino(), **batch, mean=MEAN, std=STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = views_of(dino(), **batch, mean=MEAN, std=STD)
    assert torch.equal(outside.groups["global"].items, inside.groups["global"].items)


def test_nothing_waits_for_the_device():
    # A fake tensor has no values: whatever asks for one, or for a shape that depends on one, raises.
    batch, card = inputs(), card_of(MEAN, STD)
    parts = dino().prepare(items_of(batch["images"], torch.zeros(B, 32, 32, dtype=torch.int64)), keys=batch["keys"], card=card)
    views, _ = made_of_fakes(dino(), parts, keys=batch["keys"], card=card)
    assert views.groups["local"].items.shape == (3, B, 3, 16, 16) and views.groups["local"].items.device.type == "cuda"


@pytest.mark.parametrize("at_once", [1, 3, 4 * B])
def test_a_cpu_gives_the_same_views_however_many_it_changes_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch):
    crops, batch = dino(), inputs()
    whole = views_of(crops, **batch, mean=MEAN, std=STD)
    monkeypatch.setattr("glpretrain.data.views.multicrop._BLOCK_BYTES", at_once * 4 * 3 * 24 * 24)
    parts = views_of(crops, **batch, mean=MEAN, std=STD)
    for name, group in whole.groups.items():
        torch.testing.assert_close(parts.groups[name].items, group.items, rtol=0, atol=2e-5)  # as for another batch size


def test_groups_of_one_size_are_made_together_and_are_what_they_are_alone():
    batch = inputs()
    together = views_of(MultiCrop([plain(**COLOURS)], [plain(count=2, **COLOURS)]), **batch, mean=MEAN, std=STD)
    apart = views_of(MultiCrop([plain(**COLOURS)], [plain(16, count=2, **COLOURS)]), **batch, mean=MEAN, std=STD)
    torch.testing.assert_close(together.groups["global"].items, apart.groups["global"].items, rtol=0, atol=2e-5)
    assert torch.equal(together.groups["local"].frame, apart.groups["local"].frame)


def test_other_channels_are_refused_only_where_rgb_is_needed():
    batch = inputs(channels=5)
    with pytest.raises(ValueError, match=r"saturation=0\.2 needs RGB items, but these have 5 channels; set saturation to 0"):
        views_of(dino(), **batch, mean=(0.5,) * 5, std=(0.2,) * 5)
    views = views_of(MultiCrop([plain(brightness=0.4, contrast=0.4, blur_prob=0.5)]), **batch, mean=(0.5,) * 5, std=(0.2,) * 5)
    assert views.groups["global"].items.shape == (1, B, 5, 24, 24)


def test_wrong_statistics_and_regions_are_refused():
    with pytest.raises(ValueError, match="std has 2 numbers, but the items have 3 channels"):
        views_of(dino(), **inputs(), mean=MEAN, std=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"regions are \(16, 16\), but the item is \(32, 32\)"):
        views_of(dino(), **inputs(), mean=MEAN, std=STD, regions=torch.zeros(B, 16, 16, dtype=torch.int64))


def test_views_that_cannot_be_stacked_are_refused():
    with pytest.raises(ValueError, match=r"local_views have sizes \[\(16, 16\), \(24, 24\)\]"):
        MultiCrop([plain()], [plain(16), plain(24)])
    with pytest.raises(ValueError, match="global_views is empty"):
        MultiCrop([])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("size", (16,)),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.2)),
        ("ratio", (-1.0, 1.0)),
        ("count", 0),
        ("flip", 1.5),
        ("brightness", -0.1),
        ("hue", 0.6),
        ("jitter_prob", -0.5),
        ("grayscale_prob", 2.0),
        ("blur_prob", 2.0),
        ("blur_sigma", (0.0, 1.0)),
        ("solarize_prob", 2.0),
        ("solarize_threshold", 128.0),
        ("interpolation", "nearest"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"ViewSpec: {field} "):
        dataclasses.replace(plain(), **{field: value})
