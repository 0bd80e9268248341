"""An index of nearest neighbours on disk, by faiss: a graph (HNSW) of features of length one, whose inner products are cosines.

Left out: exact search, which needs no index (`neighbours`).
"""

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from glpretrain.core.files import part_file

_LINKS, _WIDTH_TO_BUILD, _WIDTH_TO_SEARCH = 32, 200, 256  # of the graph: neighbours of a node, candidates that are followed


def require_faiss() -> None:
    """Refuse, with an ImportError, to write an index without faiss."""
    if not has_faiss():
        raise ImportError(
            "--index: faiss is not installed; pip install 'glpretrain[index]'; without an index `glpretrain neighbours` searches exactly"
        )


def has_faiss() -> bool:
    """Whether faiss is installed."""
    return find_spec("faiss") is not None


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Float32[B D] of length one; rows of zeros stay as they are."""
    single = rows.astype(np.float32)
    lengths = np.linalg.norm(single, axis=1, keepdims=True)
    return single / np.maximum(lengths, np.finfo(np.float32).tiny)


def build_index(parts: Iterable[np.ndarray], path: Path) -> None:
    """Write the index of the rows of all parts, Float[B D] each; it takes as much memory as the rows and 256 bytes for each of them."""
    faiss, index = import_module("faiss"), None
    for part in parts:
        if index is None:
            index = faiss.IndexHNSWFlat(part.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = _WIDTH_TO_BUILD
        index.add(unit_rows(part))
    with part_file(path) as file:
        faiss.write_index(index, str(file))


def search_index(path: Path, query: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows nearest to a query.

    Args:
        path: path of the index.
        query: Float[D].
        k: number of rows.

    Returns:
        Float[k] cosines and Int[k] rows, the nearest first.

    Raises:
        ValueError: the file is no such index, or is of another width.
    """
    faiss = import_module("faiss")
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is no index that faiss reads; remove it, and `glpretrain embed --index` writes it again") from error
    if index.d != len(query):
        raise ValueError(f"{path}: an index of width {index.d} for features of width {len(query)}; remove it")
    index.hnsw.efSearch = max(_WIDTH_TO_SEARCH, 2 * k)
    cosines, rows = index.search(unit_rows(query[None]), k)
    found = rows[0] >= 0
    return cosines[0][found], rows[0][found]
