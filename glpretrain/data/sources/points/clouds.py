"""Point clouds: read from arrays (.npy, .npz, .h5, .txt) or sampled on meshes (.off, .ply, .obj), as items of a source.

Code that is embedded in a file (pickle) is never executed. Left out: the class of a file (`own_clouds`, `datasets`).
"""

import zipfile
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.core.clouds import in_unit_sphere
from glpretrain.data.sources.base import Item, Source, UnreadableItemError

ARRAYS = (".npy", ".npz", ".h5", ".hdf5", ".txt", ".xyz")
MESHES = (".off", ".ply", ".obj")
_POINT_NAMES = ("points", "data", "pc", "xyz", "arr_0")
_MESH_SEED = 0x3E54
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what readers of arrays raise for a damaged file


class PointSource(Source):
    """A source of point clouds: `image` is Float[P 3], and masks are Int[P]."""

    @property
    def modality(self) -> Literal["points"]:
        return "points"


def some_of(points: np.ndarray) -> np.ndarray:
    """A few of the clouds of an array, which tell it from another one."""
    return points[:: max(1, len(points) // 64)]


def cloud_item(
    points: np.ndarray | Tensor, *, label: int, normalise: bool, instances: Tensor | None = None, semantic: Tensor | None = None
) -> Item:
    """A point cloud as an item.

    Args:
        points: Float[P 3+]; the columns after the third (normals, colours) are dropped.
        label: class, or -1.
        normalise: whether the cloud is centred at its mean and scaled into the unit sphere.
        instances: Int[P].
        semantic: Int[P].
    """
    cloud = torch.as_tensor(points)[:, :3].to(torch.float32).contiguous()
    return Item(in_unit_sphere(cloud) if normalise else cloud, label, instances, None, semantic)


def read_points(path: Path, *, num_points: int) -> np.ndarray:
    """The points of one file.

    Args:
        path: file of one point cloud or mesh.
        num_points: number of points that are sampled on the surface of a mesh; a point cloud keeps its own number.

    Returns:
        Float[P 3+].

    Raises:
        UnreadableItemError: the file is missing, is damaged, or holds no point cloud.
    """
    suffix = path.suffix.lower()
    if suffix not in ARRAYS + MESHES:
        raise UnreadableItemError(f"{path}: unknown kind of file; accepted: {', '.join(ARRAYS + MESHES)}")
    try:
        points = _mesh(path, num_points=num_points) if suffix in MESHES else _array(path)
    except (*_DAMAGE, IndexError, TypeError, AttributeError, NotImplementedError) as error:  # readers of meshes raise these as well
        raise UnreadableItemError(f"{path}: {type(error).__name__}: {error}") from error
    if points.ndim != 2 or points.shape[1] < 3 or len(points) == 0:
        raise UnreadableItemError(f"{path}: an array of shape {points.shape}; expected (points, 3 or more)")
    if not np.isfinite(points[:, :3]).all():
        raise UnreadableItemError(f"{path}: some coordinates are not finite")
    return points


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz or .h5 file, by name.

    Raises:
        ValueError: the file is missing, is damaged, or is of another kind.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".h5", ".hdf5"):
        raise ValueError(f"{path}: unknown kind of file; accepted for arrays of many clouds: .npz, .h5, .hdf5")
    try:
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        h5py = _optional("h5py")
        with h5py.File(path, "r") as file:
            return {name: value[()] for name, value in file.items() if isinstance(value, h5py.Dataset)}
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _optional(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(f"the package {name} is needed for this kind of file: pip install 'glpretrain[points]'") from error


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
    raise ValueError(f"the file holds {sorted(arrays)}; accepted names of the points: {', '.join(_POINT_NAMES)}")


def _mesh(path: Path, *, num_points: int) -> np.ndarray:
    trimesh = _optional("trimesh")
    # Without trimesh's processing: merging vertices does not change the surface, and it takes longer than sampling.
    loaded = trimesh.load(path, process=False, force="mesh" if path.suffix.lower() != ".ply" else None)
    if isinstance(loaded, trimesh.Scene):
        loaded = loaded.to_mesh()
    if isinstance(loaded, trimesh.PointCloud):
        return np.asarray(loaded.vertices)
    return sampled_by_area(np.asarray(loaded.vertices), np.asarray(loaded.faces), num_points=num_points)


def sampled_by_area(vertices: np.ndarray, faces: np.ndarray, *, num_points: int) -> np.ndarray:
    """Points that are uniformly distributed on a surface of triangles, the same points in every call.

    Args:
        vertices: Float[V 3], corners of triangles.
        faces: Int[F 3], indices of the corners of each triangle.
        num_points: number of points P.

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
        raise ValueError(f"the {len(faces)} faces have no area")
    draws = keys.uniform(torch.tensor(_MESH_SEED), num_points, 3).double().numpy()
    chosen = np.searchsorted(np.cumsum(areas) / total, draws[:, 0], side="right").clip(max=len(faces) - 1)
    along, across = draws[:, 1:2], draws[:, 2:3]
    beyond = along + across > 1.0  # points in the other half of the parallelogram are mirrored
    along, across = np.where(beyond, 1.0 - along, along), np.where(beyond, 1.0 - across, across)
    return corners[chosen, 0] + along * first[chosen] + across * second[chosen]
