"""The benchmark of views: which ways and operations have a row, whose time a row is, and that all make the same views."""

from itertools import count

import pytest
import torch

from glpretrain.data.views import MultiCrop, Strong, ViewSpec, bench
from glpretrain.data.views.bench import KORNIA, PILLOW, TENSORS, ViewBench

COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale_prob": 0.2, "solarize_prob": 0.2}


def views_bench(*, strong: Strong | None = None) -> ViewBench:
    first = ViewSpec(16, (0.5, 1.0), blur_prob=0.5, strong=strong, **COLOURS)
    views = MultiCrop([first, ViewSpec(16, (0.5, 1.0))], [ViewSpec((8, 12), (0.1, 0.4), count=2, interpolation="bilinear")])
    return ViewBench(views, batch_size=3, image_size=(40, 56), repeats=2)


@pytest.mark.parametrize(("threads", "clock"), [(1, "process_time"), (2, "perf_counter")])
def test_every_way_has_a_row_and_ours_is_a_worker_and_the_device_together(
    threads: int, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr(f"glpretrain.data.views.bench.time.{clock}", lambda: next(ticks))
    monkeypatch.setattr("glpretrain.data.views.bench.torch.get_num_threads", lambda: threads)
    found = views_bench().ways()
    assert [one.name for one in found] == ["ours, in a worker", "ours, on the device", "ours", TENSORS, PILLOW, KORNIA]
    # Every measurement takes one second, for three items.
    assert [one.milliseconds for one in found] == pytest.approx([1000 / 3, 1000 / 3, 2000 / 3, *[1000 / 3] * 3])


def test_kornia_has_no_row_where_items_are_augmented_strongly() -> None:
    names = [one.name for one in views_bench(strong=Strong(prob=0.5)).ways()]
    assert PILLOW in names and KORNIA not in names


def test_the_operations_are_those_that_views_drew() -> None:
    names = {one.name for one in views_bench().operations()}
    assert {"none", "blend", "hue"} <= names <= {"none", "blend", "hue", "blur", "solarize"}


@pytest.mark.parametrize("name", ["_torchvision_view", "_kornia_view"])
def test_the_others_make_the_views_that_the_recipe_asks_for(name: str) -> None:
    """What a flat picture becomes says which operations were on; its size and scale say how it was cut and normalised."""
    flat = torch.full((3, 40, 56), 51, dtype=torch.uint8)
    made = {}
    for operation, settings in {"none": {}, "solarize": {"solarize_prob": 1.0, "solarize_threshold": 0.1}}.items():
        view = getattr(bench, name)(ViewSpec((8, 12), (0.5, 1.0), **settings))
        given = flat if name == "_torchvision_view" else flat[None].float() / 255
        made[operation] = view(given).view(3, 8, 12)
    for operation, value in (("none", 0.2), ("solarize", 0.8)):
        expected = (value - torch.tensor(bench._MEAN)) / torch.tensor(bench._STD)
        torch.testing.assert_close(made[operation].mean(dim=(1, 2)), expected, rtol=0, atol=1e-4)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="bench views: repeats is 0; expected at least 1"):
        ViewBench(MultiCrop([ViewSpec(16, (0.5, 1.0))]), batch_size=2, image_size=(20, 20), repeats=0)
