"""Arrays in a file that processes map into their memory: the pages of the file are there once, however many processes read them.

The file is one of safetensors, written by `part_file`. Left out: what the arrays mean.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from glpretrain.core.files import part_file

_SUM = "checksum"


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, facts: Mapping[str, str]) -> None:
    """Write arrays and what is to be known about them.

    Raises:
        OSError: the file cannot be written.
    """
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with part_file(path) as part:
        try:
            save_file(whole, part, metadata={**facts, _SUM: _checksum(whole, facts)})
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"{path}: {error}") from error


def map_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the facts of a file. The arrays must not be written to.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118  it is no mapping
            facts = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    if facts.pop(_SUM, None) != _checksum(arrays, facts):
        raise ValueError(f"{path}: its bytes are not those that were written")
    return arrays, facts


def _checksum(arrays: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> str:
    value = zlib.crc32(json.dumps(dict(sorted(facts.items()))).encode())
    for name in sorted(arrays):
        value = zlib.crc32(arrays[name].data, zlib.crc32(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode(), value))
    return f"{value:08x}"
