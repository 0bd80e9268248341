"""Arrays of numbers in files: .npy, .npz, .h5 and text.

Nothing in a file is executed (pickle), and no other file that it names is opened. What a header claims is compared with the size of the
file before memory is taken. Left out: which array is a cloud (`clouds`, `own_clouds`).
"""

import json
import math
import subprocess
import sys
import zipfile
import zlib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.lib import format as npy

from glpretrain.data.sources.base import UnreadableItemError, reason_of

if TYPE_CHECKING:
    from h5py import Dataset

STACKS = (".npz", ".h5", ".hdf5")
TEXTS = (".txt", ".xyz")
_NUMBERS, _NAMES = "biuf", "SU"  # kinds of types
_MOST_BYTES, _MOST_RATIO = 2**28, 100  # what a compressed file may unpack to: this much, or this many times its size
_MOST_DEFLATED = 1032  # bytes that deflate makes of one byte, at most
_MOST_STRINGS = 2**16
_MOST_CHARACTERS, _MOST_SECONDS = 2**24, 10  # of all strings of an array, and to read them
_READ_STRINGS = """
import h5py, json, sys
path, name, most = sys.argv[1:]
with h5py.File(path, "r") as file:
    strings = []
    for place in range(len(file[name])):  # one by one, because all of them may be one long string that is in the file once
        string = file[name][place]
        strings.append(string.decode() if isinstance(string, bytes) else str(string))
        assert len(strings[-1]) * len(file[name]) <= int(most)
print(json.dumps(strings))
"""
_FIRST_BYTES = 2**16  # of a text file that are read to see whether it holds numbers


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz or .h5 file, by name.

    Raises:
        UnreadableItemError: the file is missing, is damaged, or is of another kind.
    """
    suffix = path.suffix.lower()
    if suffix not in STACKS:
        raise UnreadableItemError(f"{path}: unknown kind of file; accepted for arrays of many clouds: {', '.join(STACKS)}")
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        return _read_npz(path) if suffix == ".npz" else _read_h5(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a reader may raise anything for a damaged file
        raise UnreadableItemError(f"{path} cannot be read: {reason_of(error)}") from error


def read_npy(file: IO[bytes], *, length: int) -> np.ndarray:
    """An array in numpy's format.

    Args:
        file: file at the beginning of the array.
        length: number of bytes of the array with its header.

    Raises:
        ValueError: it holds anything but numbers or text, or its header claims another length. Damage may raise other errors.
    """
    start = file.tell()
    read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.kind not in _NUMBERS + _NAMES or dtype.itemsize == 0:
        raise ValueError(f"an array of type {dtype}; accepted: numbers and text")
    following, claimed = length - (file.tell() - start), math.prod(shape) * dtype.itemsize
    if claimed != following:
        raise ValueError(f"the header names an array of shape {shape} and type {dtype}, {claimed} bytes, but {following} bytes follow")
    file.seek(start)
    return npy.read_array(file, allow_pickle=False)


def read_text(path: Path) -> np.ndarray:
    """Float[P C] of a text file with one point per line, its columns separated by white space or commas."""
    first = first_numbers(path)
    if not first:
        raise ValueError("the first line does not begin with three numbers")
    return np.loadtxt(path, delimiter="," if "," in first else None, dtype=np.float64, ndmin=2, encoding="utf-8-sig")


def first_numbers(path: Path) -> str:
    """The first line of a text file that is no comment, if it begins with three numbers; otherwise empty."""
    with path.open("rb") as file:
        lines = file.read(_FIRST_BYTES).decode("utf-8-sig", errors="replace").splitlines()
    line = next((line for line in lines if line.partition("#")[0].strip()), "")
    try:
        numbers = [float(word) for word in line.replace(",", " ").split()[:3]]
    except ValueError:
        return ""
    return line if len(numbers) == 3 else ""


def _check_claim(claimed: int, path: Path) -> None:
    """Refuse a file that unpacks to much more than its size.

    Raises:
        ValueError: it does.
    """
    length = path.stat().st_size
    accepted = max(_MOST_BYTES, _MOST_RATIO * length)
    if claimed > accepted:
        raise ValueError(f"the file of {length} bytes claims to hold {claimed} bytes; accepted: {accepted}")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        _check_claim(sum(entry.file_size for entry in entries), path)
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others are unpacked without a limit
                raise ValueError(f"{entry.filename} is compressed in a way that numpy does not use")
            with archive.open(entry) as file:
                arrays[entry.filename.removesuffix(".npy")] = read_npy(file, length=entry.file_size)
    return arrays


def _h5py() -> ModuleType:
    try:
        return import_module("h5py")
    except ImportError as error:
        raise ModuleNotFoundError("the package h5py is needed for this kind of file: pip install 'glpretrain[points]'") from error


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    h5py = _h5py()
    arrays: dict[str, np.ndarray] = {}
    claimed = 0
    with h5py.File(path, "r") as file:
        for name in file:
            # Links are not followed, because they may lead into another file.
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{name} is a link to another place; accepted: arrays that are in the file")
            value = file[name]
            if not isinstance(value, h5py.Dataset):
                continue
            if value.external or value.is_virtual:
                raise ValueError(f"{name} is stored in another file; accepted: arrays that are in the file")
            if h5py.check_string_dtype(value.dtype) is not None and value.dtype.kind == "O":
                arrays[name] = _strings(value, path)
                continue
            if value.dtype.kind not in _NUMBERS + _NAMES or value.shape is None:
                raise ValueError(f"{name} has the type {value.dtype} and the shape {value.shape}; accepted: arrays of numbers or text")
            claimed += max(value.nbytes, math.prod(value.chunks or (0,)) * value.dtype.itemsize)
            _check_claim(claimed, path)
            _check_chunks(value)
            arrays[name] = value[()]
    return arrays


def _strings(dataset: "Dataset", path: Path) -> np.ndarray:
    """The strings of a dataset. HDF5 never ends on some damaged files with such strings, so another process reads them."""
    shape = dataset.shape
    if len(shape) != 1 or shape[0] > _MOST_STRINGS:
        raise ValueError(f"{dataset.name} has the shape {shape}; accepted for strings: one axis of at most {_MOST_STRINGS}")
    command = [sys.executable, "-c", _READ_STRINGS, str(path.resolve()), str(dataset.name), str(_MOST_CHARACTERS)]
    try:
        output = subprocess.run(command, capture_output=True, timeout=_MOST_SECONDS, check=True).stdout
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise ValueError(f"{dataset.name}: its strings cannot be read") from error
    return np.array(json.loads(output), dtype=object)


def _check_chunks(dataset: "Dataset") -> None:
    """Refuse chunks that unpack to more than the size of a chunk, because HDF5 takes as much memory as they want.

    Raises:
        ValueError: there is such a chunk.
    """
    deflate = _h5py().h5z.FILTER_DEFLATE
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(place)[0] for place in range(properties.get_nfilters())]
    if filters.count(deflate) > 1:
        raise ValueError(f"{dataset.name} is compressed twice")
    if deflate not in filters:
        return
    large: list[tuple[int, ...]] = []
    dataset.id.chunk_iter(lambda chunk: large.append(chunk.chunk_offset) if chunk.size * _MOST_DEFLATED > _MOST_BYTES else None)
    accepted = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize + 64  # with a checksum
    for offset in large:
        _, stored = dataset.id.read_direct_chunk(offset)
        if len(zlib.decompressobj().decompress(stored, accepted + 1)) > accepted:
            raise ValueError(f"{dataset.name} has a chunk that unpacks to more than {accepted} bytes")
