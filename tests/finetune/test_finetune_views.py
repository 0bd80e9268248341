"""What a picture becomes before a fine-tuned model sees it: equal to timm and torchvision, drawn from keys, and nothing is lost."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import noise
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import transforms
from tuned_models import CLASSES, classifier, data, pictures, trained, vit

from glpretrain.core.types import EncoderCard, Item
from glpretrain.data import ImageFolder, Scenes
from glpretrain.finetune import LabelledData, LabelledViews, Transform
from glpretrain.finetune.transforms import drawn_from, picture

KEYS = torch.tensor([5, -(2**62) + 11, 7])
MAES = {"auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25}


def photograph(height: int = 300, width: int = 420) -> Tensor:
    return (127.5 * (noise(3, height // 10, width // 10, name="photograph") + 1)).byte().repeat_interleave(10, 1).repeat_interleave(10, 2)


def card(side: int) -> EncoderCard:
    return vit(img_size=side).card


def test_an_evaluation_resizes_and_cuts_as_maes_code_does() -> None:
    image = picture(photograph())
    # facebookresearch/mae @ efb2a80, util/datasets.py, build_transform
    official = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    ours = LabelledViews(224).transform(card(224))
    assert torch.equal(ours(image), official(image))
    assert torch.equal(ours(photograph()), official(image))


def test_training_views_are_timms_to_the_last_bit() -> None:
    views = LabelledViews(48, **MAES)
    items = [Item(photograph(), label, None, None) for label in range(3)]
    made = views.prepare(items, keys=KEYS, card=card(48))
    theirs = create_transform(
        48,
        is_training=True,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
    for number, key in enumerate(KEYS.tolist()):
        random.seed(key % 2**32)
        np.random.seed(key % 2**32)
        torch.manual_seed(key % 2**32)
        assert torch.equal(made["items"][number], theirs(picture(photograph())))
    assert made["targets"].tolist() == [0, 1, 2]


def test_a_view_depends_on_its_key_alone() -> None:
    views = LabelledViews(24, **MAES)
    items = [Item(photograph(60, 80), label, None, None) for label in range(3)]
    together = views.prepare(items, keys=KEYS, card=card(24))["items"]
    alone = views.prepare(items[1:2], keys=KEYS[1:2], card=card(24))["items"]
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_drawing_leaves_the_generators_where_they_were() -> None:
    def state() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    with drawn_from(torch.tensor(3)):
        drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    assert state() == before
    with drawn_from(torch.tensor(3)):
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == drawn


def test_a_transform_survives_its_card() -> None:
    transform = Transform((32, 32), 0.9, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert Transform.from_json(transform.to_json()) == transform
    with pytest.raises(ValueError, match="out of range"):
        Transform.from_json(transform.to_json() | {"crop_pct": 0.0})
    with pytest.raises(ValueError, match="accepted: an object with"):
        Transform.from_json({"size": [3, 3]})


def test_grey_pictures_stay_grey() -> None:
    grey = vit(in_chans=1).card
    made = LabelledViews(16, **MAES).prepare([Item(photograph()[:1], 2, None, None)], keys=KEYS[:1], card=grey)
    assert made["items"].shape == (1, 1, 16, 16)
    assert LabelledViews(16).transform(grey)(Image.new("RGB", (40, 30))).shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 0}, "size=0 given"),
        ({"crop_pct": 1.5}, "crop_pct=1.5 given"),
        ({"scale": (0.5, 0.2)}, "the smaller first"),
        ({"hflip": 2.0}, "hflip=2.0 given; accepted: a probability"),
        ({"erasing": -0.1}, "erasing=-0.1 given"),
        ({"color_jitter": 0.4, "auto_augment": "rand-m9"}, "would be ignored"),
        ({"auto_augment": "brighter"}, "timm accepts names such as rand-m9-mstd0.5-inc1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LabelledViews(**settings)


def test_a_source_without_two_classes_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="has no classes; accepted: a folder for each of two classes or more"):
        data(tmp_path)


def test_every_test_item_is_evaluated_once_and_what_cannot_be_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part, each in (("train", 4), ("val", 3)):
        pictures(tmp_path / part, each=each)
    (tmp_path / "val" / "red" / "0.png").write_bytes(b"no picture")
    model, module = classifier(), data(tmp_path)
    module.unreadable.most = 1.0
    trained(model, module, steps=3)
    assert model.found["accuracy"].n == 8
    assert [record.message for record in caplog.records if "cannot be read" in record.message] == [
        f"skipped, cannot be read: {tmp_path}/val/red/0.png: no image file that Pillow can read"
    ]


def test_a_run_without_a_readable_test_item_stops_with_a_line(tmp_path: Path) -> None:
    for part in ("train", "val"):
        pictures(tmp_path / part, each=2)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    module = data(tmp_path, batch_size=2)
    module.unreadable.most = 1.0
    with pytest.raises(ValueError, match="no item of the test part could be read"):
        trained(classifier(), module, steps=3)


@pytest.mark.parametrize("cache", [False, True])
def test_labels_stay_with_their_items(tmp_path: Path, cache: bool) -> None:
    """Kept in memory or not: each colour has its class."""
    module = data(pictures(tmp_path), cache=cache, scale=(0.9, 1.0))
    seen: list[tuple[int, int]] = []

    class Watch(type(classifier())):
        def losses(self, batch, progress):
            for view, target in zip(batch.views["global"].items[0], batch.targets, strict=True):
                seen.append((int(view.mean(dim=(1, 2)).argmax()), int(target)))
            return super().losses(batch, progress)

    trained(Watch(vit(), CLASSES), module, steps=4)
    channel_of = {CLASSES.index("red"): 0, CLASSES.index("green"): 1, CLASSES.index("blue"): 2}
    assert len(seen) == 16 and all(channel_of[target] == channel for channel, target in seen)


def test_classes_that_only_the_test_part_has_are_predicted_too(tmp_path: Path) -> None:
    pictures(tmp_path / "train", each=2)
    pictures(tmp_path / "val", each=2)
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "violet")
    assert data(tmp_path, batch_size=2).classes == [*CLASSES, "violet"]


def test_frames_of_one_video_belong_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.new("RGB", (20, 20)).save(tmp_path / name / f"clip{number // 2}_frame_{number}.png")
    module = LabelledData(ImageFolder(tmp_path), LabelledViews(16), batch_size=2)
    index = torch.arange(len(module.test))
    groups = module.groups_of(index)
    assert groups is not None and len(groups.unique()) == len(index) / 2
    assert LabelledData(Scenes(20, size=20), LabelledViews(16), batch_size=2).groups_of(index) is None
