"""The time of each operation of a multi-crop, in a worker and on the device, compared with torchvision's functions for each image.

Left out: the table, which the command line prints, and the decoding of files.
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
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.views.colour import augment
from glpretrain.data.views.erasing import erase
from glpretrain.data.views.multicrop import MultiCrop
from glpretrain.data.views.randaugment import apply_where
from glpretrain.data.views.spec import ViewSpec

_REFERENCE_IMAGES = 8  # number of images on which torchvision is timed; its time is proportional to their number
_WORKER, _ERASING = "in a worker: crops", "erasing"
_PARTS_OF_JITTER = ("brightness", "contrast", "saturation", "hue")


class Cost(NamedTuple):
    """The time of one operation for all views of a batch that may have it."""

    operation: str
    milliseconds: float  # median, in a worker or on the device
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


def _torchvision_cut(image: Tensor, *, spec: ViewSpec) -> Tensor:
    """UInt8[C h w], a crop of average area."""
    height, width = (max(1, round(side * math.sqrt(sum(spec.scale) / 2))) for side in image.shape[1:])
    return F.resized_crop(image, 0, 0, height, width, list(spec.shape), InterpolationMode(spec.interpolation), antialias=True)


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
    *, batch_size: int, image_size: tuple[int, int], multicrop: MultiCrop, device: str | torch.device = "cpu", repeats: int = 10
) -> list[Cost]:
    """Time what a worker does, each operation on the device alone, and all of them, on RGB items with texture.

    Args:
        batch_size: number of items B.
        image_size: height and width of the items.
        multicrop: the views to make.
        device: device on which the views are made.
        repeats: number of repetitions of every measurement, of which the median is taken.

    Returns:
        One row for a worker, whose crops include RandAugment of the items that get it; one row per operation on the device, and
        "everything" on the device, of which the shares are taken. The rows do not add up to it, because an operation that runs alone is not
        affected by the others, and because the operations of the jitter are also in its row as a whole. Where views are augmented strongly
        with some probability, each operation is timed on its share of the items.

    Raises:
        ValueError: a number is below 1.
    """
    for name, value in (("batch_size", batch_size), ("image_size", min(image_size)), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"bench views: {name} is {value}; expected at least 1")
    device = torch.device(device)
    shape = (batch_size, 3, *image_size)
    items = (127.5 + 127.5 * torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) ** 1.2)).to(torch.uint8).reshape(shape)
    few = items[:_REFERENCE_IMAGES]
    card = EncoderCard("bench", {}, "image", (3, *multicrop.global_views[0].shape), (1, 1), 1, (0.5,) * 3, (0.25,) * 3)
    keys = rng.item_keys(seed=0, epoch=0, index=torch.arange(batch_size))

    prepare = partial(multicrop.prepare, [Item(image, -1, None, None) for image in items], keys=keys, card=card)
    worker = _median_milliseconds(prepare, device=torch.device("cpu"), repeats=repeats)
    parts, keys = {name: part.to(device) for name, part in prepare().items()}, keys.to(device)

    ours: defaultdict[str, float] = defaultdict(float)
    theirs: defaultdict[str, float] = defaultdict(float)
    for kind in multicrop.kinds():
        crops = parts[kind.name].transpose(0, 1)  # [V B C h w]
        first = 0
        for spec, view_keys in kind.keyed(keys):
            views = crops[first : first + spec.count].flatten(0, 1).float().div_(255.0)  # [(v B) C h w]
            first += spec.count
            in_worker = view_keys.numel() * _torchvision_milliseconds(partial(_torchvision_cut, spec=spec), images=few, repeats=repeats)
            prob = 0.0 if spec.strong is None else spec.strong.prob
            strong = kind.strong(keys, view_keys, spec=spec).flatten()
            small = torch.stack([_torchvision_cut(image, spec=spec) for image in few])
            for name, variant in _variants(spec).items():
                colours = partial(augment, views, spec=variant, keys=view_keys.flatten())
                if spec.strong is not None:
                    change, per_item = partial(augment, spec=variant), {"keys": view_keys.flatten()}
                    colours = partial(apply_where, views, where=~strong, change=change, per_item=per_item)
                ours[name] += _median_milliseconds(colours, device=device, repeats=repeats)
                share = max(variant.grayscale_prob, variant.blur_prob, variant.solarize_prob) or variant.jitter_prob
                per_image = _torchvision_milliseconds(partial(_torchvision_colour, spec=variant), images=small, repeats=repeats)
                theirs[name] += (1.0 - prob) * share * view_keys.numel() * per_image
            if spec.strong is not None:
                action = v2.RandAugment(spec.strong.num_ops, round(spec.strong.magnitude), num_magnitude_bins=11)
                per_image = _torchvision_milliseconds(action, images=few, repeats=repeats)
                in_worker += prob * spec.strong.op_prob * view_keys.numel() * per_image
                per_image = _torchvision_milliseconds(v2.RandomErasing(1.0), images=small, repeats=repeats)
                theirs[_ERASING] += prob * spec.strong.erase_prob * view_keys.numel() * per_image
                erased = partial(erase, views, keys=view_keys.flatten(), selected=strong, prob=spec.strong.erase_prob)
                ours[_ERASING] += _median_milliseconds(erased, device=device, repeats=repeats)
            theirs[_WORKER] += in_worker

    total = _median_milliseconds(partial(multicrop.make, parts, keys=keys, card=card), device=device, repeats=repeats)
    rows = [Cost(name, value, value / total, theirs[name]) for name, value in ours.items()]
    on_device = sum(theirs[name] for name in ours if name not in _PARTS_OF_JITTER)
    return [Cost(_WORKER, worker, worker / total, theirs[_WORKER]), *rows, Cost("everything on the device", total, 1.0, on_device)]
