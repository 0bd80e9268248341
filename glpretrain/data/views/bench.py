"""The time of each operation of a multi-crop on the device, compared with torchvision's functions called for each image.

Left out: the table, which the command line prints, and the work of the data loading processes.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from glpretrain.core import keys as rng
from glpretrain.data.views.colour import augment
from glpretrain.data.views.erasing import erase
from glpretrain.data.views.multicrop import MultiCrop
from glpretrain.data.views.randaugment import apply_where, rand_augment
from glpretrain.data.views.resample import crop, random_boxes
from glpretrain.data.views.spec import ViewSpec

_REFERENCE_IMAGES = 8  # number of images on which torchvision is timed; its time is proportional to their number
_CROP, _RAND_AUGMENT, _ERASING = "crop, resize, flip", "RandAugment", "erasing"
_PARTS_OF_JITTER = ("brightness", "contrast", "saturation", "hue")


class Cost(NamedTuple):
    """The time of one operation for all views of a batch that may have it."""

    operation: str
    milliseconds: float  # median on the device
    share: float  # share of the time of the whole multi-crop
    torchvision_milliseconds: float  # image by image on the CPU, for the expected number of images that the operation changes


def _variants(spec: ViewSpec) -> dict[str, ViewSpec]:
    """The same view with only one colour operation, for each operation that is on."""
    jitter = {"brightness": spec.brightness, "contrast": spec.contrast, "saturation": spec.saturation, "hue": spec.hue}
    others = {"grayscale_prob": spec.grayscale_prob, "blur_prob": spec.blur_prob, "solarize_prob": spec.solarize_prob}
    bare = replace(spec, **dict.fromkeys((*jitter, *others), 0.0))
    variants = {name: replace(bare, **{name: value}) for name, value in jitter.items()}
    variants["jitter (all, in random order)"] = replace(bare, **jitter)
    variants |= {name.removesuffix("_prob"): replace(bare, **{name: value}) for name, value in others.items()}
    return {name: variant for name, variant in variants.items() if variant != bare}


def _cut(items: Tensor, *, spec: ViewSpec, keys: Tensor, aspect: Tensor) -> Tensor:
    """Float[(V B) C h w]: the crops of the multi-crop for keys Int[V B]."""
    source = items.to(torch.float32) / 255.0
    boxes = random_boxes(keys, aspect=aspect, scale=spec.scale, ratio=spec.ratio, flip=spec.flip)
    return torch.cat([crop(source, boxes=box, size=spec.shape, interpolation=spec.interpolation) for box in boxes]).clamp_(0.0, 1.0)


def _rand_augmented(items: Tensor, *, spec: ViewSpec, keys: Tensor, strong: Tensor, aspect: Tensor) -> None:
    """RandAugment of whole items for each view of keys Int[V B]; in Bool[V B] are the items that are augmented strongly."""
    assert spec.strong is not None
    source = items.to(torch.float32) / 255.0
    for key, selected in zip(keys, strong, strict=True):
        rand_augment(source, keys=key, selected=selected, aspect=aspect, flipped=key % 2 == 0, strong=spec.strong, mean=(0.5,) * 3)


def _torchvision_cut(image: Tensor, *, spec: ViewSpec) -> Tensor:
    """UInt8[C h w], a crop of average area."""
    side = max(1, round(image.shape[-1] * math.sqrt(sum(spec.scale) / 2)))
    return F.resized_crop(image, 0, 0, side, side, list(spec.shape), InterpolationMode(spec.interpolation), antialias=True)


def _torchvision_colour(image: Tensor, *, spec: ViewSpec) -> Tensor:
    """UInt8[C h w] with every operation that is on, at a medium strength."""
    if spec.brightness > 0:
        image = F.adjust_brightness(image, 1.0 + spec.brightness / 2)
    if spec.contrast > 0:
        image = F.adjust_contrast(image, 1.0 + spec.contrast / 2)
    if spec.saturation > 0:
        image = F.adjust_saturation(image, 1.0 + spec.saturation / 2)
    if spec.hue > 0:
        image = F.adjust_hue(image, spec.hue / 2)
    if spec.grayscale_prob > 0:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if spec.blur_prob > 0:
        radius = min(math.ceil(3 * spec.blur_sigma[1]), min(spec.shape) - 1)
        image = F.gaussian_blur(image, [2 * radius + 1] * 2, [sum(spec.blur_sigma) / 2] * 2)
    if spec.solarize_prob > 0:
        image = F.solarize(image, 255 * spec.solarize_threshold)
    return image


def _median_milliseconds(action: Callable[[], object], *, device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up and is not counted
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        action()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def _torchvision_milliseconds(action: Callable[[Tensor], object], *, images: Tensor, repeats: int) -> float:
    """Median time for one image."""

    def run() -> None:
        for image in images:
            action(image)

    return _median_milliseconds(run, device=torch.device("cpu"), repeats=repeats) / len(images)


@torch.no_grad()
def bench_views(
    *, batch_size: int, image_size: int, multicrop: MultiCrop, device: str | torch.device = "cpu", repeats: int = 10
) -> list[Cost]:
    """Time each operation alone and the multi-crop as a whole, on RGB items with texture.

    Args:
        batch_size: number of items B.
        image_size: height and width of the items.
        multicrop: the views to make.
        device: device on which the views are made.
        repeats: number of repetitions of every measurement, of which the median is taken.

    Returns:
        One row per operation, then "everything". The rows do not add up to it, because an operation that runs alone is not affected by
        the others, and because the operations of the jitter are also in its row as a whole. Where views are augmented strongly with some
        probability, each operation is timed on its share of the items.

    Raises:
        ValueError: a number is below 1.
    """
    for name, value in (("batch_size", batch_size), ("image_size", image_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"bench views: {name} is {value}; expected at least 1")
    device = torch.device(device)
    ramp = torch.arange(batch_size * 3 * image_size * image_size, dtype=torch.float64)
    items = (127.5 + 127.5 * torch.sin(ramp**1.2)).to(torch.uint8).reshape(batch_size, 3, image_size, image_size)
    few = items[:_REFERENCE_IMAGES]
    items = items.to(device)
    aspect = torch.ones(batch_size, device=device)
    keys = rng.item_keys(seed=0, epoch=0, index=torch.arange(batch_size, device=device))

    ours: defaultdict[str, float] = defaultdict(float)
    theirs: defaultdict[str, float] = defaultdict(float)
    for spec in (*multicrop.global_views, *multicrop.local_views, *multicrop.student_views):
        assert isinstance(spec, ViewSpec)
        view_keys = torch.stack([rng.fold_in(keys, number) for number in range(spec.count)])  # [V B]
        cut = partial(_cut, items, spec=spec, keys=view_keys, aspect=aspect)
        ours[_CROP] += _median_milliseconds(cut, device=device, repeats=repeats)
        theirs[_CROP] += view_keys.numel() * _torchvision_milliseconds(partial(_torchvision_cut, spec=spec), images=few, repeats=repeats)
        views = cut()
        prob = 0.0 if spec.strong is None else spec.strong.prob
        strong = rng.uniform(view_keys) < prob  # [V B]
        small = torch.stack([_torchvision_cut(image, spec=spec) for image in few])
        for name, variant in _variants(spec).items():
            colours = partial(augment, views, spec=variant, keys=view_keys.flatten())
            if spec.strong is not None:
                change, per_item = partial(augment, spec=variant), {"keys": view_keys.flatten()}
                colours = partial(apply_where, views, where=~strong.flatten(), change=change, per_item=per_item)
            ours[name] += _median_milliseconds(colours, device=device, repeats=repeats)
            share = max(variant.grayscale_prob, variant.blur_prob, variant.solarize_prob) or variant.jitter_prob
            per_image = _torchvision_milliseconds(partial(_torchvision_colour, spec=variant), images=small, repeats=repeats)
            theirs[name] += (1.0 - prob) * share * view_keys.numel() * per_image
        if spec.strong is not None:
            magnitude = round(spec.strong.magnitude)
            references = {
                _RAND_AUGMENT: (v2.RandAugment(spec.strong.num_ops, magnitude, num_magnitude_bins=11), few, spec.strong.op_prob),
                _ERASING: (v2.RandomErasing(1.0), small, spec.strong.erase_prob),
            }
            for name, (action, images, share) in references.items():
                per_image = _torchvision_milliseconds(action, images=images, repeats=repeats)
                theirs[name] += prob * share * view_keys.numel() * per_image
            whole_items = partial(_rand_augmented, items, spec=spec, keys=view_keys, strong=strong, aspect=aspect)
            ours[_RAND_AUGMENT] += _median_milliseconds(whole_items, device=device, repeats=repeats)
            erased = partial(erase, views, keys=view_keys.flatten(), selected=strong.flatten(), prob=spec.strong.erase_prob)
            ours[_ERASING] += _median_milliseconds(erased, device=device, repeats=repeats)

    whole = partial(multicrop, items, aspect=aspect, keys=keys, mean=(0.5,) * 3, std=(0.25,) * 3)
    total = _median_milliseconds(whole, device=device, repeats=repeats)
    rows = [Cost(name, value, value / total, theirs[name]) for name, value in ours.items()]
    return [*rows, Cost("everything", total, 1.0, sum(theirs[name] for name in theirs if name not in _PARTS_OF_JITTER))]
