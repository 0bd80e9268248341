"""Damaged files of every kind that a source of shards or clouds reads: one error that names the file, soon, and with little memory."""

import io
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from fuzzing import counted, time_limit
from golden import noise
from PIL import Image

from glpretrain.data import PointArrays, TarShards, UnreadableItemError
from glpretrain.data.sources.points.clouds import cloud_item, read_points

CLOUD = noise(40, 3, name="damaged").numpy()
CORNERS = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float32)
FACES = np.array([(0, 1, 3), (0, 3, 2), (4, 7, 5), (4, 6, 7), (0, 4, 5), (0, 5, 1), (2, 3, 7), (2, 7, 6)], dtype=np.int32)
_MEGABYTES = 512  # that all files of a kind may take


def _rows(word: str, rows: np.ndarray) -> str:
    return "".join(" ".join([word, *map(str, row)]).strip() + "\n" for row in rows.tolist())


def _ply(order: str) -> bytes:
    lines = ["ply", f"format {order} 1.0", "element vertex 8", *(f"property float {axis}" for axis in "xyz")]
    head = "\n".join([*lines, "element face 8", "property list uchar int vertex_indices", "end_header", ""]).encode()
    if order == "ascii":
        return head + (_rows("", CORNERS) + _rows("3", FACES)).encode()
    rows = np.zeros(8, [("count", "u1"), ("at", "<i4", 3)])
    rows["count"], rows["at"] = 3, FACES
    return head + CORNERS.astype("<f4").tobytes() + rows.tobytes()


def _npz(points: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, points=points, labels=np.arange(2), class_names=np.array(["a", "b"]))
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, CLOUD)
    return buffer.getvalue()


def _h5(names: list[str] | np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("points", data=np.stack([CLOUD] * 2), compression="gzip", shuffle=True)
        file["labels"] = np.arange(2)
        file["class_names"] = names
    return buffer.getvalue()


def _tar(kind: int) -> bytes:
    image, buffer = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.arange(144, dtype=np.uint8).reshape(6, 8, 3)).save(image, "PNG")
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for number in range(4):
            for key, content in (("png", image.getvalue()), ("cls", b"1"), ("json", b'{"label": 1}')):
                entry = tarfile.TarInfo(f"{'a' * 40 * number * number}/{number}.{key}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        for key in ("png", "cls"):
            entry = tarfile.TarInfo(f"9.{key}")
            entry.type, entry.linkname = tarfile.LNKTYPE, f"/0.{key}"
            archive.addfile(entry)
    return buffer.getvalue()


def _points(path: Path) -> None:
    cloud_item(read_points(path, num_points=20), name=path, label=-1, normalise=True)


def _stack(path: Path) -> None:
    source = PointArrays(path)
    for index in range(len(source)):
        try:
            source[index]
        except UnreadableItemError:
            continue


def _shard(path: Path) -> None:
    source = TarShards(path)
    for index in range(min(len(source), 20)):
        try:
            source[index]
        except UnreadableItemError:
            continue


KINDS: dict[str, tuple[bytes, Callable[[Path], None], type[ValueError]]] = {
    "a.npy": (_npy(), _points, UnreadableItemError),
    "one.npz": (_npz(CLOUD), _points, UnreadableItemError),
    "a.npz": (_npz(np.stack([CLOUD] * 2)), _stack, ValueError),
    "a.h5": (_h5(np.array([b"a", b"b"])), _stack, ValueError),
    "names.h5": (_h5(["a", "b"]), _stack, ValueError),  # another process reads such names
    "a.txt": (_rows("", CLOUD).encode(), _points, UnreadableItemError),
    "a.xyz": (_rows("", CLOUD).replace(" ", ",").encode(), _points, UnreadableItemError),
    "a.off": (f"OFF\n8 8 0\n{_rows('', CORNERS)}{_rows('3', FACES)}".encode(), _points, UnreadableItemError),
    "a.obj": (f"o a\n{_rows('v', CORNERS)}{_rows('f', FACES - 8)}".encode(), _points, UnreadableItemError),
    "ascii.ply": (_ply("ascii"), _points, UnreadableItemError),
    "binary.ply": (_ply("binary_little_endian"), _points, UnreadableItemError),
    "flipped.ply": (_ply("binary_big_endian"), _points, UnreadableItemError),  # the header names the other order of bytes
    "pax.tar": (_tar(tarfile.PAX_FORMAT), _shard, ValueError),
    "gnu.tar": (_tar(tarfile.GNU_FORMAT), _shard, ValueError),
}


def _mutated(whole: bytes, draw: random.Random) -> bytes:
    """A file with one to four faults."""
    content = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(max(1, len(content))), draw.randint(1, 24)
        match draw.randrange(8):
            case 0 if content:
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                content[at : at + length] = draw.randbytes(length)
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = content[:at][-length:]
            case 4:
                content[at : at + length] = bytes([draw.choice((0, 255, 32, 57))]) * length
            case 5:
                content = content[:at]
            case 6:  # a number
                content[at : at + 1] = draw.choice((b"-1", b"999999999999", b"nan", b"1e400", b"0", b" ", b"\n", b"\\"))
            case _ if at > 600:  # two parts change places
                content[at - 512 : at], content[:512] = content[:512], content[at - 512 : at]
    return bytes(content)


def _repaired(content: bytes) -> bytes:
    """A tar file whose first headers have the right checksums again, so that a reader believes them."""
    blocks = bytearray(content)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = f"{sum(blocks[at : at + 512]):06o}\0 ".encode()
    return bytes(blocks)


def _damage(kind: str, folder: Path, *, count: int) -> Counter[str]:
    whole, read, expected = KINDS[kind]
    draw = random.Random(kind)
    path = folder / kind
    with counted(kind, megabytes=_MEGABYTES) as outcomes:
        for number in range(count):
            content = _mutated(whole, draw)
            path.write_bytes(_repaired(content) if kind.endswith(".tar") and number % 2 else content)
            with time_limit(f"file {number} of {kind}"):
                try:
                    read(path)
                    outcomes["read"] += 1
                except expected as error:
                    assert kind in str(error) and str(error).isprintable() and len(str(error)) < 1500, f"file {number}: {error}"
                    outcomes["refused"] += 1
                except Exception as error:
                    raise AssertionError(f"file {number} of {kind}: {type(error).__name__}: {error}") from error
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read(kind: str, tmp_path: Path) -> None:
    whole, read, _ = KINDS[kind]
    (tmp_path / kind).write_bytes(whole)
    if kind == "flipped.ply":
        with pytest.raises(UnreadableItemError, match=kind):
            read(tmp_path / kind)
    else:
        read(tmp_path / kind)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_damaged_files(kind: str, tmp_path: Path) -> None:
    outcomes = _damage(kind, tmp_path, count=4 if kind == "names.h5" else 40)
    assert outcomes["refused"] > 0 or kind == "names.h5"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files(kind: str, tmp_path: Path) -> None:
    count = 100 if kind == "names.h5" else 5000 if kind.endswith(".tar") else 3000
    assert _damage(kind, tmp_path, count=count).total() == count
