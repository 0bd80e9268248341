"""Reading files without running anything that they contain: safetensors, pickles of tensors and plain values, and JSON.

Left out: what the tensors mean (`formats`, `published`, `folders`).
"""

import json
import pickle
import re
import reprlib
import struct
import zipfile
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

State = dict[str, Tensor]

# Published training checkpoints also hold the arguments of the run, and numpy numbers that a table of learning rates left in the
# optimizer. Loading needs none of them, so these names are read as a blank object, and the classes and functions that they name are
# never called. Every other name is refused.
_READ_AS_BLANK = (
    "argparse.Namespace",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "_local.Path", "_local.PosixPath")),
)

# What a file of torch.save begins with that was written before torch 1.6, or without its zip format.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LARGEST_JSON = 16_000_000  # bytes

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of the folders that timm and transformers write, the safe one first

# A pickle is a program. Damaged bytes make torch's reader fail in any of these ways.
_DAMAGE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(ArithmeticError, ImportError, MemoryError, OSError, struct.error),
)


class _Blank:
    """An object that accepts any arguments and any state, and keeps none of them."""

    def __new__(cls, *args: object) -> "_Blank":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_safetensors(path: Path) -> State:
    """The tensors of a safetensors file, by name.

    Raises:
        ValueError: the file is missing, is cut short or is not a safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"load_backbone: {path} is missing")
    try:
        return load_file(path)
    except (SafetensorError, *_DAMAGE) as error:
        raise ValueError(
            f"load_backbone: {path} is not a complete safetensors file ({error}); pickles are never opened under this name"
        ) from error


def read_pickle(path: Path, *, mapped: bool = False) -> object:
    """What `torch.save` wrote: tensors and plain values, and a blank object for everything named in `_READ_AS_BLANK`.

    Args:
        path: the file.
        mapped: whether its tensors are mapped into memory, where only what is used is read.

    Raises:
        ValueError: the file is missing, is cut short, has another format, or asks for code to be run.
    """
    if not path.is_file():
        raise ValueError(f"load_backbone: {path} is missing")
    _check_container(path)
    try:
        with torch.serialization.safe_globals([(_Blank, name) for name in _READ_AS_BLANK]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _DAMAGE as error:
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it asks for {asked[1]}, which is code; accepted: tensors and plain values; nothing was run"
        else:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"load_backbone: {path} cannot be read as a checkpoint: {reason}") from error


def _check_container(path: Path) -> None:
    """Refuse, with a ValueError, what `torch.save` did not write, and what would take more memory than the file has bytes."""
    with path.open("rb") as file:
        if file.read(len(_LEGACY)) == _LEGACY:
            return
    try:
        with zipfile.ZipFile(path) as archive:  # a file that is cut short has lost its table of contents
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"load_backbone: {path} cannot be read as a checkpoint: it is cut short or of another format") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError(f"load_backbone: {path} cannot be read as a checkpoint: it is compressed, which torch.save never does")
    if (total := sum(member.file_size for member in members)) > path.stat().st_size:
        raise ValueError(f"load_backbone: {path} cannot be read as a checkpoint: it announces {total} bytes, more than it holds")


def read_content(path: Path) -> object:
    """What a file holds: a dictionary of tensors for a name that ends in .safetensors, otherwise whatever `torch.save` was given.

    Raises:
        ValueError: see `read_safetensors`, `read_pickle`.
    """
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_weights(folder: Path) -> State:
    """The tensors of a folder that timm or transformers wrote, from one file or from the shards that an `.index.json` lists.

    Raises:
        ValueError: no file is there, a shard is missing or holds other tensors than listed, or see `read_content`.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return _read_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) and Path(place).name == place for place in places.values()):
            raise ValueError(f"load_backbone: {index} has no weight_map from tensors to files beside it")
        tensors: State = {}
        for shard in sorted(set(places.values())):
            tensors |= _read_tensors(folder / shard)
        if differing := sorted(tensors.keys() ^ places.keys()):
            raise ValueError(f"load_backbone: {index} and its files differ in {listed(differing)}")
        return tensors
    raise ValueError(f"load_backbone: {folder} has no {' or '.join(_WEIGHTS)}; found: {sorted(path.name for path in folder.iterdir())}")


def _read_tensors(path: Path) -> State:
    content = read_content(path)
    if not is_state(content):
        raise ValueError(f"load_backbone: {path} does not hold one dictionary of tensors")
    return content


def read_json(path: Path) -> dict:
    """The object that a JSON file holds.

    Raises:
        ValueError: the file is missing, is not JSON, or does not hold an object.
    """
    if not path.is_file():
        raise ValueError(f"load_backbone: {path} is missing")
    if (size := path.stat().st_size) > _LARGEST_JSON:
        raise ValueError(f"load_backbone: {path} has {size} bytes; accepted: at most {_LARGEST_JSON}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # a wrong encoding and wrong JSON raise the first, deep nesting the second
        raise ValueError(f"load_backbone: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"load_backbone: {path} is not a JSON object but a {type(values).__name__}")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def numbers(value: object, *, name: str) -> list[float] | None:
    """A list of numbers that a file may hold; None stays None.

    Raises:
        ValueError: the value is something else.
    """
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(number, int | float) and -1e9 < number < 1e9 for number in value):
        raise ValueError(f"load_backbone: {name}={reprlib.repr(value)} found; accepted: a list of finite numbers")
    return [float(number) for number in value]


def section(values: dict, name: str, *, path: Path) -> dict:
    """An object within a JSON object, empty where it is absent.

    Raises:
        ValueError: there is something else under the name.
    """
    if not isinstance(found := values.get(name, {}), dict):
        raise ValueError(f"load_backbone: {path}: {name}={reprlib.repr(found)} given; accepted: an object")
    return dict(found)


def in_single_precision(state: State, *, path: Path) -> State:
    """Half-precision tensors as float32; integers as they are.

    Raises:
        ValueError: a tensor is sparse, quantised, complex or without data, or has more numbers than the file holds.
    """
    stored: dict[int, int] = {}
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not (tensor.is_quantized or tensor.is_complex())
        if not plain:
            kind = f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
            raise ValueError(f"load_backbone: {path}: {name} is {kind}; accepted: dense real numbers")
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError(f"load_backbone: {path}: {name} has shape {tuple(tensor.shape)}, more numbers than the file holds")
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > 2 * sum(stored.values()):
        raise ValueError(f"load_backbone: {path}: its tensors have more numbers than the file holds")
    return {name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def is_state(content: object) -> TypeGuard[State]:
    """Whether the content is a dictionary from names to tensors with at least one entry."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    )


def listed(names: list[str], *, most: int = 6) -> str:
    """The first few names, and the number of the others."""
    return f"{names[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")
