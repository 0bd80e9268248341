"""Items of any size on their way to the device: kept in memory or read again, several at once or not, with the keys of their epoch."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.data import Item, Source, UnreadableItemError, items
from glpretrain.data.items import Asked, Items, RawItems

SIZES = [(5, 7), (11, 3), (4, 4)]


class Mixed(Source):
    """Pictures of three sizes; every second one has its channels last in memory. Item 6 cannot be read."""

    name = "mixed"

    def __init__(self, *, regions: bool = False, length: int = 20) -> None:
        self.regions, self.length = regions, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        if index == 6:
            raise UnreadableItemError("mixed/6.jpg: truncated")
        height, width = SIZES[index % 3]
        values = (torch.arange(3 * height * width) * (index + 1)).to(torch.uint8).view(3, height, width)
        if index % 2:
            values = values.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        regions = torch.arange(height * width, dtype=torch.int16).view(height, width) if self.regions else None
        return Item(values, 7, None, regions)


def held(source: Source) -> Items:
    return Items(source, read=lambda source, index: source[index])


def sums(given: Sequence[Item], *, keys: Tensor) -> dict[str, Tensor]:
    """A number per item, and what it was given beside."""
    return {
        "sum": torch.stack([item.values.sum() for item in given]),
        "keys": keys,
        "together": torch.full((len(given),), len(given)),
    }


@pytest.mark.parametrize("regions", [False, True])
def test_items_of_several_sizes_are_kept_as_they_are(regions: bool) -> None:
    source, kept = Mixed(regions=regions), held(Mixed(regions=regions))
    assert kept.keep_in_memory(num_workers=0, show=False, most_bytes=1e9) == [(6, "mixed/6.jpg: truncated")]
    for index in range(20):
        item, position = kept.item(index, [])
        expected = source[index if index != 6 else 7]
        assert position == (index if index != 6 else 7)
        assert torch.equal(item.values, expected.values) and item.values.stride() == expected.values.stride()
        assert (item.regions is None) == (not regions) and (not regions or torch.equal(item.regions, expected.regions))


@pytest.mark.parametrize("together", [1, 1 << 20])
def test_a_batch_tells_how_long_it_took_to_read_and_to_prepare(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def taken(seconds: float, value: object) -> object:
        nonlocal now
        now += seconds
        return value

    monkeypatch.setattr(items, "_TOGETHER", together)
    monkeypatch.setattr(items.time, "perf_counter", lambda: now)
    read = Items(Mixed(), read=lambda source, index: taken(1.0, source[index]))
    raw = RawItems(
        read,
        prepare=lambda given, keys: taken(16.0 * len(given), sums(given, keys=keys)),
        draw=lambda keys: taken(256.0, {}),
        seed=5,
    )
    batch = raw[Asked(0, [0, 6, 2])]
    assert (batch.read_seconds, batch.prepare_seconds) == (3.0, 48.0 + 256.0)


def test_not_a_byte_more_is_kept_than_allowed() -> None:
    source = Mixed(regions=True)
    exact = sum((item.values.nbytes + item.regions.nbytes) for item in (source[index if index != 6 else 7] for index in range(20)))
    for most_bytes, fits in ((exact, True), (exact - 1, False), (10, False)):
        asked = list[int]()
        kept = Items(source, read=lambda source, index, asked=asked: (asked.append(index), source[index])[1])
        assert (kept.keep_in_memory(num_workers=0, show=False, most_bytes=most_bytes) is not None) == fits
        asked.clear()
        assert kept.item(0, [])[0].label == 7
        assert asked == ([] if fits else [0])


def test_the_sample_alone_says_that_many_large_items_do_not_fit() -> None:
    source, asked = Mixed(length=1000), list[int]()
    kept = Items(source, read=lambda source, index: (asked.append(index), source[index])[1])
    assert kept.keep_in_memory(num_workers=0, show=False, most_bytes=50_000) is None
    assert len(asked) == 8 and (min(asked), max(asked)) == (0, 999)


def test_decoding_ends_where_no_more_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = Mixed(length=1000), list[int]()
    kept = Items(source, read=lambda source, index: (asked.append(index), source[index])[1])
    monkeypatch.setattr(kept, "mean_bytes", lambda: 1.0)  # a sample that misleads
    assert kept.keep_in_memory(num_workers=0, show=False, most_bytes=20_000) is None
    assert 64 < len(set(asked)) < 400  # of about 80 bytes each


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("together", [1, 1 << 20])
def test_a_batch_has_the_keys_of_its_epoch_whatever_is_held_at_once(
    in_memory: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "_TOGETHER", together)
    kept = held(Mixed())
    if in_memory:
        kept.keep_in_memory(num_workers=0, show=False, most_bytes=1e9)
    batch = RawItems(kept, prepare=sums, draw=lambda keys: {}, seed=5)[Asked(3, [2, 6, 19])]
    assert batch.epoch == 3 and batch.index.tolist() == [2, 7, 19]  # the next readable one, with its own key
    assert torch.equal(batch.parts["keys"], rng.item_keys(seed=5, epoch=3, index=torch.tensor([2, 7, 19])))
    assert batch.parts["sum"].tolist() == [Mixed()[index].values.sum() for index in (2, 7, 19)]
    assert batch.parts["together"].tolist() == [1 if together == 1 else 3] * 3
    assert batch.unreadable == ([] if in_memory else [(6, "mixed/6.jpg: truncated")])
