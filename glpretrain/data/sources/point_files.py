"""Files of points: arrays (.npy, .npz, .h5, .txt) and meshes (.off, .ply, .obj), whose surface is sampled by area.

Nothing in a file is ever run. Left out: which class a file is of (`point_folders`, `point_datasets`).
"""

import zipfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from glpretrain.core import keys
from glpretrain.data.sources.base import UnreadableItemError

ARRAYS = (".npy", ".npz", ".h5", ".hdf5", ".txt", ".xyz")
MESHES = (".off", ".ply", ".obj")
_POINT_NAMES = ("points", "data", "pc", "xyz", "arr_0")
_MESH_SEED = 0x3E54


def read_points(path: Path, *, num_points: int) -> np.ndarray:
    """The points of one file.

    Args:
        path: of one cloud or mesh.
        num_points: sampled on the surface of a mesh; a cloud keeps its own.

    Returns:
        Float[P 3+].

    Raises:
        UnreadableItemError: the file is missing, broken, or holds no cloud.
    """
    suffix = path.suffix.lower()
    if suffix not in ARRAYS + MESHES:
        raise UnreadableItemError(f"{path}: unknown kind of file; accepted: {', '.join(ARRAYS + MESHES)}")
    try:
        points = _mesh(path, num_points=num_points) if suffix in MESHES else _array(path)
    # What the readers of arrays and meshes say of damage, each in its own way.
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        EOFError,
        AttributeError,
        NotImplementedError,
        zipfile.BadZipFile,
    ) as error:
        raise UnreadableItemError(f"{path}: {type(error).__name__}: {error}") from error
    if points.ndim != 2 or points.shape[1] < 3 or len(points) == 0:
        raise UnreadableItemError(f"{path}: an array of shape {points.shape}; a cloud is (points, 3 or more)")
    if not np.isfinite(points[:, :3]).all():
        raise UnreadableItemError(f"{path}: coordinates are not finite")
    return points


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz or .h5 file by name.

    Raises:
        ValueError: the file is missing or broken, or of another kind.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".h5", ".hdf5"):
        raise ValueError(f"{path}: arrays of many clouds are .npz or .h5 files")
    try:
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        h5py = _optional("h5py")
        with h5py.File(path, "r") as file:
            return {name: value[()] for name, value in file.items() if isinstance(value, h5py.Dataset)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _optional(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(f"{name} is needed for such files: pip install 'glpretrain[points]'") from error


def _array(path: Path) -> np.ndarray:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if suffix in (".txt", ".xyz"):
        first = path.open(encoding="utf-8").readline()
        return np.loadtxt(path, delimiter="," if "," in first else None, dtype=np.float32, ndmin=2)
    arrays = read_arrays(path)
    for name in _POINT_NAMES:
        if name in arrays:
            return arrays[name]
    raise ValueError(f"holds {sorted(arrays)}; the points of one cloud are called {', '.join(_POINT_NAMES)}")


def _mesh(path: Path, *, num_points: int) -> np.ndarray:
    trimesh = _optional("trimesh")
    # Without processing: merging vertices would change nothing that is sampled, and takes longer than sampling.
    loaded = trimesh.load(path, process=False, force="mesh" if path.suffix.lower() != ".ply" else None)
    if isinstance(loaded, trimesh.Scene):
        loaded = loaded.to_mesh()
    if isinstance(loaded, trimesh.PointCloud):
        return np.asarray(loaded.vertices)
    return sampled_by_area(np.asarray(loaded.vertices), np.asarray(loaded.faces), num_points=num_points)


def sampled_by_area(vertices: np.ndarray, faces: np.ndarray, *, num_points: int) -> np.ndarray:
    """Points uniform on a surface of triangles; the same ones at every call.

    Args:
        vertices: Float[V 3].
        faces: Int[F 3].
        num_points: P.

    Returns:
        Float[P 3].

    Raises:
        ValueError: the surface has no area.
    """
    corners = vertices[faces].astype(np.float64)  # [F 3 3]
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    areas = np.linalg.norm(np.cross(first, second), axis=1)
    total = areas.sum()
    if not total > 0.0 or not np.isfinite(total):
        raise ValueError(f"{len(faces)} faces without area")
    draws = keys.uniform(torch.tensor(_MESH_SEED), num_points, 3).double().numpy()
    chosen = np.searchsorted(np.cumsum(areas) / total, draws[:, 0], side="right").clip(max=len(faces) - 1)
    along, across = draws[:, 1:2], draws[:, 2:3]
    beyond = along + across > 1.0  # the other half of the parallelogram
    along, across = np.where(beyond, 1.0 - along, along), np.where(beyond, 1.0 - across, across)
    return corners[chosen, 0] + along * first[chosen] + across * second[chosen]
