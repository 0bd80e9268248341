"""A test part that is a source of its own: its classes are found by name, whatever their order, and others are refused."""

from pathlib import Path

import pytest
import torch
from golden import noise
from PIL import Image
from tuned_models import classifier, pictures, trained

from glpretrain.data import ImageFolder, ImageList, Scenes, Sounds
from glpretrain.data.relabelled import Relabelled, under_classes_of
from glpretrain.finetune import LabelledData, LabelledViews


def listed(folder: Path, names: list[str]) -> ImageList:
    """A list of two pictures of each class, in this order."""
    folder.mkdir()
    lines = []
    for name in names:
        for number in range(2):
            pixels = (noise(8, 8, 3, name=f"{name}{number}").abs() * 60).clamp(0, 255).byte()
            Image.fromarray(pixels.numpy()).save(folder / f"{name}{number}.png")
            lines.append(f"{name}{number}.png\t{name}")
    (folder / "list.txt").write_text("\n".join(lines))
    return ImageList(folder / "list.txt")


def test_a_test_source_is_scored_under_the_classes_of_the_training_items(tmp_path: Path) -> None:
    train, test = ImageFolder(pictures(tmp_path / "train")), listed(tmp_path / "test", ["red", "yellow", "green"])
    module = LabelledData(train, LabelledViews(16), batch_size=4, num_workers=0, cache=False, test=test)
    assert module.source is train and module.classes == ["blue", "green", "red", "yellow"]
    found = [module.test[index].label for index in range(6)]
    assert found == [2, 2, 3, 3, 1, 1] == [module.test.label_of(index) for index in range(6)]
    assert [module.classes[label] for label in found] == [test.classes[test[index].label] for index in range(6)]
    assert torch.equal(module.test[3].values, test[3].values) and module.test.fingerprint() != test.fingerprint()
    few = listed(tmp_path / "few", ["red", "green"])
    small = LabelledData(train, LabelledViews(16), batch_size=4, num_workers=0, cache=False, test=few)
    tuned = classifier()
    trained(tuned, small, steps=2).validate(tuned, datamodule=small, verbose=False)
    assert tuned.found["accuracy"].n == 4 and small.classes == ["blue", "green", "red"]


def test_label_sets_of_both_sources_are_told_apart_together(tmp_path: Path) -> None:
    train = ImageFolder(pictures(tmp_path / "train"))
    test = listed(tmp_path / "test", ["red;green", "blue"])
    module = LabelledData(train, LabelledViews(16), batch_size=4, num_workers=0, cache=False, separator=";", test=test)
    assert module.classes == ["blue", "green", "red"]
    labels = torch.tensor([module.test[index].label for index in range(4)])
    assert module._label_sets is not None and labels.tolist() == [3, 3, 0, 0]
    assert module._label_sets.targets(labels).tolist() == [[0, 1, 1]] * 2 + [[1, 0, 0]] * 2
    both = listed(tmp_path / "both", ["green;red"])
    with pytest.raises(ValueError, match="has the classes green;red"):
        under_classes_of(train, both)
    assert list(under_classes_of(train, both, separator=";").classes)[-1] == "green;red"


def test_the_same_classes_stay_as_they_are_and_others_are_refused(tmp_path: Path) -> None:
    train = ImageFolder(pictures(tmp_path / "train"))
    same = ImageFolder(pictures(tmp_path / "other", each=2))
    assert under_classes_of(train, same) is same
    with pytest.raises(ValueError, match=r"data\.test: list has the classes"):
        under_classes_of(train, listed(tmp_path / "test", ["daisy", "rose"]))
    with pytest.raises(ValueError, match=r"data\.test: sounds has the items audio; accepted: those of train, image"):
        under_classes_of(train, Sounds(4))
    with pytest.raises(ValueError, match="has the classes of masks"):
        under_classes_of(train, Scenes(4, size=48))
    moved = Relabelled(train, classes=["red", "green", "blue"])
    assert [moved.label_of(index) for index in (0, 8, 16)] == [2, 1, 0]
    stored = moved.stored(0)
    assert stored is not None and stored.label == 2 and moved.named(0) == train.named(0)
    assert moved.reduced(0, side=4).label == 2
