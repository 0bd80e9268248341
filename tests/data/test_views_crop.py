"""Crops: their distribution, their pixels and the maps that move with them. torchvision is the judge."""

import math

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from view_parts import card_of, flips, frames_of, items_of, views_of

from glpretrain.core import keys as rng
from glpretrain.data import Item, Source, Subset
from glpretrain.data.views import MultiCrop, ViewSpec
from glpretrain.data.views.resample import crop, crop_labels, pixel_boxes, random_boxes, reduced, reduction

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def picture(height: int, width: int, *, channels: int = 3, last: bool = False) -> torch.Tensor:
    """UInt8[C H W] with detail at every scale; with the channels last in memory, as decoders leave them."""
    ramp = torch.arange(channels * height * width, dtype=torch.float64)
    made = (127.5 + 127.5 * torch.sin(ramp**1.3)).round().to(torch.uint8).view(channels, height, width)
    return made.permute(1, 2, 0).contiguous().permute(2, 0, 1) if last else made


def torchvision_boxes(height: int, width: int, count: int) -> torch.Tensor:
    torch.manual_seed(0)  # the reference draws from the global generator
    item = torch.empty(3, height, width)
    top, left, h, w = torch.tensor([RandomResizedCrop.get_params(item, list(SCALE), list(RATIO)) for _ in range(count)]).double().unbind(1)
    return torch.stack((left / width, top / height, (left + w) / width, (top + h) / height), dim=1)


def measures(boxes: torch.Tensor, *, aspect: float) -> dict[str, torch.Tensor]:
    x0, y0, x1, y1 = boxes.double().unbind(1)
    return {
        "area": (x1 - x0) * (y1 - y0),
        "ratio": aspect * (x1 - x0) / (y1 - y0),
        "centre x": x0 + x1,
        "centre y": y0 + y1,
    }


@pytest.mark.parametrize(("height", "width"), [(2000, 2000), (1500, 2250), (2400, 800)])
def test_boxes_are_distributed_as_torchvision_draws_them(height, width):
    aspect = width / height
    theirs = measures(torchvision_boxes(height, width, 3000), aspect=aspect)
    keys = rng.item_keys(seed=0, epoch=0, index=torch.arange(3000))
    boxes = random_boxes(keys, aspect=torch.full((3000,), aspect), scale=SCALE, ratio=RATIO, flip=0.3)
    for name, value in measures(boxes[:, :4], aspect=aspect).items():
        # Both on a grid of 1/500, coarser than their pixels: else their rounding spreads what is one value for us, such as the
        # centre of a crop of the full height. 1e-3: twelve comparisons, each a fixed draw.
        assert ks_2samp(value.mul(500).round(), theirs[name].mul(500).round()).pvalue > 1e-3, name
    assert abs(boxes[:, 4].mean().item() - 0.3) < 0.03  # 3.6 standard deviations of a mean of 3000


@pytest.mark.parametrize("aspect", [0.02, 50.0])
def test_an_item_that_no_crop_fits_is_cut_in_its_centre(aspect):
    keys = rng.item_keys(seed=0, epoch=0, index=torch.arange(7))
    boxes = random_boxes(keys, aspect=torch.full((7,), aspect), scale=(0.9, 1.0), ratio=RATIO, flip=0.0)
    x0, y0, x1, y1, _ = boxes.unbind(1)
    ones = torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(x0 + x1, ones)
    torch.testing.assert_close(y0 + y1, ones)
    torch.testing.assert_close(aspect * (x1 - x0) / (y1 - y0), ones * (RATIO[0] if aspect < 1 else RATIO[1]))
    torch.testing.assert_close(torch.maximum(x1 - x0, y1 - y0), ones)


def test_boxes_lie_in_the_unit_square():
    keys = rng.item_keys(seed=1, epoch=0, index=torch.arange(5000))
    boxes = random_boxes(keys, aspect=torch.linspace(0.3, 3.0, 5000), scale=(0.01, 1.0), ratio=RATIO, flip=0.5)
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    assert (boxes[:, 2:4] > boxes[:, :2]).all()


# left, top, right, bottom in pixels of a 37 x 41 picture: inside, at the edges, tiny (enlarged) and all of it
PIXEL_BOXES = [(5, 3, 34, 34), (0, 0, 17, 37), (30, 25, 41, 37), (11, 7, 14, 9), (0, 0, 41, 37)]


@pytest.mark.parametrize("size", [(13, 19), (48, 31)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("channels", "last"), [(3, False), (3, True), (1, False), (5, False)])
def test_a_crop_is_torchvisions_bit_for_bit(size, interpolation, channels, last):
    source = picture(37, 41, channels=channels, last=last)
    for left, top, right, bottom in PIXEL_BOXES:
        ours = crop(source, box=(left, top, right, bottom), size=size, interpolation=interpolation)
        mode = InterpolationMode(interpolation)
        assert torch.equal(ours, F.resized_crop(source, top, left, bottom - top, right - left, list(size), mode, antialias=True))


def test_labels_are_cut_as_torchvision_cuts_them():
    labels = torch.arange(37 * 41).reshape(37, 41)
    for left, top, right, bottom in PIXEL_BOXES:
        ours = crop_labels(labels, box=(left, top, right, bottom), size=(13, 17))
        mode = InterpolationMode.NEAREST_EXACT
        theirs = F.resized_crop(labels[None].float(), top, left, bottom - top, right - left, [13, 17], mode)[0]
        assert torch.equal(ours, theirs.long())


def test_boxes_have_whole_pixels_inside_the_picture_and_the_rounded_size():
    sizes = torch.tensor([[1, 1], [7, 3], [64, 64], [500, 375]])  # width, height
    keys = rng.item_keys(seed=0, epoch=0, index=torch.arange(4 * 300)).view(300, 4)
    boxes = random_boxes(keys, aspect=sizes[:, 0] / sizes[:, 1], scale=(0.001, 1.0), ratio=(0.2, 5.0), flip=0.0)[..., :4]
    pixels = pixel_boxes(boxes, sizes=sizes)
    corner, opposite = pixels[..., :2], pixels[..., 2:]
    assert (corner >= 0).all() and (opposite > corner).all() and (opposite <= sizes).all()
    extent = (boxes[..., 2:] - boxes[..., :2]) * sizes
    assert torch.equal(opposite - corner, extent.round().long().clamp_min(1))
    off = (pixels - boxes * sizes.repeat(1, 2)).abs()
    assert off[(extent >= 0.5).all(dim=-1)].max() <= 1.0  # half a pixel for the corner, and half for the size


def test_views_are_torchvisions_crops_of_pictures_of_any_size_in_any_batch():
    """The frame says which pixels a view shows; torchvision cuts the same from the original."""
    pictures = [picture(48, 64), picture(75, 50, last=True), picture(64, 64)]
    crops = MultiCrop([ViewSpec(24, (0.3, 1.0), count=2)], [ViewSpec(16, (0.05, 0.3), count=3, interpolation="bilinear")])
    statistics = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    keys = rng.item_keys(seed=1, epoch=4, index=torch.arange(3))
    views = views_of(crops, images=pictures, keys=keys, **statistics)
    for name, interpolation in (("global", "bicubic"), ("local", "bilinear")):
        group = views.groups[name]
        for number, source in enumerate(pictures):
            alone = views_of(crops, images=[source], keys=keys[number : number + 1], **statistics).groups[name]
            assert torch.equal(alone.items[:, 0], group.items[:, number]) and torch.equal(alone.frame[:, 0], group.frame[:, number])
            for view, frame in zip(group.items[:, number], group.frame[:, number], strict=True):
                (height, _, top), (_, width, left) = (frame * torch.tensor(source.shape[1:]).view(2, 1)).round().long().tolist()
                left, width = (left + width, -width) if width < 0 else (left, width)
                size = list(view.shape[1:])
                theirs = F.resized_crop(source, top, left, height, width, size, InterpolationMode(interpolation), antialias=True)
                theirs = F.horizontal_flip(theirs) if flips(frame) else theirs
                assert torch.equal((view * 255).round().to(torch.uint8), theirs)


class Large(Source):
    """One picture, or its lower half as a decoder gives it."""

    name = "large"

    def __init__(self, values: torch.Tensor, *, by_decoder: bool = False, regions: torch.Tensor | None = None) -> None:
        self.values, self.by_decoder, self.regions = values, by_decoder, regions

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Item:
        return Item(self.values, -1, None, self.regions)

    def reduced(self, index: int, *, side: int) -> Item:
        item = self[index]
        return item._replace(values=reduced(item.values, factor=2)) if self.by_decoder and min(self.values.shape[1:]) >= 2 * side else item


def test_a_picture_is_reduced_only_where_every_crop_is_shrunk_by_four_nevertheless():
    crops = MultiCrop([ViewSpec(8, (0.25, 1.0))], [ViewSpec((4, 6), (0.0625, 0.25), ratio=(1.0, 1.0))])
    side = crops.ample_side()
    assert side == math.ceil(4 * 6 * 4)  # the local crop is narrowest: a quarter of the side for 6 pixels; the global needs 8 / 0.5 * 1.15
    assert [reduction(height, 1000, side=side) for height in (95, 191, 192, 383, 384, 999)] == [1, 1, 2, 2, 4, 8]
    source = picture(195, 260)
    kept = crops.read(Large(source), 0)
    assert torch.equal(kept.values, reduced(source, factor=2)) and kept.values.shape == (3, 97, 130)
    assert torch.equal(crops.read(Subset(Large(source, by_decoder=True), indices=[0]), 0).values, kept.values)
    assert torch.equal(crops.read(Large(source[:, :191]), 0).values, source[:, :191])
    regions = torch.zeros(195, 260, dtype=torch.int64)
    assert torch.equal(crops.read(Large(source, regions=regions), 0).values, source)  # places in the two must agree


def test_reducing_first_costs_little():
    """A picture with detail of every length down to two pixels."""
    ramp = torch.arange(512, dtype=torch.float64)
    waves = sum(torch.sin(ramp[:, None] * 2 * math.pi / length + ramp * math.pi / length) for length in (2.2, 3, 5, 9, 17, 40))
    source = (127.5 + 20 * waves).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    half = reduced(source, factor=2)
    for interpolation in ("bilinear", "bicubic"):
        once = crop(source, box=(64, 32, 448, 416), size=(48, 48), interpolation=interpolation).double()
        twice = crop(half, box=(32, 16, 224, 208), size=(48, 48), interpolation=interpolation).double()
        energies = [(view.diff(dim=1) ** 2).mean() + (view.diff(dim=2) ** 2).mean() for view in (once, twice)]
        assert (once - twice).abs().mean() <= 0.5 and abs(energies[1] / energies[0] - 1) <= 0.02


def test_a_worker_and_another_cut_the_same():
    """On the CPU and from keys alone; what is sent to the device is bytes of the size of the views, whatever the picture's."""
    crops = MultiCrop([ViewSpec(24, (0.3, 1.0), count=2)], [ViewSpec(16, (0.05, 0.3), count=3)])
    keys = rng.item_keys(seed=1, epoch=4, index=torch.arange(2))
    parts = crops.prepare(items_of([picture(48, 64), picture(90, 70)]), keys=keys, card=card_of((0.5,) * 3, (0.5,) * 3))
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        "crops_24x24": (torch.uint8, (2, 2, 3, 24, 24)),
        "frames_24x24": (torch.float32, (2, 2, 2, 3)),
        "crops_16x16": (torch.uint8, (2, 3, 3, 16, 16)),
        "frames_16x16": (torch.float32, (2, 3, 2, 3)),
    }
    made = crops.make(parts, changes=crops.draw(keys), keys=keys, card=card_of((0.5,) * 3, (0.5,) * 3))
    assert frames_of(made).shape == (5, 2, 2, 3)
