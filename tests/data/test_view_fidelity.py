"""How much of a photograph reaches a view, and what it costs: `pytest -s` prints the table of docs/measurements.md.

Three ways are compared. `before`: workers stretched pictures to a square of 256 pixels, from which the device cut views. `device`: pictures
of their own size go to the device, which multiplies them with a matrix for each axis of each view (only the products are timed). `now`:
workers cut. torchvision's crops of the original, with the same boxes, are the judge.
"""

import ctypes
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from view_parts import box_of, card_of

from glpretrain.core import keys as rng
from glpretrain.data import ImageFolder
from glpretrain.data.views import MultiCrop, ViewSpec

SHARED = Path(__file__).parents[2] / "../shared/data"
CARD = card_of((0.0,) * 3, (1.0,) * 3)
KINDS = {
    "224, 0.25 to 1": ViewSpec(224, (0.25, 1.0)),
    "96, 0.05 to 0.25": ViewSpec(96, (0.05, 0.25)),
    "224, 0.2 to 1": ViewSpec(224, (0.2, 1.0)),
}
DINO = MultiCrop([ViewSpec(224, (0.25, 1.0), count=2)], [ViewSpec(96, (0.05, 0.25), count=8)])
SMALL = MultiCrop([ViewSpec(48, (0.4, 1.0), count=2)], [ViewSpec(24, (0.1, 0.6), count=2)])


def photographs(width: int, height: int) -> list[Image.Image]:
    """Photographs of this size with their own detail: a part of a larger one, or mirrored tiles of a smaller one."""
    made = []
    for pixels in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket()):
        more = [(0, max(0, size - length)) for size, length in zip((height, width), pixels.shape, strict=False)]
        made.append(Image.fromarray(np.pad(pixels, (*more, (0, 0)), mode="symmetric")[:height, :width]))
    return made


class Fidelity(NamedTuple):
    mean: float  # levels of 255
    largest: float
    energy: float  # of gradients, as a share of torchvision's


def energy(view: Tensor) -> float:
    view = view.double()
    return float((view.diff(dim=-1) ** 2).mean() + (view.diff(dim=-2) ** 2).mean())


def fidelity(views: Sequence[Tensor], expected: Sequence[Tensor]) -> Fidelity:
    off = [(view.double() - other.double()).abs() for view, other in zip(views, expected, strict=True)]
    share = sum(map(energy, views)) / sum(map(energy, expected))
    return Fidelity(float(np.mean([one.mean() for one in off])), max(float(one.max()) for one in off), share)


def squashed(original: Tensor, box: Sequence[float], size: tuple[int, int], interpolation: str) -> Tensor:
    """The view as it was before: from a square of 256 pixels, by a box in the unit square."""
    square = interpolate(original[None], size=(256, 256), mode="bilinear", antialias=True)[0]
    x0, y0, x1, y1 = (256 * place for place in box)
    left, top, right, bottom = int(x0), int(y0), int(np.ceil(x1)), int(np.ceil(y1))
    mode = Image.Resampling[interpolation.upper()]
    planes = [Image.fromarray(plane[top:bottom, left:right].float().numpy()) for plane in square]
    inner = (x0 - left, y0 - top, x1 - left, y1 - top)
    return torch.stack([torch.from_numpy(np.array(plane.resize(size[::-1], mode, box=inner))) for plane in planes]).clamp(0, 255)


def compare(source: ImageFolder, originals: Sequence[Tensor], spec: ViewSpec, *, epochs: int) -> dict[str, Fidelity]:
    crops = MultiCrop([dataclasses.replace(spec, flip=0.0)])
    now, before, expected = [], [], []
    size = "{}x{}".format(*spec.shape)
    for index, original in enumerate(originals):
        item = crops.read(source, index)
        for epoch in range(epochs):
            parts = crops.prepare([item], keys=rng.item_keys(seed=0, epoch=epoch, index=torch.tensor([index])), card=CARD)
            box = torch.tensor(box_of(parts[f"frames_{size}"][0, 0]), dtype=torch.float64)
            height, width = original.shape[1:]
            left, top, right, bottom = (box * torch.tensor([width, height, width, height])).round().int().tolist()
            mode = InterpolationMode(spec.interpolation)
            cut = F.resized_crop(original, top, left, bottom - top, right - left, list(spec.shape), mode, antialias=True)
            expected.append(cut)
            now.append(parts[f"crops_{size}"][0, 0])
            before.append(squashed(original, box.tolist(), spec.shape, spec.interpolation))
    return {"before": fidelity(before, expected), "now": fidelity(now, expected)}


def written(folder: Path, pictures: Sequence[Image.Image], *, ending: str) -> tuple[ImageFolder, list[Tensor]]:
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:03}.{ending}", **({"quality": 92} if ending == "jpg" else {}))
    originals = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in sorted(folder.iterdir())]
    return ImageFolder(folder), originals


def real(name: str, pattern: str) -> list[Image.Image]:
    paths = sorted((SHARED / name).glob(pattern))
    return [Image.open(path).convert("RGB") for path in paths[:: max(1, len(paths) // 6)][:6]]


@pytest.mark.slow
def test_views_keep_the_detail_of_photographs(tmp_path: Path) -> None:
    sets = {
        "500x375": photographs(500, 375),
        "4000x3000": photographs(4000, 3000),
        "CamVid": real("segmentation_camvid", "val/images/*"),
        "DAVIS": real("segmentation_davis2016val", "JPEGImages/**/00000.jpg"),
    }
    print("\n| photographs | view | before: energy, mean, max | now: energy, mean, max |\n|---|---|---|---|")
    for name, pictures in sets.items():
        if not pictures:
            print(f"| {name} | not in {SHARED} | | |")
            continue
        source, originals = written(tmp_path / name, pictures, ending="jpg")
        for kind, spec in KINDS.items():
            found = compare(source, originals, spec, epochs=2 if name == "4000x3000" else 6)
            shown = [f"{one.energy:.3f}, {one.mean:.2f}, {one.largest:.0f}" for one in (found["before"], found["now"])]
            print(f"| {name} | {kind} | {shown[0]} | {shown[1]} |")
            assert found["now"].mean <= 0.5 and found["now"].largest <= 1 and abs(found["now"].energy - 1) <= 0.02
            assert found["before"].energy < 0.97  # or these photographs have no detail that can be lost


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_views_of_pictures_that_are_reduced_first_keep_it_too(ending: str, tmp_path: Path) -> None:
    """Small views of large pictures: a JPEG is decoded at a quarter here. Half a level on average; the largest difference is larger."""
    source, originals = written(tmp_path / "large", photographs(2000, 1500), ending=ending)
    assert DINO.read(source, 0).values.shape == (3, 1500, 2000) and SMALL.read(source, 0).values.shape == (3, 375, 500)
    print("\n| file | view | now: energy, mean, max |\n|---|---|---|")
    for spec in (SMALL.global_views[0], SMALL.local_views[0]):
        for interpolation in ("bilinear", "bicubic"):
            smaller = ViewSpec(spec.size, spec.scale, interpolation=interpolation)
            found = compare(source, originals, smaller, epochs=6)["now"]
            print(f"| {ending} | {spec.size}, {spec.scale} {interpolation} | {found.energy:.3f}, {found.mean:.2f}, {found.largest:.0f} |")
            assert found.mean <= 0.5 and abs(found.energy - 1) <= 0.025


def timed(action: Callable[[], object], *, repeats: int = 3) -> tuple[float, float]:
    """Median of this process's milliseconds, and the largest number of megabytes by which it grew."""
    action()
    times, grown = [], []
    for _ in range(repeats):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = memory("VmRSS"), time.process_time()
        action()
        times.append(1e3 * (time.process_time() - start))
        grown.append(memory("VmHWM") - before)
    return float(np.median(times)), max(grown)


def memory(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


@pytest.mark.slow
def test_what_each_way_costs(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    count = 4
    keys = rng.item_keys(seed=0, epoch=0, index=torch.arange(count))
    print("\n| photographs | way | MB moved per item | worker: ms per item, MB | device: ms per item, MB |\n|---|---|---|---|---|")
    for name in ("500x375", "4000x3000"):
        width, height = map(int, name.split("x"))
        source, originals = written(tmp_path / name, photographs(width, height)[1:2], ending="jpg")

        def cut(source: ImageFolder = source) -> dict[str, Tensor]:
            return DINO.prepare([DINO.read(source, 0) for _ in range(count)], keys=keys, card=CARD)

        def stretch(source: ImageFolder = source) -> Tensor:
            pictures = (source[0].values[None] for _ in range(count))
            return torch.cat([interpolate(picture, size=(256, 256), mode="bilinear", antialias=True) for picture in pictures])

        def products(pictures: Tensor) -> None:
            for picture in pictures:
                source = picture.float() / 255
                for size in (224, 224, *[96] * 8):
                    rows, columns = torch.ones(size, source.shape[1]), torch.ones(source.shape[2], size)
                    torch.matmul(rows, torch.matmul(source, columns))

        parts, squares, whole = cut(), stretch(), originals[0].expand(count, -1, -1, -1)
        moved = {"now": sum(part.nbytes for part in parts.values()), "before": squares.nbytes, "device": whole.numel()}
        workers = {"now": cut, "before": stretch, "device": lambda source=source: [source[0] for _ in range(count)]}
        devices = {
            "now": lambda parts=parts: DINO.make(parts, changes=DINO.draw(keys), keys=keys, card=CARD),
            "before": lambda pictures=squares: products(pictures),
            "device": lambda pictures=whole: products(pictures),
        }
        for way in ("before", "device", "now"):
            (worker, held), (device, used) = timed(workers[way]), timed(devices[way])
            millions = moved[way] / count / 1e6
            print(f"| {name} | {way} | {millions:.2f} | {worker / count:.1f}, {held:.0f} | {device / count:.1f}, {used:.0f} |")
        assert moved["now"] / count < 0.53e6  # whatever the size of the picture
