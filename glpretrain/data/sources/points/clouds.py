"""Point clouds: read from arrays (.npy, .npz, .h5, .txt) or sampled on meshes (.off, .ply, .obj), as items of a source.

Left out: the formats (`arrays`, `meshes`), and the class of a file (`own_clouds`, `datasets`).
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.core.clouds import in_unit_sphere
from glpretrain.data.sources.base import Item, Source, UnreadableItemError, reason_of
from glpretrain.data.sources.points.arrays import STACKS, TEXTS, read_arrays, read_npy, read_text
from glpretrain.data.sources.points.meshes import MESHES, read_surface

ARRAYS = (".npy", *STACKS, *TEXTS)
_POINT_NAMES = ("points", "data", "pc", "xyz", "arr_0")
_LARGEST = 1e30  # a coordinate beyond this does not fit into float32 with room for what is computed from it
_MESH_SEED = 0x3E54


class PointSource(Source):
    """A source of point clouds: `image` is Float[P 3], and masks are Int[P]."""

    @property
    def modality(self) -> Literal["points"]:
        return "points"


def some_of(points: np.ndarray) -> np.ndarray:
    """A few of the clouds of an array, which tell it from another one."""
    return points[:: max(1, len(points) // 64)]


def cloud_item(
    points: np.ndarray,
    *,
    name: object,
    label: int,
    normalise: bool,
    instances: Tensor | None = None,
    semantic: Tensor | None = None,
) -> Item:
    """A point cloud as an item.

    Args:
        points: Float[P 3+]; the columns after the third (normals, colours) are dropped.
        name: path of the file, or whatever else names the cloud.
        label: class, or -1.
        normalise: whether the cloud is centred at its mean and scaled into the unit sphere.
        instances: Int[P].
        semantic: Int[P].

    Raises:
        UnreadableItemError: the array is no cloud, or some coordinates are not finite or too large.
    """
    try:
        _check_cloud(points)
        # In float64, because coordinates of a map have up to seven digits before the point, and float32 has seven in all.
        cloud = torch.from_numpy(points[:, :3].astype(np.float64))
    except ValueError as error:
        raise UnreadableItemError(f"{name}: {error}") from error
    values = (in_unit_sphere(cloud) if normalise else cloud).to(torch.float32)
    return Item(values, label, instances, None, semantic)


def _check_cloud(points: np.ndarray) -> None:
    if points.dtype.kind not in "biuf":
        raise ValueError(f"an array of type {points.dtype}; expected numbers")
    if points.ndim != 2 or points.shape[1] < 3 or len(points) == 0:
        raise ValueError(f"an array of shape {points.shape}; expected (points, 3 or more)")
    usable = np.abs(points[:, :3], dtype=np.float64) < _LARGEST  # not NaN
    if count := int((~usable.all(axis=1)).sum()):
        raise ValueError(f"{count} of {len(points)} points have coordinates that are not finite or too large")


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
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError("there is no such file")
        points = _mesh(path, num_points=num_points) if suffix in MESHES else _array(path)
        _check_cloud(points)
    except (UnreadableItemError, ModuleNotFoundError):
        raise
    except Exception as error:  # a reader may raise anything for a damaged file
        raise UnreadableItemError(f"{path}: {reason_of(error)}") from error
    return points


def _array(path: Path) -> np.ndarray:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        with path.open("rb") as file:
            return read_npy(file, length=path.stat().st_size)
    if suffix in TEXTS:
        return read_text(path)
    arrays = read_arrays(path)
    for name in _POINT_NAMES:
        if name in arrays:
            return arrays[name]
    raise ValueError(f"the file holds {sorted(arrays)}; accepted names of the points: {', '.join(_POINT_NAMES)}")


def _mesh(path: Path, *, num_points: int) -> np.ndarray:
    surface = read_surface(path)
    if path.suffix.lower() == ".ply" and len(surface.faces) == 0:
        return surface.vertices
    return sampled_by_area(surface.vertices, surface.faces, num_points=num_points)


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
