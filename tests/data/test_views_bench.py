"""The benchmark of views: one row per operation that is on, the work that each row stands for, and the shares of the whole."""

from itertools import count

import pytest

from glpretrain.data.views import MultiCrop, Strong, ViewSpec
from glpretrain.data.views.bench import Cost, bench_views


def rows(monkeypatch: pytest.MonkeyPatch, *, batch_size: int, multicrop: MultiCrop) -> dict[str, Cost]:
    """Rows by operation, for a clock on which every measurement takes one second."""
    ticks = count()
    monkeypatch.setattr("glpretrain.data.views.bench.time.perf_counter", lambda: next(ticks))
    return {row.operation: row for row in bench_views(batch_size=batch_size, image_size=(20, 28), multicrop=multicrop, repeats=2)}


def test_every_operation_that_is_on_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ViewSpec(16, (0.5, 1.0), brightness=0.4, hue=0.1, jitter_prob=0.5)
    views = MultiCrop([first, ViewSpec(16, (0.5, 1.0), blur_prob=0.25)], [ViewSpec(8, (0.1, 0.4), count=2)])
    found = rows(monkeypatch, batch_size=3, multicrop=views)
    names = ["in a worker: crops", "brightness", "hue", "jitter (all, in random order)", "blur", "everything on the device"]
    assert list(found) == names
    # One measurement for all crops, and one for each kind of views that an operation changes.
    assert [found[name].milliseconds for name in names] == [1000] * 6
    assert [found[name].share for name in names] == [1] * 6
    # Three images take torchvision one second. There are 4 views of them to crop; half of one and a quarter of another change colour.
    assert [found[name].torchvision_milliseconds for name in names] == pytest.approx([4000, 500, 500, 500, 250, 500 + 250])


def test_a_view_that_is_strong_by_chance_adds_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    strong = ViewSpec(16, (0.5, 1.0), brightness=0.4, strong=Strong(prob=0.25, op_prob=0.5, erase_prob=0.5))
    found = rows(monkeypatch, batch_size=5, multicrop=MultiCrop([ViewSpec(16, (0.5, 1.0))], None, [strong]))
    names = ["in a worker: crops", "brightness", "jitter (all, in random order)", "erasing", "everything on the device"]
    assert list(found) == names
    assert [found[name].milliseconds for name in names] == [1000] * 5
    # Of the five items of the strong view, three quarters are jittered with probability 0.8, and a quarter is augmented or erased.
    expected = [2000 + 0.25 * 0.5 * 1000, 0.75 * 0.8 * 1000, 0.75 * 0.8 * 1000, 0.25 * 0.5 * 1000]
    assert [found[name].torchvision_milliseconds for name in names[:-1]] == pytest.approx(expected)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="bench views: repeats is 0; expected at least 1"):
        bench_views(batch_size=2, image_size=(20, 20), multicrop=MultiCrop([ViewSpec(16, (0.5, 1.0))]), repeats=0)
