"""Index files beside shards: they give what the headers give, and are used only where they are surely those of their shard."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from test_shards import Members, png, values, write

from glpretrain.data import TarShards
from glpretrain.data.sources import shard_headers

ITEMS = 40


def _members() -> Members:
    found: Members = {}
    for item in range(ITEMS):
        folder = "./" if item % 2 else ""
        found |= {
            f"{folder}x/{item:03d}.png": png(item),
            f"{folder}x/{item:03d}.cls": str(item % 3).encode(),
            f"x/{item:03d}.note.txt": b".",
        }
    return found


def _write_index(shard: Path, *, version: str = "v1.2") -> Path:
    """What `wds2idx` writes: a line for each sample, with key, offset, size and name of its members."""
    lines: list[list[str]] = []
    last = ""
    with tarfile.open(shard) as archive:
        for entry in archive:
            stem, _, key = entry.name.rpartition("/")[2].partition(".")
            if stem != last:
                lines.append([])
                last = stem
            lines[-1] += [key, str(entry.offset_data), str(entry.size), *([entry.name] if version == "v1.2" else [])]
    index = shard.with_suffix(".idx")
    index.write_text("\n".join([f"{version} {len(lines)}", *(" ".join(words) for words in lines)]) + "\n")
    os.utime(index, ns=(2 * 10**18, 2 * 10**18))
    return index


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write(tmp_path / "shard.tar", _members(), kind=tarfile.USTAR_FORMAT)
    return tmp_path / "shard.tar"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards whose headers were read."""
    found: list[Path] = []
    read = shard_headers.read_contents
    monkeypatch.setattr(shard_headers, "read_contents", lambda shard, plain: found.append(shard) or read(shard, plain=plain))
    return found


def _described(shard: Path) -> tuple[object, ...]:
    source = TarShards(shard)
    return values(source), [source[index].label for index in range(len(source))], source.classes, source.fingerprint()


def test_an_index_gives_what_the_headers_give(shard: Path, scanned: list[Path]) -> None:
    expected = _described(shard)
    assert scanned == [shard] and expected[0] == list(range(ITEMS))
    _write_index(shard)
    assert _described(shard) == expected and scanned == [shard]


def _edited(index: Path, old: str, new: str) -> None:
    text = index.read_text()
    assert old in text
    index.write_text(text.replace(old, new, 1))
    os.utime(index, ns=(2 * 10**18, 2 * 10**18))


def _written_anew(index: Path) -> None:
    members = {name.replace("x/", "y/"): content for name, content in dict(_members()).items()}
    write(index.with_suffix(".tar"), members, kind=tarfile.USTAR_FORMAT)
    os.utime(index.with_suffix(".tar"), (1e9, 1e9))  # its time was set back


def _grown(index: Path) -> None:
    with tarfile.open(index.with_suffix(".tar"), "a", format=tarfile.USTAR_FORMAT) as archive:
        for key in ("png", "cls"):
            entry = tarfile.TarInfo(f"x/900.{key}")
            entry.type, entry.linkname = tarfile.LNKTYPE, f"./x/001.{key}"
            archive.addfile(entry)
        archive.addfile(tarfile.TarInfo("x/end.txt"))


DOUBTS: dict[str, Callable[[Path], object]] = {
    "older than the shard": lambda index: os.utime(index, (1e9, 1e9)),
    "of an older version": lambda index: _write_index(index.with_suffix(".tar"), version="v1.1"),
    "cut short": lambda index: index.write_text(index.read_text()[:-40]),
    "without a sample": lambda index: index.write_text("\n".join([f"v1.2 {ITEMS - 1}", *index.read_text().splitlines()[2:]])),
    "with another offset": lambda index: _edited(index, "png 512 ", "png 1024 "),
    "with another name": lambda index: _edited(index, "x/000.png", "x/999.png"),
    "with another key": lambda index: _edited(index, "cls ", "txt "),
    "with white space in a name": lambda index: _edited(index, "x/000.png", "x/0 0.png"),
    "with an escape": lambda index: _edited(index, "x/000.png", "x/\\303.png"),
    "no text": lambda index: index.write_bytes(b"v1.2 1\n\xff\xff"),
    "empty": lambda index: index.write_bytes(b""),
    "of a shard that was written anew": _written_anew,
    "of a shard that was cut": lambda index: index.with_suffix(".tar").write_bytes(index.with_suffix(".tar").read_bytes()[:60_000]),
    "of a shard with more members": _grown,
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_an_index_that_may_be_wrong_is_not_used(doubt: str, shard: Path, scanned: list[Path]) -> None:
    index = _write_index(shard)
    DOUBTS[doubt](index)
    found = _described(shard)
    assert scanned == [shard]
    index.unlink()
    assert _described(shard) == found


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_shard_with_long_names_is_read_by_its_headers(kind: int, tmp_path: Path, scanned: list[Path]) -> None:
    write(tmp_path / "shard.tar", {f"{'n' * 150}{item}.png": png(item) for item in range(3)}, kind=kind)
    _write_index(tmp_path / "shard.tar")
    assert _described(tmp_path / "shard.tar")[0] == [0, 1, 2] and len(scanned) == 1
