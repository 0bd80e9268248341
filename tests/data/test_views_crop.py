"""Crops: their distribution, their pixels and the maps that move with them. torchvision is the judge."""

import math

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from glpretrain.core import keys as rng
from glpretrain.data.views.resample import crop, crop_nearest, random_boxes

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def images(*shape: int) -> torch.Tensor:
    """Values in [0, 1] with detail at every scale and no two items alike."""
    ramp = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(ramp**1.3)).reshape(shape).float()


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
    torch.testing.assert_close(x0 + x1, torch.ones(7))
    torch.testing.assert_close(y0 + y1, torch.ones(7))
    torch.testing.assert_close(aspect * (x1 - x0) / (y1 - y0), torch.full((7,), RATIO[0] if aspect < 1 else RATIO[1]))
    torch.testing.assert_close(torch.maximum(x1 - x0, y1 - y0), torch.ones(7))


def test_boxes_lie_in_the_unit_square():
    keys = rng.item_keys(seed=1, epoch=0, index=torch.arange(5000))
    boxes = random_boxes(keys, aspect=torch.linspace(0.3, 3.0, 5000), scale=(0.01, 1.0), ratio=RATIO, flip=0.5)
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    assert (boxes[:, 2:4] > boxes[:, :2]).all()


# left, top, width, height in pixels of a 37 x 41 item: inside, at the edges, tiny (enlarged) and all of it
PIXEL_BOXES = [(5, 3, 29, 31), (0, 0, 17, 37), (30, 25, 11, 12), (11, 7, 3, 2), (0, 0, 41, 37)]


def unit_boxes(flip: float) -> torch.Tensor:
    rows = [(x / 41, y / 37, (x + w) / 41, (y + h) / 37, flip) for x, y, w, h in PIXEL_BOXES]
    return torch.tensor(rows)


@pytest.mark.parametrize("size", [(13, 19), (48, 31)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crops_agree_with_torchvision_pixel_by_pixel(size, interpolation, flip):
    source = images(len(PIXEL_BOXES), 3, 37, 41)
    ours = crop(source, boxes=unit_boxes(flip), size=size, interpolation=interpolation)
    for item, view, (x, y, w, h) in zip(source, ours, PIXEL_BOXES, strict=True):
        theirs = F.resized_crop(item, y, x, h, w, list(size), InterpolationMode(interpolation), antialias=True)
        theirs = F.horizontal_flip(theirs) if flip else theirs
        torch.testing.assert_close(view, theirs, rtol=0, atol=1e-5)  # float32 sums in another order


def test_crops_of_bytes_agree_with_torchvision_to_one_level():
    # Theirs clamps between the two axes: where the first overshoots the range of a byte they differ, so stay away from its ends.
    source = (images(len(PIXEL_BOXES), 3, 37, 41) * 155 + 50).round().to(torch.uint8)
    ours = crop(source.float() / 255, boxes=unit_boxes(0.0), size=(23, 23), interpolation="bicubic")
    for item, view, (x, y, w, h) in zip(source, ours, PIXEL_BOXES, strict=True):
        theirs = F.resized_crop(item, y, x, h, w, [23, 23], InterpolationMode.BICUBIC, antialias=True)
        # Theirs rounds to whole levels after each axis (two halves), with fixed-point weights.
        assert (view * 255 - theirs).abs().max() <= 1.2


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_labels_are_cut_as_torchvision_cuts_them(flip):
    labels = torch.arange(len(PIXEL_BOXES) * 37 * 41).reshape(-1, 37, 41)
    ours = crop_nearest(labels, boxes=unit_boxes(flip), size=(13, 17))
    for item, view, (x, y, w, h) in zip(labels, ours, PIXEL_BOXES, strict=True):
        theirs = F.resized_crop(item[None].float(), y, x, h, w, [13, 17], InterpolationMode.NEAREST_EXACT)[0]
        theirs = F.horizontal_flip(theirs) if flip else theirs
        assert torch.equal(view, theirs.long())


def test_a_continuous_box_reads_what_lies_under_it():
    # A ramp is reproduced exactly by both kernels away from the edges, so each pixel tells where it was read.
    ramp = (torch.arange(64) + 0.5).div(64).expand(1, 2, 64, 64).contiguous()
    box = torch.tensor([[0.1234, 0.3, 0.8765, 0.7, 0.0]])
    for interpolation in ("bilinear", "bicubic"):
        view = crop(ramp, boxes=box, size=(11, 16), interpolation=interpolation)[0, 0, 5]
        expected = 0.1234 + (0.8765 - 0.1234) * (torch.arange(16) + 0.5) / 16
        torch.testing.assert_close(view[3:-3], expected[3:-3], rtol=0, atol=2e-4)  # sampled, a triangle is not quite symmetric
