"""Tar shards: which members are a sample, random access, labels, damage. Hugging Face datasets where the package is installed."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glpretrain.data import HuggingFaceImages, TarShards, UnreadableItemError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


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
    with pytest.raises(ValueError, match=r"nor a folder of \.tar files"):
        TarShards(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"a\.tar is not a plain tar file"):
        TarShards(tmp_path)
    write(tmp_path / "a.tar", {"00.txt": b"."})
    with pytest.raises(ValueError, match="no image in the 1 shards"):
        TarShards(tmp_path)
    write(tmp_path / "a.tar", {"00.png": png(7), "00.cls": b"1", "01.png": png(7)})
    with pytest.raises(ValueError, match="1 of 2 images"):
        TarShards(tmp_path)


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
