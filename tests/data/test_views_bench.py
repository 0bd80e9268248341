"""The benchmark of views: one row per operation that is on, and their shares of the whole."""

import pytest

from glpretrain.data.views import MultiCrop, Strong, ViewSpec
from glpretrain.data.views.bench import bench_views


def test_every_operation_that_is_on_has_a_row():
    first, second = ViewSpec(16, (0.5, 1.0), brightness=0.4, hue=0.1), ViewSpec(16, (0.5, 1.0), blur_prob=0.5)
    views = MultiCrop([first, second], [ViewSpec(8, (0.1, 0.4))])
    rows = bench_views(batch_size=3, image_size=20, multicrop=views, repeats=1)
    names = ["crop, resize, flip", "brightness", "hue", "jitter (all, in random order)", "blur", "everything"]
    assert [row.operation for row in rows] == names
    whole = rows[-1].milliseconds
    for row in rows:
        assert row.milliseconds > 0
        assert row.torchvision_milliseconds > 0
        assert row.share == row.milliseconds / whole


def test_a_view_that_is_strong_by_chance_adds_its_operations():
    strong = ViewSpec(16, (0.5, 1.0), brightness=0.4, strong=Strong())
    rows = bench_views(batch_size=5, image_size=20, multicrop=MultiCrop([ViewSpec(16, (0.5, 1.0))], None, [strong]), repeats=1)
    names = ["crop, resize, flip", "brightness", "jitter (all, in random order)", "RandAugment", "erasing", "everything"]
    assert [row.operation for row in rows] == names
    assert all(row.milliseconds > 0 and row.torchvision_milliseconds > 0 for row in rows)


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="bench views: repeats is 0; expected at least 1"):
        bench_views(batch_size=2, image_size=20, multicrop=MultiCrop([ViewSpec(16, (0.5, 1.0))]), repeats=0)
