"""Folders and names as they are on people's disks: links, pipes, leftovers, endings, divisions, and names that look like something else."""

import os
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from image_files import write_image, write_map
from jsonargparse import ArgumentParser
from PIL import Image

from glpretrain.cli.parsing import parse, parse_verb
from glpretrain.cli.pretraining import pretrain
from glpretrain.core.listing import expanded, files_below, say_once
from glpretrain.data import ImageFolder, ImageList, MaskedFolder, Source, UnreadableItemError, VideoFolder, source_for
from glpretrain.data.own import source_spec
from glpretrain.prepare.slides import find_slides

picture = partial(write_image, size=(7, 5))
ODD_NAMES = (
    *("~name", "~", "a=b", "=b", "a b", " a", "a ", "a,b", "[a]", "[a", "{a: b}", "a: b", "a:", "- a", "-a", "null", "1", "1e3", "1_000"),
    *("0x10", "true", "2024-01-01", "a'b", 'a"b', "'q'", "a#b", " #b", "!x", "&a", "*a", "%a", "@a", "`a", "$HOME", "${a}", "a\\b", "?"),
    *("<<", "...", "|", "> a", "(a)", "data.yaml", "!!python/object:os.system", "\u00e4", "\u65e5\u672c", "a\nb"),
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    say_once.cache_clear()


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_the_value_of_data_is_a_path_and_nothing_else(name: str) -> None:
    for label in "ab":
        picture(Path(name, label, "0.png"))
    words = ["mmc", "--data", name]
    given = parse_verb(pretrain, words, verb="pretrain")["data"]
    assert given == name
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data.source", type=Source)
    found = parse(parser, source_spec(name, source_for(name, "image")).arguments("data.source"))
    again = parser.parse_string(parser.dump(found))  # as a run's config.yaml
    for config in (found, again):
        source = parser.instantiate(config).data.source
        assert source.root.samefile(Path(name)) and source.classes == ["a", "b"] and source[0].values.shape == (3, 7, 5)


def test_a_split_of_the_recipe_is_not_asked_of_the_users_folder() -> None:
    for label in "ab":
        picture(Path("photos", label, "0.png"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data.source", type=Source)
    recipe = {"class_path": "glpretrain.data.ImageFolder", "init_args": {"root": "imagenet", "split": "train"}}
    words = source_spec("photos", "glpretrain.data.ImageFolder").arguments("data.source")
    found = parse(parser, words, values={"data": {"source": recipe}})
    assert len(parser.instantiate(found).data.source) == 2


def test_a_home_folder_is_meant_only_where_nothing_has_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert expanded("~/photos") == tmp_path / "home" / "photos"
    assert expanded("~nobody-of-this-name/photos") == Path("~nobody-of-this-name/photos")
    picture(Path("~", "photos", "0.png"))
    assert expanded("~/photos") == Path("~/photos")


def test_a_folder_whose_name_is_no_utf8_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="not in UTF-8; rename it"):
        source_spec(os.fsdecode(b"photos\xff"), "glpretrain.data.ImageFolder")


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    (tmp_path / "photos.zip").write_bytes(b"PK\5\6" + bytes(18))
    (tmp_path / "notes.xyz").write_text("text")
    (tmp_path / "list.txt").write_text("one.png\n")
    for name, kind in {"one.png": "a single image", "photos.zip": "a zip archive", "notes.xyz": "of a kind that is not read"}.items():
        shards = r"a \.tar or \.tar\.gz file or a folder of them"
        with pytest.raises(ValueError, match=rf"{name} is {kind}.*; accepted: .*{shards}.*; a list of images .*; a folder of images"):
            source_for(tmp_path / name, "image")
    assert source_for(tmp_path / "list.txt", "image") == "glpretrain.data.ImageList"


def test_endings_are_those_that_pillow_reads_and_the_rest_is_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = Image.fromarray(np.full((5, 7, 3), 90, dtype=np.uint8))
    kinds = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.pjpeg": "JPEG", "d.tga": "TGA", "e.jp2": "JPEG2000", "scan_2024.05": "PNG"}
    kinds |= {"noending": "JPEG", "photo.jpg?size=large": "WEBP", "f.QOI": "QOI", "g.PCX": "PCX"}
    for name, kind in kinds.items():
        image.save(tmp_path / name, kind)
    for name in ("h.dng", "i.DNG", "readme", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18nothing!" + bytes(50))
    source = ImageFolder(tmp_path)
    assert {path.name for path in source.paths} == set(kinds)
    assert all(abs(int(source[index].values.float().mean()) - 90) < 3 for index in range(len(source)))
    ImageFolder(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "10 images; left out: 2 .dng" in line and "1 .txt" in line and "1 without a known ending" in line and "h.dng" in line


def test_links_that_lead_back_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for label in "ab":
        for number in range(3):
            picture(tmp_path / "set" / label / f"{number}.png")
    (tmp_path / "set" / "a" / "up").symlink_to("../..")
    (tmp_path / "set" / "a" / "root").symlink_to("..")
    (tmp_path / "set" / "a" / "other").symlink_to("../b")
    (tmp_path / "set" / "b" / "other").symlink_to("../a")
    (tmp_path / "set" / "b" / "itself").symlink_to("itself")
    assert [len(ImageFolder(tmp_path / "set").paths), ImageFolder(tmp_path / "set").classes] == [6, ["a", "b"]]
    assert "4 links to folders" in caplog.text and "1 links to nothing" in caplog.text


def test_links_out_of_the_folder_are_followed_once_each(tmp_path: Path) -> None:
    for name in ("far/x", "far/y", ".cache/z"):
        picture(tmp_path / name / "0.png")
    (tmp_path / "far" / "x" / "back").symlink_to("../y")
    (tmp_path / "far" / "y" / "back").symlink_to("../x")
    (tmp_path / "far" / "y" / "top").symlink_to("..")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to("../far/x")
    (tmp_path / "set" / "b").symlink_to("../far/x")
    names = sorted(str(path.relative_to(tmp_path / "set")) for path in ImageFolder(tmp_path / "set").paths)
    assert names == ["a/0.png", "a/back/0.png", "b/0.png", "b/back/0.png"]
    (tmp_path / "set" / ".store").mkdir()
    picture(tmp_path / "set" / ".store" / "0.png")
    (tmp_path / "set" / "c").symlink_to(".store")  # into a hidden folder, which is not searched otherwise
    assert ImageFolder(tmp_path / "set").classes == ["a", "b", "c"]


def test_slides_are_searched_by_the_same_walk(tmp_path: Path) -> None:
    for name in ("a/1.tif", "b/2.tif", "__MACOSX/3.tif"):
        (tmp_path / "slides" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "slides" / name).touch()
    (tmp_path / "slides" / "a" / "up").symlink_to("..")
    os.mkfifo(tmp_path / "slides" / "pipe.svs")
    assert list(find_slides([tmp_path / "slides"])) == ["a/1", "b/2"]


def test_pipes_and_sockets_are_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind("2.png")
    (tmp_path / "3.png").symlink_to("nowhere.png")
    (tmp_path / "list.txt").write_text("0.png\n1.png\n2.png\n3.png\n/dev/zero\n")
    assert len(ImageFolder(tmp_path)) == 1
    assert "2 pipes, sockets or devices" in caplog.text and "1 links to nothing" in caplog.text
    source = ImageList(tmp_path / "list.txt")
    for index in range(1, 5):
        with pytest.raises(UnreadableItemError, match=r"no regular file|no such file"):
            source[index]
    server.close()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "0.png")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    files, passed_over = files_below(tmp_path)
    assert len(files) == 1
    assert passed_over == [(tmp_path / "closed", "folders that cannot be listed (Permission denied)")]
    with pytest.raises(PermissionError):
        files_below(tmp_path / "closed")


def test_leftovers_of_tools_are_no_classes(tmp_path: Path) -> None:
    for folder in ("a", "b", "__MACOSX/a", ".ipynb_checkpoints", "@eaDir/a", "lost+found"):
        picture(tmp_path / folder / "0.png")
    picture(tmp_path / "a" / "._1.png")
    source = ImageFolder(tmp_path)
    assert len(source) == 2 and source.classes == ["a", "b"]


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("held_out", ["val", "Val", "validation", "VALID", "test", "Testing"])
def test_divisions_are_known_by_their_names(train: str, held_out: str, tmp_path: Path) -> None:
    for part in (train, held_out):
        for label in "ab":
            picture(tmp_path / part / label / "0.png")
    split = ImageFolder(tmp_path).train_test_split()
    assert split is not None and [(len(part), list(part.classes)) for part in split] == [(2, ["a", "b"])] * 2


def test_classes_of_the_held_out_part_are_those_of_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/a/0", "train/b/0", "train/c/0", "val/a/0", "val/c/0", "val/new/0", "val/loose", "extra/0"):
        picture(tmp_path / f"{name}.png")
    split = ImageFolder(tmp_path).train_test_split()
    assert split is not None and split[0].classes == split[1].classes == ["a", "b", "c", "new"]  # what is scored is said with the scores
    assert [split[1][index].label for index in range(len(split[1]))] == [0, 2, 3]
    assert "1 of 4 images of" in caplog.text and "left out: loose.png" in caplog.text and "not used: extra" in caplog.text


def test_a_held_out_part_without_labels_gives_no_scores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/a/0", "train/b/0", "test/0", "test/1"):
        picture(tmp_path / f"{name}.png")
    assert ImageFolder(tmp_path).classes == ["a", "b"] and ImageFolder(tmp_path).train_test_split() is None
    assert len(ImageFolder(tmp_path, split="val")) == 2
    assert "it gives no scores" in caplog.text


def test_one_loose_image_is_named_where_it_costs_the_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/0", "b/0", "cover"):
        picture(tmp_path / f"{name}.png")
    assert not ImageFolder(tmp_path).classes
    assert "1 of 3 images are in no class folder" in caplog.text and "cover.png" in caplog.text


def test_frames_are_in_natural_order(tmp_path: Path) -> None:
    for number in range(1, 13):
        picture(tmp_path / "JPEGImages" / "seq" / f"{number}.jpg")
        write_map(tmp_path / "Annotations" / "seq" / f"{number}.PNG", np.full((7, 5), number))
    video = VideoFolder(tmp_path, max_frames=11)[0]
    assert video.masks[:, 0, 0].tolist() == list(range(1, 12))
    masked = MaskedFolder(tmp_path)
    assert [int(masked[index].instances[0, 0]) for index in range(12)] == list(range(1, 13))


def test_names_that_differ_in_the_ending_only_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "frames" / "0.jpg")
    picture(tmp_path / "a" / "frames" / "0.PNG")
    write_map(tmp_path / "a" / "masks" / "0.png", np.ones((7, 5)))
    with pytest.raises(ValueError, match=r"0\.PNG and .*0\.jpg differ in the ending only"):
        VideoFolder(tmp_path)


def test_names_in_any_bytes_are_read_listed_and_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    picture(tmp_path / "plain.png").rename(tmp_path / name)
    assert ImageFolder(tmp_path)[0].values.shape == (3, 7, 5)
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9.png\tx\r\n")
    source = ImageList(tmp_path / "list.txt")
    assert source[0].label == 0 and source.classes == ["x"]
    (tmp_path / "wide.txt").write_text("a.png\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"wide\.txt is no text in UTF-8"):
        ImageList(tmp_path / "wide.txt")
