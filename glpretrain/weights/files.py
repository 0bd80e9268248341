"""Tensors out of files, without running anything that a file says: safetensors, and pickles of tensors and plain values.

Left out: what the tensors mean (`formats`, `folders`).
"""

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# What published training checkpoints hold beside tensors and plain values: the arguments of the run, and numpy numbers that a
# learning-rate table left in the optimizer. None of it is of use here, so these names are read as a blank object; the classes and
# functions that they name are never called. Every other name is refused.
_READ_AS_BLANK = (
    "argparse.Namespace",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "_local.Path", "_local.PosixPath")),
)

# A pickle is a program; one with damaged bytes goes wrong inside torch's reader in any of these ways.
_DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


class _Blank:
    """Takes any arguments and any state and keeps nothing."""

    def __new__(cls, *args: object) -> "_Blank":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        ValueError: the file is missing, cut short or no safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"load_backbone: {path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"load_backbone: {path} is no complete safetensors file ({error}); pickles are never opened under this name"
        ) from error


def read_pickle(path: Path) -> object:
    """What `torch.save` wrote: tensors and plain values, with blank objects for the few other things in `_READ_AS_BLANK`.

    Raises:
        ValueError: the file is missing, cut short, of another format, or asks for code.
    """
    if not path.is_file():
        raise ValueError(f"load_backbone: {path} is missing")
    if not _is_zip(path):  # what torch.save writes; a file cut short has lost its table of contents
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
    except zipfile.BadZipFile:  # it says this itself of some damage
        return False


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from a safetensors file or a pickle that is one flat dictionary.

    Raises:
        ValueError: see `read_safetensors`, `read_pickle`.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = read_pickle(path)
    if not is_state(content):
        raise ValueError(f"load_backbone: {path} is not one dictionary of tensors")
    return content


def read_weights(folder: Path, *, names: tuple[str, ...]) -> tuple[dict[str, Tensor], str]:
    """Tensors of a folder: of the first file there is, or of the shards that its `.index.json` lists.

    Args:
        folder: to look in.
        names: files that may hold the weights, best first.

    Returns:
        The tensors, and the name of the file.

    Raises:
        ValueError: none is there, a shard is missing or holds other tensors than listed, or see `read_tensors`.
    """
    for name in names:
        if (folder / name).is_file():
            return read_tensors(folder / name), name
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) and Path(place).name == place for place in places.values()):
            raise ValueError(f"load_backbone: {index} has no weight_map from tensors to files beside it")
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(places.values())):
            tensors |= read_tensors(folder / shard)
        if differing := sorted(tensors.keys() ^ places.keys()):
            raise ValueError(f"load_backbone: {index} and its files differ in {listed(differing)}")
        return tensors, index.name
    raise ValueError(f"load_backbone: {folder} has no {' or '.join(names)}; found: {sorted(path.name for path in folder.iterdir())}")


def read_json(path: Path) -> dict:
    """The object of a JSON file.

    Raises:
        ValueError: the file is missing, no JSON, or no object.
    """
    if not path.is_file():
        raise ValueError(f"load_backbone: {path} is missing")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # what both a wrong encoding and wrong JSON raise
        raise ValueError(f"load_backbone: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"load_backbone: {path} is not a JSON object but a {type(values).__name__}")
    return values


def is_state(content: object) -> bool:
    """Whether it is a dictionary from names to tensors, and not empty."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    )


def listed(names: list[str], *, most: int = 6) -> str:
    """The first few names, and how many more there are."""
    return f"{names[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")
