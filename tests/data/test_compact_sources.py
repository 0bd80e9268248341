"""Sources whose items are pairs of files, or come in groups: they keep no Python object per item, and map what was listed once."""

import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import write_image, write_map

from glpretrain.core.listing import natural_key
from glpretrain.data import Faces, MaskedFolder, PointFolder, TileFolder, VideoFolder
from glpretrain.data.sources import saved_listings
from glpretrain.data.sources.images import decoding, face_regions, masked, tiles, videos
from glpretrain.data.sources.paths import Paths, Texts
from glpretrain.data.sources.points import own_clouds

NAMES = ("a/10", "a/2", "a/02", "b", "b-1/7", "b/1", "b/1x/3", "1", "01x", "1x", "\u00e4/9", "\u65e5", "c d/0")
Made = Faces | MaskedFolder | PointFolder | TileFolder | VideoFolder


def _masked(root: Path) -> MaskedFolder:
    for name in NAMES:
        write_image(root / "images" / f"{name}.png", size=(3, 5))
        write_map(root / "masks" / f"{name}.PNG", np.full((3, 5), len(name)))
    return MaskedFolder(root)


def _videos(root: Path) -> VideoFolder:
    for name in NAMES:
        for sequence in ("owl", "bee"):
            write_image(root / sequence / "frames" / f"{name}.png", size=(3, 5))
        write_map(root / "owl" / "masks" / f"{name}.png", np.full((3, 5), len(name)))
    write_map(root / "bee" / "masks" / "1.png", np.full((3, 5), 1))  # the first frame in natural order
    return VideoFolder(root)


def _faces(root: Path) -> Faces:
    for name in NAMES:
        write_image(root / "images" / f"{name}.png", size=(3, 5))
        write_map(root / "regions" / f"{name}.png", np.full((3, 5), len(name) % 7))
    return Faces(root)


def _clouds(root: Path) -> PointFolder:
    for number, name in enumerate(NAMES):
        path = root / ("train", "test")[number % 3 == 2] / ("x", "y")[number % 2] / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savetxt(path, np.eye(3) + number)
    (root / "train" / "x" / "words.txt").write_text("no cloud yet")
    return PointFolder(root)


def _tiles(root: Path) -> TileFolder:
    root.mkdir(parents=True, exist_ok=True)
    (root / "tiles.json").write_text("{}")
    (root / "shards").mkdir(exist_ok=True)
    content = write_image(root / "tile.png", size=(4, 4)).read_bytes()
    lines = []
    for slide in range(3):
        (root / "shards" / f"s{slide}-00000.tar").write_bytes(content * 4)
        entry = {"slide": f"s{slide}", "x": 0, "y": 0, "side": 4, "tissue": 1.0, "shard": f"s{slide}-00000.tar", "num_bytes": len(content)}
        lines += [json.dumps({**entry, "offset": place * len(content)}) for place in range(4)]
    (root / "index.jsonl").write_text("\n".join(lines) + "\n")
    return TileFolder(root)


MAKERS: dict[str, Callable[[Path], Made]] = {
    "masked": _masked,
    "videos": _videos,
    "faces": _faces,
    "clouds": _clouds,
    "tiles": _tiles,
}


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """Small listings are saved too, at once and on any file system."""
    for module, name in ((masked, "LEAST_SAVED"), (videos, "LEAST_SAVED"), (face_regions, "LEAST_SAVED"), (decoding, "LEAST_SAVED")):
        monkeypatch.setattr(module, name, 1)
    for module in (own_clouds, tiles):
        monkeypatch.setattr(module, "_LEAST", 1)
    monkeypatch.setattr(saved_listings, "_SETTLED", -60.0)
    monkeypatch.setattr(saved_listings, "_keep_times", lambda folders: True)
    for name in saved_listings._STARTED_TOGETHER:
        monkeypatch.delenv(name, raising=False)


def _natural(path: Path) -> tuple[object, ...]:
    """The order that is asked for, by Python's own comparison of texts and numbers."""
    parts = re.split("([0-9]+)", str(path))
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], str(path)


def _items(source: Made) -> list[object]:
    items = [source[index] for index in range(len(source))]
    return [[None if part is None else np.asarray(part).tolist() for part in item] for item in items]


def test_paths_are_ordered_by_the_numbers_in_their_names() -> None:
    long = ("z" * 9, "9" * 40, f"1{'0' * 40}")
    odd = (
        *long,
        "0",
        "00",
        "000/1",
        "00/2",
        "a0",
        "a00",
        "a0/x",
        "a00/x",
        "a.0",
        "a.00b",
        "a-0/1",
        "z" * 9,
        "9" * 40,
        f"1{'0' * 40}",
        "\ue000",
        "\udcff",
    )
    names = sorted(Path(name) for name in {*NAMES, *odd, *(f"x{number}/{number * 7 % 11}y" for number in range(200))})
    assert list(Paths.of(Path(), names).naturally()) == sorted(names, key=_natural)
    assert sorted(names, key=lambda path: (natural_key(str(path)), str(path))) == sorted(names, key=_natural)


def test_some_of_many_strings_are_taken_in_any_order() -> None:
    strings = ["\u00e4" * (number % 5) + str(number) for number in range(10_000)]
    texts = Texts.of(strings)
    places = np.arange(20_000) * 7919 % 10_000
    assert list(texts.at(places)) == [strings[place] for place in places] and list(texts) == strings
    kept = places[:10_000] % 3 == 0
    assert list(texts.at(kept)) == [name for name, one in zip(strings, kept, strict=True) if one]
    assert list(texts.at(places[:0])) == [] == list(texts.at(kept & ~kept))


def test_masks_and_frames_are_those_of_their_images_in_natural_order(tmp_path: Path) -> None:
    masked, found = _masked(tmp_path / "masked"), _videos(tmp_path / "videos")
    images = sorted((tmp_path / "masked" / "images" / f"{name}.png" for name in NAMES), key=_natural)
    assert list(masked.paths) == images
    assert [int(masked[index].instances.max()) for index in range(len(masked))] == [
        len(path.relative_to(tmp_path / "masked" / "images").with_suffix("").as_posix()) for path in images
    ]
    owl = found[1]
    frames = sorted((tmp_path / "videos" / "owl" / "frames" / f"{name}.png" for name in NAMES), key=_natural)
    lengths = [len(path.relative_to(tmp_path / "videos" / "owl" / "frames").with_suffix("").as_posix()) for path in frames]
    assert owl.name == "owl" and owl.masks[:, 0, 0].tolist() == lengths
    assert (found[0].masks[1:] == videos.UNKNOWN).all() and found[0].masks[0].unique().tolist() == [1]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.usefixtures("saves")
def test_what_was_listed_once_is_mapped_and_gives_the_same_items(
    kind: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = MAKERS[kind](tmp_path / kind)
    assert list((own_cache / "glpretrain" / "listings").glob("*.idx"))
    items = _items(first)
    for module in (masked, videos, decoding):
        monkeypatch.setattr(module, "images_below", _refused)
    monkeypatch.setattr(face_regions, "_maps_of", _refused)
    monkeypatch.setattr(own_clouds, "_clouds_below", _refused)
    monkeypatch.setattr(tiles, "_read", _refused)
    second = type(first)(tmp_path / kind)
    assert second.fingerprint() == first.fingerprint() and _items(second) == items
    sent = pickle.loads(pickle.dumps(second))
    assert _items(sent) == items and not caplog.records[1:]


def _refused(*args: object, **kwargs: object) -> object:
    raise AssertionError("listed again")


CHANGES: dict[str, Callable[[Path], object]] = {
    "masked": lambda root: (root / "masks" / "a" / "2.PNG").unlink(),
    "videos": lambda root: (root / "owl" / "frames" / "a" / "2.png").rename(root / "owl" / "frames" / "a" / "5.png"),
    "faces": lambda root: (root / "regions" / "a" / "2.png").unlink(),
    "clouds": lambda root: (root / "train" / "x" / "words.txt").write_text("1 2 3\n"),
    "tiles": lambda root: (root / "index.jsonl").write_text("".join((root / "index.jsonl").read_text().splitlines(keepends=True)[:-1])),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.usefixtures("saves")
def test_a_change_on_either_side_is_noticed(kind: str, tmp_path: Path) -> None:
    first = MAKERS[kind](tmp_path / kind)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    before = type(first)(tmp_path / kind).fingerprint()
    CHANGES[kind](tmp_path / kind)
    if kind in ("clouds", "tiles"):
        assert type(first)(tmp_path / kind).fingerprint() != before
    else:
        with pytest.raises(ValueError, match=r"have no mask|have no frame|has no region map"):
            type(first)(tmp_path / kind)


def _own_bytes(value: object, seen: set[int]) -> int:
    """Bytes of everything that an object keeps."""
    if id(value) in seen or isinstance(value, type):
        return 0
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        return value.nbytes
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    own = sys.getsizeof(value) + sum(_own_bytes(one, seen) for one in inner)
    return own + (_own_bytes(vars(value), seen) if hasattr(value, "__dict__") else 0)


@pytest.mark.parametrize("kind", ["masked", "videos", "clouds"])
def test_an_item_takes_the_bytes_of_its_names(kind: str, tmp_path: Path) -> None:
    """The difference between many items and few, so that what a source keeps once does not count."""

    def source(number: int) -> Made:
        root = tmp_path / str(number)
        inside = {"masked": ("images", "masks"), "videos": ("one/frames", "one/masks"), "clouds": ("x", "y")}[kind]
        for folder in inside:
            (root / folder).mkdir(parents=True)
            for place in range(number):
                (root / folder / f"{place:012d}.{'npy' if kind == 'clouds' else 'png'}").touch()
        return {"masked": MaskedFolder, "videos": VideoFolder, "clouds": PointFolder}[kind](root)

    few, many = (_own_bytes(source(number), set()) for number in (100, 2100))
    # Two names of 16 bytes, two places of 8 bytes where they end, two numbers of folders of 4 bytes, and 4 for the place of a frame's mask.
    assert 2 * 16 <= (many - few) / 2000 < 61


def test_two_masks_of_one_image_are_refused(tmp_path: Path) -> None:
    _masked(tmp_path)
    write_map(tmp_path / "masks" / "a" / "2.png", np.ones((3, 5)))
    with pytest.raises(ValueError, match=r"MaskedFolder: .*a/2\.PNG and .*a/2\.png differ in the ending only"):
        MaskedFolder(tmp_path)
    (tmp_path / "masks" / "a" / "2.png").unlink()
    (tmp_path / "masks" / "a" / "2.PNG").rename(tmp_path / "masks" / "a" / "2.jpg")
    with pytest.raises(ValueError, match=r"1 of 13 images have no mask, the first of them .*masks/a/2\.png"):
        MaskedFolder(tmp_path)
