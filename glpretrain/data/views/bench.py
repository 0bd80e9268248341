"""The time of a multi-crop, in a worker and on the device, beside torchvision's and kornia's on the same pictures.

Each way makes the views of a recipe with its own draws: a crop, a flip, and the colour operations with their probabilities. It is given
decoded pictures, and gives normalised views. Left out: the table, which the command line prints, and the decoding of files; quarter turns
and stains, which only we make.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from kornia import augmentation as kornia
from kornia.constants import Resample
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from glpretrain.core import keys as rng
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.views.changes import Changes
from glpretrain.data.views.multicrop import MultiCrop
from glpretrain.data.views.spec import ViewSpec

_WORKER, _DEVICE, _OURS = "ours, in a worker", "ours, on the device", "ours"
TENSORS, PILLOW, KORNIA = "torchvision v2, tensors", "torchvision v2, PIL", "kornia"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Cost(NamedTuple):
    """What a way to make the views, or one operation of ours, takes for an item."""

    name: str
    milliseconds: float  # median


def _blur_taps(spec: ViewSpec) -> int:
    taps = 2 * math.ceil(3 * spec.blur_sigma[1]) + 1 if spec.blur_taps is None else spec.blur_taps
    return min(taps, 2 * ((min(spec.shape) - 1) // 2) + 1)


def _torchvision_view(spec: ViewSpec) -> v2.Transform:
    """One view of a picture, UInt8[3 H W] or of PIL, as the authors of DINO put it together."""
    mode = InterpolationMode(spec.interpolation)
    crop = [v2.RandomResizedCrop(spec.shape, scale=spec.scale, ratio=spec.ratio, interpolation=mode), v2.RandomHorizontalFlip(spec.flip)]
    colours: list[torch.nn.Module] = []
    if max(spec.brightness, spec.contrast, spec.saturation, spec.hue) > 0:
        jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
        colours.append(v2.RandomApply([jitter], p=spec.jitter_prob))
    if spec.grayscale_prob > 0:
        colours.append(v2.RandomGrayscale(spec.grayscale_prob))
    if spec.blur_prob > 0:
        colours.append(v2.RandomApply([v2.GaussianBlur(_blur_taps(spec), spec.blur_sigma)], p=spec.blur_prob))
    if spec.solarize_prob > 0:
        colours.append(v2.RandomSolarize(255 * spec.solarize_threshold, p=spec.solarize_prob))
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    weak = v2.Compose([*crop, *colours, *last])
    if spec.strong is not None:
        operations = v2.RandAugment(spec.strong.num_ops, round(spec.strong.magnitude), num_magnitude_bins=11)
        strong = v2.Compose([operations, *crop, *last, v2.RandomErasing(spec.strong.erase_prob)])
        weak = v2.RandomChoice([weak, strong], p=[1.0 - spec.strong.prob, spec.strong.prob])
    return v2.Compose([weak, v2.Normalize(_MEAN, _STD)])


def _kornia_view(spec: ViewSpec) -> kornia.AugmentationSequential:
    """One view of Float[B 3 H W] in [0, 1]."""
    resample = Resample.BICUBIC if spec.interpolation == "bicubic" else Resample.BILINEAR
    steps: list[kornia.AugmentationBase2D] = [
        kornia.RandomResizedCrop(spec.shape, scale=spec.scale, ratio=spec.ratio, resample=resample),
        kornia.RandomHorizontalFlip(p=spec.flip),
    ]
    if max(spec.brightness, spec.contrast, spec.saturation, spec.hue) > 0:
        steps.append(kornia.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter_prob))
    if spec.grayscale_prob > 0:
        steps.append(kornia.RandomGrayscale(p=spec.grayscale_prob))
    if spec.blur_prob > 0:
        steps.append(kornia.RandomGaussianBlur(_blur_taps(spec), spec.blur_sigma, p=spec.blur_prob))
    if spec.solarize_prob > 0:
        steps.append(kornia.RandomSolarize((spec.solarize_threshold, spec.solarize_threshold), (0.0, 0.0), p=spec.solarize_prob))
    return kornia.AugmentationSequential(*steps, kornia.Normalize(torch.tensor(_MEAN), torch.tensor(_STD)))


def _pictures(count: int, size: tuple[int, int]) -> list[Tensor]:
    """UInt8[3 H W] with texture, whose channels lie last in memory, as decoders give them."""
    H, W = size
    rows, columns = torch.arange(H).view(-1, 1, 1), torch.arange(W).view(1, -1, 1)
    colour = torch.arange(3) + 1.0
    waves = [torch.sin(0.05 * columns * colour + number) + torch.sin(0.07 * rows + 0.001 * rows * columns) for number in range(count)]
    return [(127.5 + 63.0 * wave).to(torch.uint8).permute(2, 0, 1) for wave in waves]


def _milliseconds(action: Callable[[], object], *, device: torch.device) -> float:
    """With one thread on a CPU it is the processor's time, in which other programs do not count."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    action()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1e3 * (clock() - start)


def _medians(ways: Mapping[str, Callable[[], object]], *, count: int, device: torch.device, repeats: int) -> list[Cost]:
    """Milliseconds of each for one of `count` items: the ways take turns, and the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, action in ways.items():
            times[name].append(_milliseconds(action, device=device))
    return [Cost(name, statistics.median(taken[1:]) / count) for name, taken in times.items()]


class ViewBench:
    """Times ways to make the views of a batch of RGB pictures.

    Args:
        multicrop: the views to make.
        batch_size: number of items.
        image_size: height and width of the items.
        device: device on which we and kornia make views; a worker and torchvision work on the CPU.
        repeats: number of repetitions of every measurement, of which the median is taken.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(
        self,
        multicrop: MultiCrop,
        *,
        batch_size: int,
        image_size: tuple[int, int],
        device: str | torch.device = "cpu",
        repeats: int = 10,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("image_size", min(image_size)), ("repeats", repeats)):
            if value < 1:
                raise ValueError(f"bench views: {name} is {value}; expected at least 1")
        self.multicrop = multicrop
        self.device = torch.device(device)
        self.repeats = repeats
        self.pictures = _pictures(batch_size, image_size)
        self._card = EncoderCard("bench", {}, "image", (3, *multicrop.global_views[0].shape), (1, 1), 1, _MEAN, _STD)
        self._keys = rng.item_keys(seed=0, epoch=0, index=torch.arange(batch_size))
        self._specs = [spec for kind in multicrop.kinds() for spec in kind.specs]

    def _prepared(self) -> tuple[dict[str, Tensor], dict[str, Changes]]:
        items = [Item(picture, -1, None, None) for picture in self.pictures]
        return self.multicrop.prepare(items, keys=self._keys, card=self._card), self.multicrop.draw(self._keys)

    def _on_device(self) -> tuple[dict[str, Tensor], dict[str, Changes]]:
        parts, changes = self._prepared()
        return {name: part.to(self.device) for name, part in parts.items()}, {name: one.to(self.device) for name, one in changes.items()}

    @torch.no_grad()
    def ways(self) -> list[Cost]:
        """Ours, in a worker and on the device, and then others': milliseconds for all views of one item."""
        parts, changes = self._on_device()
        keys = self._keys.to(self.device)
        views = [_torchvision_view(spec) for spec in self._specs]
        batched = [_kornia_view(spec).to(self.device) for spec in self._specs]
        pillow = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in self.pictures]

        def theirs(pictures: Sequence[Tensor | Image.Image]) -> list[Tensor]:
            return [torch.stack([view(picture) for picture in pictures]) for view in views]

        def by_kornia() -> list[Tensor]:
            whole = torch.stack(self.pictures).to(self.device).float().div_(255.0)
            return [view(whole) for view in batched]

        ways: dict[str, Callable[[], object]] = {
            _WORKER: self._prepared,
            _DEVICE: partial(self.multicrop.make, parts, changes=changes, keys=keys, card=self._card),
            TENSORS: partial(theirs, self.pictures),
            PILLOW: partial(theirs, pillow),
        }
        if all(spec.strong is None for spec in self._specs):  # kornia's RandAugment makes the same choice for a whole batch
            ways[KORNIA] = by_kornia
        worker, device, *others = _medians(ways, count=len(self.pictures), device=self.device, repeats=self.repeats)
        return [worker, device, Cost(_OURS, worker.milliseconds + device.milliseconds), *others]

    @torch.no_grad()
    def operations(self) -> list[Cost]:
        """The device's milliseconds for an item with no operation, so that views are normalised alone, and with each operation alone."""
        parts, changes = self._on_device()
        keys = self._keys.to(self.device)

        def with_one(operation: str) -> Callable[[], object]:
            only = {name: Changes.of([one for one in own.unpacked() if one.operation == operation]) for name, own in changes.items()}
            moved = {name: one.to(self.device) for name, one in only.items()}
            return partial(self.multicrop.make, parts, changes=moved, keys=keys, card=self._card)

        names = dict.fromkeys(one.operation for own in changes.values() for one in own.unpacked())
        ways = {name: with_one(name) for name in ("none", *names)}
        return _medians(ways, count=len(self.pictures), device=self.device, repeats=self.repeats)
