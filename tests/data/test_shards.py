"""Tar shards: which members are a sample, random access, labels, damage. Hugging Face datasets where the package is installed."""

import io
import itertools
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glpretrain.core.listing import say_once
from glpretrain.data import HuggingFaceImages, TarShards, UnreadableItemError, source_for
from glpretrain.data.sources import saved_listings, shard_headers, shard_items


def png(value: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), value, dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


Members = dict[str, bytes] | list[tuple[str, bytes]]


def write(path: Path, members: Members, *, kind: int = tarfile.DEFAULT_FORMAT) -> None:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def values(source: TarShards) -> list[int]:
    """The grey value of each item."""
    return [int(source[index].values.float().mean().round()) for index in range(len(source))]


def test_members_of_equal_stem_are_one_sample_in_any_order(tmp_path: Path) -> None:
    write(tmp_path / "b.tar", {"x/02.cls": b"10", "x/02.png": png(2)})
    write(tmp_path / "a.tar", {"00.png": png(0), "00.cls": b"2\n", "01.png": png(1), "01.json": b'{"label": 10}', "note.txt": b"."})
    source = TarShards(tmp_path)
    assert [int(source[index].values[0, 0, 0]) for index in (2, 0, 1)] == [2, 0, 1]
    assert source.classes == ["2", "10"]
    assert [source[index].label for index in range(3)] == [0, 1, 1]
    assert source[0].values.shape == (3, 3, 5)


def test_a_damaged_image_is_named_with_its_shard(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"00.png": png(7), "01.png": png(7)[:40]})
    source = TarShards(tmp_path / "a.tar")
    assert source[0].label == -1 and len(source) == 2
    with pytest.raises(UnreadableItemError, match=r"a\.tar:01\.png"):
        source[1]
    with pytest.raises(IndexError):
        source[2]


def test_bad_shards_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a \.tar or \.tar\.gz file nor a folder of them"):
        TarShards(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"a\.tar is not a plain tar file"):
        TarShards(tmp_path)
    write(tmp_path / "a.tar", {"00.txt": b"."})
    with pytest.raises(ValueError, match="no image in the 1 shards"):
        TarShards(tmp_path)
    write(tmp_path / "a.tar", {"00.png": png(7), "00.cls": b"1", "01.png": png(7)})
    with pytest.raises(ValueError, match="1 of 2 items"):
        TarShards(tmp_path)


def test_numbers_with_dots_belong_to_the_name_of_a_sample(tmp_path: Path) -> None:
    write(
        tmp_path / "a.tar",
        {f"scan_2024.05.{day:02d}.{key}": data for day in range(1, 21) for key, data in (("png", png(day)), ("cls", b"x"))},
    )
    source = TarShards(tmp_path)
    assert values(source) == list(range(1, 21)) and source.classes == ["x"]


@pytest.mark.parametrize("beside", ["seg.png", "depth.png", "png", "JPEG", "mask.tif"])
def test_the_photograph_is_the_image_and_not_what_lies_beside_it(beside: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(
        tmp_path / "a.tar",
        {f"{number}.{key}": png(value, kind) for number in range(3) for key, value, kind in ((beside, 3, "PNG"), ("jpg", 120, "JPEG"))},
    )
    assert values(TarShards(tmp_path)) == [120] * 3
    assert len(caplog.records) == 1 and f"3 images beside the one of their sample are not read: {beside.lower()}" in caplog.text
    assert values(TarShards(tmp_path, image_key=beside)) == [3] * 3


def test_a_mask_whose_photograph_is_missing_is_no_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.tar", {"0.seg.png": png(3), "1.jpg": png(9), "1.seg.png": png(3), "note.txt": b".", "noending": png(1)})
    assert values(TarShards(tmp_path)) == [9]
    assert "3 of 4 samples hold no image, the first of them" in caplog.text and "a.tar:0\n" in caplog.text


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"0.left.png": png(1), "0.right.png": png(2)})
    with pytest.raises(ValueError, match=r"a\.tar:0 holds 2 images: left\.png, right\.png.*first dot.*image_key"):
        TarShards(tmp_path)
    assert values(TarShards(tmp_path, image_key="right.png")) == [2]
    write(tmp_path / "a.tar", {"0.jpg": png(1), "0.png": png(2), "1.png": png(3)})
    with pytest.raises(ValueError, match=r"png is beside another image in 1 samples and the only image in 1"):
        TarShards(tmp_path)
    assert values(TarShards(tmp_path, image_key="jpg;png")) == [1, 3] and values(TarShards(tmp_path, image_key="jpg")) == [1]
    with pytest.raises(ValueError, match=r"image_key='tif' in the keys that were found: png, jpg"):
        TarShards(tmp_path, image_key="tif")


def test_capitals_links_and_prefixes(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "A.TAR", "w") as archive:
        for name, content in {
            "./0.PNG": png(4),
            "0.CLS": b"b",
            "./._0.PNG": b"\0\5\x16\7",
            "__MACOSX/1.png": png(9),
            "x/1.png": png(5),
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, kind, target in (
            ("2.png", tarfile.LNKTYPE, "./0.PNG"),
            ("x/3.png", tarfile.SYMTYPE, "4.png"),
            ("x/4.png", tarfile.SYMTYPE, "../2.png"),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
        for name in ("x/1.cls", "2.cls", "x/3.cls", "x/4.cls"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.LNKTYPE, "0.CLS"
            archive.addfile(entry)
    source = TarShards(tmp_path)
    assert values(source) == [4, 5, 4, 4, 4] and source.classes == ["b"]
    assert source_for(tmp_path, "image") == "glpretrain.data.TarShards"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_equal_names_in_two_shards(kind: int, tmp_path: Path) -> None:
    folder = "/".join(["a" * 40] * (3 if kind == tarfile.USTAR_FORMAT else 9))
    for number in (1, 2):
        write(tmp_path / f"{number}.tar", {f"{folder}/same.png": png(number), f"{folder}/same.cls": b"%d" % number}, kind=kind)
    (tmp_path / "folder.tar").mkdir()
    source = TarShards(tmp_path)
    assert values(source) == [1, 2] and source.classes == ["1", "2"]


def test_a_name_that_comes_twice_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.tar", [("0.png", png(1)), ("1.png", png(2)), ("0.png", png(3))])
    assert values(TarShards(tmp_path)) == [3, 2]
    assert "1 members are not read, because a later member of their shard has the same name" in caplog.text


def damaged(path: Path, how: str) -> list[int]:
    """Write a shard of ten labelled images that is damaged, and return the items that are whole."""
    whole = path.with_name("whole")
    write(whole, [(f"{number}.{key}", data) for number in range(10) for key, data in (("png", png(number)), ("cls", b"c"))])
    content = bytearray(whole.read_bytes())
    whole.unlink()
    step = 2048  # a header and a block, twice
    kept = list(range(10))
    match how:
        case "cut in an image":
            content, kept = content[: 7 * step + 530], kept[:7]
        case "cut behind an image":
            content, kept = content[: 7 * step + 1024], kept[:7]
        case "cut behind a sample":
            content, kept = content[: 7 * step], kept[:7]
        case "first header":
            content[10], kept = 7, kept[1:]
        case "header":
            content[4 * step + 10], kept = 7, kept[:4] + kept[5:]
        case "negative size":
            header = tarfile.TarInfo("4.png")
            header.size = -4096
            content[4 * step : 4 * step + 512], kept = header.tobuf(tarfile.GNU_FORMAT), kept[:4] + kept[5:]
        case "bytes missing":
            del content[4 * step + 100 : 4 * step + 200]
            kept = kept[:4] + kept[5:]
        case "no tar":
            content, kept = bytearray(b"no tar" * 500), []
        case "empty":
            content, kept = bytearray(), []
    path.write_bytes(content)
    return kept


@pytest.mark.parametrize(
    "how",
    [
        *("cut in an image", "cut behind an image", "cut behind a sample", "first header", "header", "negative size", "bytes missing"),
        *("no tar", "empty"),
    ],
)
def test_of_a_damaged_shard_all_is_read_that_is_whole(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = damaged(tmp_path / "a.tar", how)
    if kept:
        source = TarShards(tmp_path)
        assert values(source) == kept and source.classes == ["c"]
    else:
        with pytest.raises(ValueError, match=r"a\.tar is not a plain tar file"):
            TarShards(tmp_path)
    caplog.clear()
    write(tmp_path / "b.tar", {"0.png": png(50), "0.cls": b"d"})
    source = TarShards(tmp_path)
    assert values(source) == [*kept, 50] and source.classes == (["c", "d"] if kept else ["d"])
    assert len(caplog.records) == 1 and "1 of 2 shards are damaged" in caplog.text and "a.tar" in caplog.text


def test_compressed_shards_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tar.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 compressed shards are not read.*a\.tar\.zst"):
        TarShards(tmp_path)
    write(tmp_path / "b.tar", {"0.png": png(1)})
    assert values(TarShards(tmp_path)) == [1] and "1 compressed shards are not read" in caplog.text


def test_joined_shards_are_read_to_their_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2):
        write(tmp_path / f"{number}.tar", {f"{number}.png": png(number)})
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "0.tar").write_bytes(b"".join((tmp_path / f"{number}.tar").read_bytes() for number in (1, 2)))
    assert values(TarShards(tmp_path / "both")) == [1, 2] and not caplog.records


@pytest.mark.parametrize(
    ("key", "content"),
    [
        *(("cls", b"\xff\xfe\0\0"), ("cls", b"\x02\0\0\0\0\0\0\0"), ("cls", b" \n"), ("json", b"{"), ("json", b"[" * 200_000)),
        *(
            ("json", b'{"label": ' + b"9" * 9000 + b"}"),
            ("json", b'{"label": [1, 2]}'),
            ("json", b'{"label": {"a": 1}}'),
            ("json", b"\xff{}"),
        ),
    ],
)
def test_a_label_that_cannot_be_read_costs_one_sample(key: str, content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(
        tmp_path / "a.tar",
        {"0.png": png(0), "0.cls": b"a", f"1.{key}": content, "1.png": png(1), "2.png": png(2), "2.json": b'{"label": "a"}'},
    )
    source = TarShards(tmp_path)
    assert values(source) == [0, 2] and source.classes == ["a"]
    assert len(caplog.records) == 1 and "1 samples are left out, because their label cannot be read" in caplog.text
    assert f"a.tar:1.{key}" in caplog.text and len(caplog.text) < 1000
    write(tmp_path / "a.tar", {f"1.{key}": content, "1.png": png(1)})
    with pytest.raises(ValueError, match=rf"no label can be read.*1\.{key}"):
        TarShards(tmp_path)


def test_a_sparse_member_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.tar", {"0.png": png(1)})
    entry = tarfile.TarInfo("1.png")
    entry.size, entry.pax_headers = (
        512,
        {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,10,100,10", "GNU.sparse.size": "1" + "0" * 12},
    )
    with tarfile.open(tmp_path / "a.tar", "a", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(entry, io.BytesIO(bytes(512)))
    assert values(TarShards(tmp_path)) == [1]
    assert "1 of 2 samples hold no image" in caplog.text


def test_hugging_face_images_read_a_saved_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra huggingface")
    for name, content in {"a/0.png": png(3)[:40], "b/0.png": png(3)}.items():
        (tmp_path / "made" / name).parent.mkdir(parents=True)
        (tmp_path / "made" / name).write_bytes(content)
    made = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "made"), cache_dir=str(tmp_path / "cache"), split="train")
    made.save_to_disk(str(tmp_path / "set"))
    source = HuggingFaceImages(str(tmp_path / "set"), label="label")
    assert (len(source), list(source.classes), source[1].label) == (2, ["a", "b"], 1)
    assert source[1].values.shape == (3, 3, 5)
    with pytest.raises(UnreadableItemError, match=r"set\[0\]"):
        source[0]
    with pytest.raises(ValueError, match="no column 'picture'"):
        HuggingFaceImages(str(tmp_path / "set"), image="picture")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="glpretrain\\[huggingface\\]"):
        HuggingFaceImages("anything")


def test_headers_are_read_once_while_the_shards_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[str] = []
    seconds = itertools.count()
    read = shard_headers.read_contents
    monkeypatch.setattr(shard_headers, "read_contents", lambda shard, plain: opened.append(shard.name) or read(shard, plain=plain))
    monkeypatch.setattr(shard_items, "_LEAST", 1)
    monkeypatch.setattr(saved_listings, "_SETTLED", -60.0)
    monkeypatch.setattr(saved_listings, "_keep_times", lambda folders: True)

    def described() -> tuple[object, ...]:
        opened.clear()
        caplog.clear()
        say_once.cache_clear()
        source = TarShards(tmp_path / "set")
        labels = [source[index].label for index in range(len(source))]
        return values(source), labels, source.classes, source.fingerprint(), [record.getMessage() for record in caplog.records]

    def change(name: str, members: Members) -> None:
        write(tmp_path / "set" / name, members)
        for path in (tmp_path / "set" / name, tmp_path / "set"):
            os.utime(path, (1e9, 1e9 + next(seconds)))  # two changes could come within the same tick of the clock

    (tmp_path / "set").mkdir()
    change("a.tar", {"00.png": png(0), "00.cls": b"2", "01.png": png(1), "01.cls": b"10", "note.txt": b"."})
    first = described()
    assert opened == ["a.tar"] and "1 of 3 samples hold no image" in first[-1][0]
    assert described() == first and not opened
    changes: list[tuple[str, Members]] = [
        ("b.tar", {"02.png": png(2), "02.cls": b"2"}),  # another shard
        ("b.tar", {"02.png": png(2), "02.cls": b"3"}),  # the same shard with another label, in as many bytes
        ("b.tar", {"02.png": png(5), "02.cls": b"3", "03.png": png(4), "03.cls": b"4"}),
    ]
    for name, members in changes:
        change(name, members)
        after = described()
        assert opened == ["a.tar", "b.tar"] and after[:4] != first[:4]
        assert described() == after and not opened
    (tmp_path / "set" / "b.tar").write_bytes((tmp_path / "set" / "b.tar").read_bytes()[:2300])  # what is whole is read, every time
    assert described() == described() and opened == ["a.tar", "b.tar"]
