"""Folders and lists of images: what is found, how classes and splits are read, and what bad input costs."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_image
from PIL import Image

from glpretrain.data import ImageFolder, ImageList, MaskedFolder, UnreadableItemError

DATA = Path(__file__).parents[3] / "shared" / "data"


picture = partial(write_image, size=(7, 5))


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    for value in range(3):
        picture(tmp_path / f"{value}.PNG", value)
    picture(tmp_path / ".hidden.png")
    source = ImageFolder(tmp_path)
    assert len(source) == 3 and not source.classes
    assert [int(source[index].values[0, 0, 0]) for index in range(3)] == [0, 1, 2]
    assert source[0].values.shape == (3, 7, 5) and source[0].values.dtype == torch.uint8 and source[0].label == -1
    with pytest.raises(IndexError):
        source[3]


def test_first_level_subfolders_are_classes_only_if_every_image_is_in_one(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "deep" / "0.png")
    picture(tmp_path / "dog" / "0.png")
    source = ImageFolder(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert [source[index].label for index in range(2)] == [0, 1]
    picture(tmp_path / "loose.png")
    assert ImageFolder(tmp_path).classes == []


def test_a_folder_with_splits_offers_both(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                picture(tmp_path / part / name / f"{number}.png")
    lengths = {split: len(ImageFolder(tmp_path, split=split)) for split in (None, "train", "val", "all")}
    assert lengths == {None: 6, "train": 6, "val": 4, "all": 10}
    train, test = ImageFolder(tmp_path).train_test_split()
    assert (len(train), len(test)) == (6, 4) and train.classes == test.classes == ["cat", "dog"]


def test_bad_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no image in .*accepted endings: \.jpg"):
        ImageFolder(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"split='val', but .* has no train/"):
        ImageFolder(tmp_path, split="val")
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "masks" / "a.png")
    with pytest.raises(ValueError, match="use MaskedFolder"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n broken"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(UnreadableItemError, match=r"bad\.png"):
        ImageFolder(tmp_path)[0]


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    ramp = np.sin(np.arange(64 * 64 * 3)).reshape(64, 64, 3) * 127 + 128
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UnreadableItemError, match=r"cut\.jpg: .*truncated"):
        ImageFolder(tmp_path)[0]


def test_orientation_of_the_camera_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.fromarray(np.zeros((5, 7, 3), dtype=np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert ImageFolder(tmp_path)[0].values.shape == (3, 7, 5)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert ImageFolder(tmp_path, channels=1)[0].values.flatten().tolist() == [0, 127, 255]
    assert ImageFolder(tmp_path, channels=3)[0].values.shape == (3, 1, 3)


def test_other_numbers_of_channels_come_from_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((5, 7, 4), 9, dtype=np.uint8))
    assert ImageFolder(tmp_path, channels=4)[0].values.shape == (4, 5, 7)
    with pytest.raises(UnreadableItemError, match=r"shape \(5, 7, 4\), expected \(height, width, 2\)"):
        ImageFolder(tmp_path, channels=2)[0]


def test_a_list_is_relative_to_itself(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "with space.png", 3)
    picture(tmp_path / "b.png", 4)
    (tmp_path / "list.txt").write_text("# comment\nin/with space.png\n\nb.png\n")
    source = ImageList(tmp_path / "list.txt")
    assert [int(source[index].values[0, 0, 0]) for index in range(2)] == [3, 4] and not source.classes
    (tmp_path / "list.txt").write_text("in/with space.png\tdog\nb.png cat\n")
    source = ImageList(tmp_path / "list.txt")
    assert source.classes == ["cat", "dog"] and [source[0].label, source[1].label] == [1, 0]
    (tmp_path / "list.txt").write_text("in/with space.png\nb.png cat\n")
    with pytest.raises(ValueError, match="1 of 2 items"):
        ImageList(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("gone.png\n")
    with pytest.raises(UnreadableItemError, match=r"gone\.png"):
        ImageList(tmp_path / "list.txt")[0]


def test_masks_are_read_beside_their_images(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages" / "seq" / "0.jpg", size=(2, 3))
    (tmp_path / "Annotations" / "seq").mkdir(parents=True)
    mask = Image.fromarray(np.array([[0, 1, 2], [0, 0, 11]], dtype=np.uint8)).convert("P")
    mask.putdata([0, 1, 2, 0, 0, 11])
    mask.save(tmp_path / "Annotations" / "seq" / "0.png")
    assert MaskedFolder(tmp_path, ignore=11)[0].instances.tolist() == [[0, 1, 2], [0, 0, -1]]
    assert MaskedFolder(tmp_path, ignore=11, offset=1)[0].instances.tolist() == [[1, 2, 3], [1, 1, -1]]
    picture(tmp_path / "JPEGImages" / "seq" / "1.jpg")
    with pytest.raises(ValueError, match="1 of 2 images have no mask"):
        MaskedFolder(tmp_path)
    with pytest.raises(ValueError, match="images/ beside masks/ or JPEGImages/ beside Annotations/"):
        MaskedFolder(tmp_path / "JPEGImages")


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside this repository")
def test_real_folders_have_the_documented_counts() -> None:
    flowers = ImageFolder(DATA / "classification_flowers")
    assert [len(part) for part in flowers.train_test_split()] == [2932, 732]
    assert flowers.classes == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    videos = MaskedFolder(DATA / "segmentation_davis2016val")
    assert len(videos) == 500 and videos[3].instances.unique().tolist() == [0, 1]
    streets = MaskedFolder(DATA / "segmentation_camvid" / "test", ignore=11, offset=1)
    assert len(streets) == 233 and -1 in streets[0].instances and 0 not in streets[0].instances
