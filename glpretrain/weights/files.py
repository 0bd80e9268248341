"""Reading files without running anything that they contain: safetensors, pickles of tensors and plain values, and JSON.

Left out: what the tensors mean (`formats`, `published`, `folders`).
"""

import json
import pickle
import re
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

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of the folders that timm and transformers write, the safe one first

# A pickle is a program. Damaged bytes make torch's reader fail in any of these ways.
_DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


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
    except SafetensorError as error:
        raise ValueError(
            f"load_backbone: {path} is not a complete safetensors file ({error}); pickles are never opened under this name"
        ) from error


def read_pickle(path: Path) -> object:
    """What `torch.save` wrote: tensors and plain values, and a blank object for everything named in `_READ_AS_BLANK`.

    Raises:
        ValueError: the file is missing, is cut short, has another format, or asks for code to be run.
    """
    if not path.is_file():
        raise ValueError(f"load_backbone: {path} is missing")
    if not _is_zip(path):  # torch.save writes zip files; a file that is cut short has lost its table of contents
        raise ValueError(f"load_backbone: {path} cannot be read as a checkpoint: it is cut short or of another format")
    try:
        with torch.serialization.safe_globals([(_Blank, name) for name in _READ_AS_BLANK]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it asks for {asked[1]}, which is code; accepted: tensors and plain values; nothing was run"
        else:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"load_backbone: {path} cannot be read as a checkpoint: {reason}") from error


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # is_zipfile raises this for some kinds of damage
        return False


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
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # a wrong encoding and wrong JSON both raise it
        raise ValueError(f"load_backbone: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"load_backbone: {path} is not a JSON object but a {type(values).__name__}")
    return values


def numbers(value: object, *, name: str) -> list[float] | None:
    """A list of numbers that a file may hold; None stays None.

    Raises:
        ValueError: the value is something else.
    """
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(number, int | float) for number in value):
        raise ValueError(f"load_backbone: {name}={value!r} found; accepted: a list of numbers")
    return [float(number) for number in value]


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
