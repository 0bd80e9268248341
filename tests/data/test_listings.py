"""Listings of many files: their order, classes, labels and memory, what their fingerprint tells, and folders that change during a run."""

import os
import shutil
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from image_files import write_image

from glpretrain.core.listing import files_below
from glpretrain.data import ImageFolder, ImageList, PointFolder, Scenes, Source, Subset, TarShards
from glpretrain.data.items import Asked, Items, RawItems
from glpretrain.data.sources.base import Paths
from glpretrain.data.sources.images.simulated import SimulatedFiles

picture = partial(write_image, size=(7, 5))
NAMES = (
    *("a.jpg", "b/0.jpg", "b.jpg", "b/a/1.jpg", "b/z.jpg", "B/0.jpg"),
    *("c d/\u00e4.jpg", "c d/\u65e5.jpg", "c/x\nb.jpg", os.fsdecode(b"c/\xff.jpg")),
)


def test_files_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert files_below(tmp_path).files == sorted(tmp_path / name for name in NAMES)
    assert list(ImageFolder(tmp_path).paths) == sorted(tmp_path / name for name in NAMES)


def test_paths_are_what_was_given() -> None:
    names = [*NAMES, "/elsewhere/x.jpg", "/x.jpg", "../up.jpg", "b/0.jpg"]
    paths = Paths.of(Path("root"), names)
    assert list(paths) == [Path("root", name) for name in names]
    assert paths[-1] == Path("root/b/0.jpg") and paths[2:4] == [Path("root/b.jpg"), Path("root/b/a/1.jpg")]
    with pytest.raises(IndexError):
        paths[len(names)]
    assert not Paths.of(Path("root"), []) and list(Paths.of(Path("root"), [])) == []


def test_a_million_paths_take_little_and_no_python_objects() -> None:
    names = [f"n{number:08d}_{number * 7}.JPEG" for number in range(1000)]
    paths = Paths(Path("/data"), ((f"train/n{number:08d}", names) for number in range(100)))
    arrays = [paths._folder_of, *(part for texts in (paths._folders, paths._names) for part in (texts.bytes, texts.ends))]
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in arrays)
    assert sum(array.nbytes for array in arrays) / len(paths) < 100
    assert paths[99_999] == Path("/data/train/n00000099/n00000999_6993.JPEG")


def test_simulated_files_are_listed_once_and_decoded_as_one_photograph(tmp_path: Path) -> None:
    source = SimulatedFiles(1203, folder=str(tmp_path))
    assert len(source) == len({str(path) for path in source.paths}) == 1203 and len({path.parent for path in source.paths}) == 3
    before = (tmp_path / "1203.idx").stat().st_mtime_ns
    again = SimulatedFiles(1203, folder=str(tmp_path))
    assert again.fingerprint() == source.fingerprint() and (tmp_path / "1203.idx").stat().st_mtime_ns == before
    assert source[1202].values.shape == (3, 512, 512) and source.reduced(0, side=64).values.shape == (3, 64, 64)
    with pytest.raises(IndexError):
        source[1203]
    with pytest.raises(ValueError, match="count is 0"):
        SimulatedFiles(0, folder=str(tmp_path))


def test_a_list_of_many_classes_takes_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{number}.jpg class{number * 7919 % 22_000}\n" for number in range(44_000)))
    start = time.process_time()
    source = ImageList(path)
    assert len(source) == 44_000 and len(source.classes) == 22_000
    assert source.classes[source._labels[3]] == f"class{3 * 7919 % 22_000}"
    assert time.process_time() - start < 3  # it takes 0.2 s; comparing all pairs of classes would take minutes


def _folder(root: Path, names: tuple[str, ...] = ("a/0", "a/1", "b/0", "b/1")) -> Source:
    for name in names:
        picture(root / f"{name}.png")
    return ImageFolder(root)


def test_a_fingerprint_tells_files_order_and_labels_and_not_the_place(tmp_path: Path) -> None:
    first = _folder(tmp_path / "here").fingerprint()
    assert _folder(tmp_path / "there").fingerprint() == first
    others = [_folder(tmp_path / "other", ("a/0", "a/1", "b/0", "b/2")), _folder(tmp_path / "more", ("a/0", "a/1", "b/0", "b/1", "b/2"))]
    others += [_folder(tmp_path / "moved", ("a/0", "a/1", "b/0", "c/1")), Scenes(4, size=16), Scenes(4, size=16, seed=1)]
    source = ImageFolder(tmp_path / "here")
    others += [Subset(source, indices=[0, 1, 2, 3]), Subset(source, indices=[0, 2, 1, 3])]
    for number, lines in enumerate(("a/0.png x\nb/0.png y\n", "b/0.png y\na/0.png x\n", "a/0.png y\nb/0.png x\n", "a/0.png\nb/0.png\n")):
        (tmp_path / "here" / f"{number}.txt").write_text(lines)
        others.append(ImageList(tmp_path / "here" / f"{number}.txt"))
    for name in ("one.npy", "two.npy"):
        folder = tmp_path / name
        folder.mkdir()
        np.save(folder / name, np.zeros((4, 3)))
        others.append(PointFolder(folder))
        with tarfile.open(folder / "shard.tar", "w") as archive:
            archive.add(tmp_path / "here" / "a" / "0.png", f"{name}.png")
        others.append(TarShards(folder / "shard.tar"))
    found = [first, *(other.fingerprint() for other in others)]
    assert len(set(found)) == len(found) and {len(one) for one in found} == {64}


def test_files_that_are_deleted_after_the_listing_cost_an_item_and_a_line(tmp_path: Path) -> None:
    source = _folder(tmp_path, ("a/0", "a/1", "b/0", "b/1"))
    (tmp_path / "a" / "1.png").unlink()
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "b").symlink_to("nowhere")
    items = RawItems(
        Items(source, read=lambda source, index: source[index]), prepare=lambda items, keys: {"keys": keys}, draw=lambda keys: {}, seed=0
    )
    batch = items[Asked(0, [0, 1])]
    assert batch.index.tolist() == [0, 0]  # the next readable one, from the beginning again
    assert [reason for _, reason in batch.unreadable] == [f"{source.paths[index]}: there is no such file" for index in (1, 2, 3)]
    (tmp_path / "a" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"4 items in a row cannot be read, the first: .*0\.png: there is no such file"):
        items[Asked(0, [0])]


def test_folders_that_are_new_or_empty_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "b").mkdir()
    with pytest.raises(ValueError, match=r"no image in .*empty; accepted endings"):
        ImageFolder(tmp_path / "empty")
    (tmp_path / "split" / "val" / "a").mkdir(parents=True)
    _folder(tmp_path / "split" / "train", ("a/0", "b/0"))
    assert len(ImageFolder(tmp_path / "split")) == 2
    with pytest.raises(ValueError, match=r"no image in .*val; accepted endings"):
        ImageFolder(tmp_path / "split", split="val")
    before = _folder(tmp_path / "classes", ("a/0", "b/0"))
    (tmp_path / "classes" / "c").mkdir()
    after = ImageFolder(tmp_path / "classes")
    assert after.classes == ["a", "b"] and before.fingerprint() == after.fingerprint()
