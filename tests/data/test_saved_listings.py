"""Saved listings of large folders: used while nothing has changed, and never where a file could be lost or mistaken."""

import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from image_files import write_image
from processes import together

from glpretrain.core.listing import say_once
from glpretrain.data import ImageFolder, ImageList, Source
from glpretrain.data.sources import file_lists, saved_listings
from glpretrain.data.sources.images import decoding
from glpretrain.data.sources.saved_listings import Walked

picture = partial(write_image, size=(3, 5))
NAMES = ("a/0.png", "a/in/1.png", "b/0.png", "b/\u00e4.png", os.fsdecode(b"b/\xff.png"))


@pytest.fixture(autouse=True)
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were walked through. Small listings are saved too, at once and on any file system."""
    walked: list[Path] = []
    walk = decoding.images_below

    def counted(root: Path) -> Walked:
        walked.append(root)
        return walk(root)

    monkeypatch.setattr(decoding, "images_below", counted)
    monkeypatch.setattr(decoding, "LEAST_SAVED", 1)
    monkeypatch.setattr(saved_listings, "_SETTLED", -60.0)
    monkeypatch.setattr(saved_listings, "_keep_times", lambda folders: True)
    for name in saved_listings._STARTED_TOGETHER:
        monkeypatch.delenv(name, raising=False)
    say_once.cache_clear()
    return walked


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images with what is left out of a listing."""
    root = tmp_path / "set"
    for name in NAMES:
        picture(root / "0.png").replace(_made(root / name))
    (root / "a" / "broken.png").symlink_to("../later.jpg.d/target")
    (root / "b" / "README").write_text("no image yet")
    (root / "b" / "notes.txt").write_text("never one")
    (tmp_path / "outside").mkdir()
    (tmp_path / "other").mkdir()
    (root / "b" / "link").symlink_to(tmp_path / "outside")
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir()), tmp_path / "outside", tmp_path / "other"]:
        os.utime(folder, (1e9, 1e9))  # or a change in the same tick of the clock could leave the time as it is
    os.utime(root / "b" / "README", (1e9, 1e9))
    return root


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _described(source: Source) -> tuple[object, ...]:
    assert isinstance(source, ImageFolder)
    labels = [source._label_of_folder[number] for number in source._files.folder_of]
    return list(source.paths), source.classes, labels, list(source.groups), source.fingerprint()


def _files(cache: Path) -> list[Path]:
    return sorted((cache / "glpretrain" / "listings").glob("*.idx"))


def test_a_folder_is_walked_through_once_and_its_listing_is_mapped(
    root: Path, walks: list[Path], own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = ImageFolder(root)
    assert len(walks) == 1 and len(_files(own_cache)) == 1
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    say_once.cache_clear()
    second = ImageFolder(root)
    assert len(walks) == 1 and [record.getMessage() for record in caplog.records] == lines != []
    shutil.rmtree(own_cache)
    third = ImageFolder(root)
    assert len(walks) == 2 and _described(first) == _described(second) == _described(third)
    assert len(first) == len(NAMES) and [int(first[index].label) for index in range(len(first))] == [0, 0, 1, 1, 1]


CHANGES: dict[str, Callable[[Path], object]] = {
    "a new file": lambda root: picture(root / "a" / "new.png"),
    "a new file that has the time of its folder set back": lambda root: (
        time.sleep(0.02),  # more than a tick of the clock
        picture(root / "a" / "new.png"),
        os.utime(root / "a", (1e9, 1e9)),
    ),
    "a new file in an inner folder": lambda root: picture(root / "a" / "in" / "new.png"),
    "a new file in a folder that a link leads to": lambda root: picture(root / "b" / "link" / "new.png"),
    "a new class": lambda root: picture(root / "c" / "0.png"),
    "a removed file": lambda root: (root / "b" / "0.png").unlink(),
    "a removed folder": lambda root: shutil.rmtree(root / "a" / "in"),
    "a renamed file": lambda root: (root / "b" / "0.png").rename(root / "b" / "z.png"),
    "a renamed class": lambda root: (root / "b").rename(root / "z"),
    "two classes that change names": lambda root: [(root / old).rename(root / new) for old, new in (("a", "x"), ("b", "a"), ("x", "b"))],
    "a link that leads elsewhere": lambda root: (
        picture(root.parent / "other" / "0.png"),
        (root / "b" / "link").unlink(),
        (root / "b" / "link").symlink_to(root.parent / "other"),
    ),
    "a link to nothing that leads to a file": lambda root: picture(root / "later.jpg.d" / "x.png").rename(root / "later.jpg.d" / "target"),
    "a file that has become an image where it was": lambda root: (root / "b" / "README").write_bytes((root / "b" / "0.png").read_bytes()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str, root: Path, walks: list[Path], own_cache: Path) -> None:
    before = _described(ImageFolder(root))
    (root / "later.jpg.d").mkdir() if "leads to a file" in change else None
    CHANGES[change](root)
    after = _described(ImageFolder(root))
    assert len(walks) == 2
    shutil.rmtree(own_cache)
    assert after == _described(ImageFolder(root)) != before


def test_a_file_that_comes_while_its_folder_is_listed_is_noticed_the_next_time(
    root: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    @contextmanager
    def growing(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            found = list(entries)
        if Path(path).name == "in" and not (root / "a" / "in" / "new.png").exists():
            picture(root / "a" / "in" / "new.png")
        yield found

    monkeypatch.setattr(os, "scandir", growing)
    assert len(ImageFolder(root)) == len(NAMES) and _files(own_cache)
    assert len(ImageFolder(root)) == len(NAMES) + 1


def test_a_broken_link_outside_whose_target_appears_is_noticed(root: Path, tmp_path: Path) -> None:
    (root / "a" / "far.png").symlink_to(tmp_path / "far.png")
    before = len(ImageFolder(root))
    picture(tmp_path / "far.png")
    assert len(ImageFolder(root)) == before + 1


def test_a_damaged_or_foreign_listing_is_refused_in_one_line_and_made_anew(
    root: Path, walks: list[Path], own_cache: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    right = _described(ImageFolder(root))
    picture(tmp_path / "another" / "a.png")
    ImageFolder(tmp_path / "another")
    (file,) = [path for path in _files(own_cache) if b"README" in path.read_bytes()]
    (another,) = [path for path in _files(own_cache) if path != file]
    whole = file.read_bytes()
    damaged = [another.read_bytes(), b"", whole[: len(whole) // 2], whole + b"\0", b"{}", bytes(100)]
    for place in range(0, len(whole), 97):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
    for number, content in enumerate(damaged):
        file.unlink()  # what is mapped must not be written to
        file.write_bytes(content)
        say_once.cache_clear()
        caplog.clear()
        walks.clear()
        assert _described(ImageFolder(root)) == right, number
        refused = [line for line in caplog.text.splitlines() if "listed again, since its saved listing" in line]
        assert len(refused) == 1 and str(file) in refused[0] and walks == [root], number
        assert _described(ImageFolder(root)) == right and walks == [root], number  # the new one is used


@pytest.mark.parametrize("reason", ["small", "recent", "kind of file system", "closed folder", "closed file", "no home"])
def test_a_listing_is_not_saved_where_it_could_mislead(
    reason: str, root: Path, walks: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "small":
        monkeypatch.setattr(decoding, "LEAST_SAVED", len(NAMES) + 1)
    elif reason == "recent":
        monkeypatch.setattr(saved_listings, "_SETTLED", 60.0)
    elif reason == "kind of file system":
        monkeypatch.setattr(saved_listings, "_keep_times", lambda folders: False)
    elif reason == "closed folder":
        scandir = os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: _refused() if Path(path).name == "in" else scandir(path))
    elif reason == "closed file":
        monkeypatch.setattr(decoding, "_begins_as_image", lambda path: _refused())
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user whom the system does not know
    for _ in range(2):
        ImageFolder(root)
    assert len(walks) == 2 and not _files(own_cache)


def _refused() -> object:
    raise PermissionError(13, "Permission denied")


def test_kinds_of_file_systems_are_those_of_all_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    kinds = {"/": "ext4", "/data": "nfs4", "/data/bucket": "fuse.s3fs", "/mnt": "9p"}
    monkeypatch.setattr(saved_listings, "_mounts", lambda: {Path(point): kind for point, kind in kinds.items()})
    kept = {"/home/x": True, "/data/set": True, "/data": False, "/data/bucket/a": False, "/mnt/c": False, "/databank": True, "/": False}
    assert {folder: saved_listings._keep_times([Path(folder)]) for folder in kept} == kept
    assert not saved_listings._keep_times([Path("/home"), Path("/mnt/c")])
    monkeypatch.setattr(saved_listings, "_mounts", dict)
    assert not saved_listings._keep_times([Path("/home")])


def test_a_cache_that_cannot_be_written_costs_one_line(root: Path, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (own_cache / "glpretrain").write_text("a file in the place of the folder")
    assert len(ImageFolder(root)) == len(ImageFolder(root)) == len(NAMES)
    assert caplog.text.count("its listing cannot be saved") == 1


def test_listings_of_a_folder_that_was_changed_do_not_pile_up(root: Path, own_cache: Path) -> None:
    for number in range(saved_listings._KEPT + 2):
        picture(root / "a" / f"new{number}.png")
        os.utime(root / "a", (1e9, 1e9 + number))
        ImageFolder(root)
    assert len(_files(own_cache)) == saved_listings._KEPT


def test_of_processes_that_start_together_one_walks(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    walk = decoding.images_below

    def slow(root: Path) -> Walked:
        (tmp_path / f"walk{os.getpid()}").touch()
        time.sleep(0.3)
        return walk(root)

    monkeypatch.setattr(decoding, "images_below", slow)
    found = [ended.value for ended in together(lambda number: ImageFolder(root).fingerprint(), count=4)]
    assert len(found) == 4 and len(set(found)) == 1 and len(list(tmp_path.glob("walk*"))) == 1


def test_a_listing_goes_to_another_process_by_the_name_of_its_file(root: Path, own_cache: Path) -> None:
    for name in ("train", "val"):
        shutil.copytree(root, root.parent / "parts" / name, symlinks=True)
    for source in (ImageFolder(root), ImageFolder(root.parent / "parts", split="val")):
        sent = pickle.dumps(source)
        assert b"a/in" in sent and b"\xc3\xa4.png" not in sent
        assert _described(pickle.loads(sent)) == _described(source)
    shutil.rmtree(own_cache)
    with pytest.raises(FileNotFoundError):
        pickle.loads(sent)


def test_the_parts_of_a_folder_are_taken_from_one_walk(root: Path, walks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_listings, "_keep_times", lambda folders: False)
    for name in ("train", "val"):
        shutil.copytree(root, root.parent / "parts" / name, symlinks=True)
    source = ImageFolder(root.parent / "parts")
    picture(root.parent / "parts" / "val" / "a" / "new.png")
    split = source.train_test_split()
    assert split is not None and [len(part) for part in split] == [len(NAMES)] * 2 and len(walks) == 2
    assert _described(split[0]) == _described(source) and split[1].paths[0] == root.parent / "parts" / "val" / "a" / "0.png"


def test_a_list_is_read_once_while_it_stays_as_it_is(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lists, "_LEAST", 1)
    reads: list[Path] = []
    read = file_lists._read
    monkeypatch.setattr(file_lists, "_read", lambda path, kind: reads.append(path) or read(path, kind=kind))
    path, link = tmp_path / "list.txt", tmp_path / "elsewhere" / "list.txt"
    _made(link).symlink_to(path)
    path.write_text("a/0.png x\n/b/1.png y\n")
    os.utime(path, (1e9, 1e9))
    first, again, linked = ImageList(path), ImageList(path), ImageList(link)
    assert len(reads) == 1 and len({source.fingerprint() for source in (first, again, linked)}) == 1
    assert list(again.paths) == [tmp_path / "a/0.png", Path("/b/1.png")] and linked.paths[0] == tmp_path / "elsewhere" / "a/0.png"
    assert again.classes == ["x", "y"] and again._labels.tolist() == [0, 1]
    path.write_text("a/0.png y\n/b/1.png x\n")
    assert ImageList(path)._labels.tolist() == [1, 0] and len(reads) == 2
