"""Scenes: a pure function of the index, with masks that agree with pixels, and no download."""

import socket

import pytest
import torch

from glpretrain.data import Scenes
from glpretrain.data.sources.images.scenes import CLASSES


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    one, longer = Scenes(11, size=32), Scenes(1000, size=32)
    for index in (0, 7, 10):
        assert torch.equal(one[index].values, longer[index].values)
        assert torch.equal(one[index].instances, longer[index].instances)
    different = [Scenes(11, size=32)[6], Scenes(11, size=32, seed=1)[7], Scenes(11, size=32, split="test")[7]]
    assert not any(torch.equal(one[7].values, other.values) for other in different)
    with pytest.raises(IndexError):
        one[11]


@pytest.mark.parametrize("size", [16, 48, (37, 61), (97, 41)])
def test_any_size_has_its_shape_and_an_object(size: int | tuple[int, int]) -> None:
    source = Scenes(13, size=size)
    shape = (size, size) if isinstance(size, int) else size
    for index in range(13):
        item = source[index]
        assert item.values.shape == (3, *shape) and item.values.dtype == torch.uint8
        assert item.instances.shape == shape
        assert 0 <= item.label < len(CLASSES)
        assert item.instances.max() > 0


def test_a_larger_scene_shows_the_same() -> None:
    small, large = Scenes(5, size=32)[3], Scenes(5, size=128)[3]
    shrunk = torch.nn.functional.interpolate(large.values[None].float(), size=32, mode="area")[0]
    # Texture is sampled at other places and the rim is smoothed, so the pictures agree but for a small part of the range.
    assert (shrunk - small.values.float()).abs().mean() < 12
    assert (large.instances[2::4, 2::4] != small.instances).float().mean() < 0.05


def test_every_class_and_one_to_three_objects_occur() -> None:
    source = Scenes(200, size=16)
    items = [source[index] for index in range(200)]
    assert {item.label for item in items} == set(range(len(CLASSES)))
    assert {int(item.instances.max()) for item in items} == {1, 2, 3}


def test_the_label_is_that_of_the_largest_object() -> None:
    source = Scenes(60, size=48)
    for index in range(60):
        counts = source[index].instances.flatten().bincount()[1:]
        assert counts.argmax() == len(counts) - 1  # the main object comes last


def test_objects_differ_in_brightness_from_the_background() -> None:
    source = Scenes(60, size=48)
    contrasts = []
    for index in range(60):
        item = source[index]
        grey = item.values.float().mean(dim=0)
        contrasts.append((grey[item.instances == item.instances.max()].mean() - grey[item.instances == 0].mean()).abs())
    # Between 0.08 and 0.2 of the range is drawn, and the tint is added to it; light, clipping and what the crop shows take from it.
    assert torch.stack(contrasts).median() > 0.12 * 255


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("scenes opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert Scenes(40, size=16)[39].values.shape == (3, 16, 16)


def test_train_and_test_share_classes_but_no_texture() -> None:
    train, test = Scenes(3000, size=32).train_test_split()
    assert (train.split, test.split) == ("train", "test") and train.classes == test.classes
    assert len(train) <= 3000


def test_bad_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="length is 0"):
        Scenes(0)
    with pytest.raises(ValueError, match="size is 8"):
        Scenes(3, size=8)
    with pytest.raises(ValueError, match="split is 'val'; expected 'train' or 'test'"):
        Scenes(3, split="val")
