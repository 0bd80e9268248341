"""`Solids`: synthetic point clouds on the surfaces of furniture, vessels and vehicles that consist of boxes, cones, ellipsoids and rings.

Each cloud is a pure function of (seed, split, index), and nothing is downloaded. A class is one way to assemble the primitives. All
proportions are random; the whole is stretched along its axes, rotated about the vertical axis, cut off at one side and blurred, as scans
are incomplete and noisy. Several classes have parts of the same name (leg, handle, body), and a mask gives the part of every point.

Left out: surfaces that are more complex than these primitives.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from glpretrain.core import keys
from glpretrain.core.clouds import in_unit_sphere
from glpretrain.data.sources.base import Item, Source, Split, SyntheticSource
from glpretrain.data.sources.points.clouds import PointSource

_NUM_DRAWS = 12  # random proportions per solid
_STRETCH = 1.6  # largest factor along an axis; the smallest one is its inverse
_CUT = 0.4  # largest share of the surface that is cut off by a plane
_BLUR = 0.02  # standard deviation of the noise on the points, in radii of the whole
PARTS = ("top", "leg", "seat", "back", "base", "stem", "shade", "body", "handle", "neck", "bowl", "head", "wing", "tail", "tip")


class _Piece(NamedTuple):
    """One primitive."""

    part: str
    sample: Callable[[np.ndarray], np.ndarray]  # maps random numbers Float[P 3] in [0, 1) to points on the surface
    area: float
    centre: tuple[float, float, float]


def _box(part: str, x: float, y: float, z: float, centre: tuple[float, float, float]) -> _Piece:
    """A box with sides `x`, `y` and `z`."""
    sides = np.array([x, y, z])
    areas = np.array([y * z, x * z, x * y])

    def sample(draws: np.ndarray) -> np.ndarray:
        face, a, b = draws.T
        edges = np.cumsum(areas) / areas.sum()
        axis = np.searchsorted(edges, face, side="right").clip(max=2)
        far = (face < edges[axis] - areas[axis] / areas.sum() / 2).astype(float)  # which of the two faces perpendicular to the axis
        by_axis = np.array([(far, a, b), (a, far, b), (a, b, far)])  # [3 3 P]
        return (by_axis[axis, :, np.arange(len(draws))] - 0.5) * sides

    return _Piece(part, sample, 2.0 * areas.sum(), centre)


def _cone(part: str, below: float, above: float, height: float, centre: tuple[float, float, float], *, axis: int = 2) -> _Piece:
    """A truncated cone from radius `below` to radius `above`, closed at both ends; a cylinder where both are equal."""
    slant = math.hypot(height, below - above)
    areas = np.array([math.pi * (below + above) * slant, math.pi * below**2, math.pi * above**2])

    def sample(draws: np.ndarray) -> np.ndarray:
        edges = np.cumsum(areas) / areas.sum()
        face = np.searchsorted(edges, draws[:, 0], side="right").clip(max=2)
        # On the lateral surface the density of a height is proportional to the radius at this height.
        low, high = below**2, above**2
        radius = np.sqrt(low + (high - low) * draws[:, 1])
        along = draws[:, 1] if abs(below - above) < 1e-9 else (radius - below) / (above - below)
        radius = np.where(face == 0, radius, np.where(face == 1, below, above) * np.sqrt(draws[:, 1]))
        along = np.where(face == 0, along, np.where(face == 1, 0.0, 1.0))
        angle = 2.0 * math.pi * draws[:, 2]
        points = np.stack([radius * np.cos(angle), radius * np.sin(angle), (along - 0.5) * height], axis=1)
        return np.roll(points, axis - 2, axis=1)

    return _Piece(part, sample, areas.sum(), centre)


def _ellipsoid(part: str, x: float, y: float, z: float, centre: tuple[float, float, float], *, lowest: float = -1.0) -> _Piece:
    """An ellipsoid with radii `x`, `y` and `z`, cut off below `lowest` times its radius `z`."""

    def sample(draws: np.ndarray) -> np.ndarray:
        height = lowest + (1.0 - lowest) * draws[:, 1]
        ring = np.sqrt(np.clip(1.0 - height**2, 0.0, None))
        angle = 2.0 * math.pi * draws[:, 2]
        return np.stack([x * ring * np.cos(angle), y * ring * np.sin(angle), z * height], axis=1)

    mean = ((x * y) ** 1.6 + (x * z) ** 1.6 + (y * z) ** 1.6) / 3.0
    return _Piece(part, sample, 2.0 * math.pi * mean ** (1 / 1.6) * (1.0 - lowest), centre)


def _ring(part: str, radius: float, thickness: float, centre: tuple[float, float, float], *, turn: float = 1.0) -> _Piece:
    """A ring in the plane of x and z. An arc with the share `turn` of the full circle, centred at the direction of x."""

    def sample(draws: np.ndarray) -> np.ndarray:
        around, across = math.pi * turn * (2.0 * draws[:, 1] - 1.0), 2.0 * math.pi * draws[:, 2]
        distance = radius + thickness * np.cos(across)
        return np.stack([distance * np.cos(around), thickness * np.sin(across), distance * np.sin(around)], axis=1)

    return _Piece(part, sample, 4.0 * math.pi**2 * radius * thickness * turn, centre)


def _legs(x: float, y: float, height: float, thickness: float) -> list[_Piece]:
    """Four legs below the plane z = 0."""
    return [_box("leg", thickness, thickness, height, (sx * x, sy * y, -height / 2)) for sx in (-1, 1) for sy in (-1, 1)]


def _table(d: Sequence[float]) -> list[_Piece]:
    x, y, height = 0.8 + 0.5 * d[0], 0.5 + 0.4 * d[1], 0.4 + 0.5 * d[2]
    top = _box("top", 2 * x, 2 * y, 0.08, (0, 0, 0.04)) if d[3] < 0.7 else _cone("top", x, x, 0.08, (0, 0, 0.04))
    return [top, *_legs(0.85 * x if d[3] < 0.7 else 0.6 * x, 0.85 * y if d[3] < 0.7 else 0.6 * x, height, 0.06 + 0.08 * d[4])]


def _chair(d: Sequence[float]) -> list[_Piece]:
    side, height, back = 0.4 + 0.15 * d[0], 0.5 + 0.4 * d[1], 0.6 + 0.5 * d[2]
    seat = _box("seat", 2 * side, 2 * side, 0.08, (0, 0, 0.04))
    return [seat, _box("back", 0.08, 2 * side, back, (-side, 0, back / 2)), *_legs(0.85 * side, 0.85 * side, height, 0.05 + 0.06 * d[3])]


def _stool(d: Sequence[float]) -> list[_Piece]:
    radius, height = 0.35 + 0.2 * d[0], 0.6 + 0.6 * d[1]
    places = [(0.7 * radius * math.cos(angle), 0.7 * radius * math.sin(angle)) for angle in (0.0, 2.1, 4.2)]
    legs = [_cone("leg", 0.04 + 0.04 * d[2], 0.05, height, (x, y, -height / 2)) for x, y in places]
    return [_cone("seat", radius, radius, 0.1 + 0.1 * d[3], (0, 0, 0.05)), *legs]


def _bed(d: Sequence[float]) -> list[_Piece]:
    x, y, head = 0.9 + 0.3 * d[0], 0.45 + 0.3 * d[1], 0.3 + 0.4 * d[2]
    base = _box("base", 2 * x, 2 * y, 0.2 + 0.15 * d[3], (0, 0, 0.1))
    return [base, _box("back", 0.08, 2 * y, head, (-x, 0, head / 2 + 0.1)), *_legs(0.9 * x, 0.9 * y, 0.15 + 0.15 * d[4], 0.1)]


def _lamp(d: Sequence[float]) -> list[_Piece]:
    height, width, shade = 0.8 + 0.6 * d[0], 0.3 + 0.2 * d[1], 0.3 + 0.3 * d[2]
    pieces = [_cone("base", width, width, 0.08, (0, 0, 0)), _cone("stem", 0.04, 0.04, height, (0, 0, height / 2))]
    return [*pieces, _cone("shade", width * (0.9 + 0.4 * d[3]), width * (0.3 + 0.3 * d[4]), shade, (0, 0, height))]


def _mug(d: Sequence[float]) -> list[_Piece]:
    radius, height = 0.35 + 0.2 * d[0], 0.7 + 0.5 * d[1]
    handle = _ring("handle", 0.25 * height + 0.08 * d[2], 0.05 + 0.03 * d[3], (radius, 0, 0), turn=0.5)
    return [_cone("body", radius * (0.8 + 0.2 * d[4]), radius, height, (0, 0, 0)), handle]


def _bottle(d: Sequence[float]) -> list[_Piece]:
    radius, height, neck = 0.28 + 0.15 * d[0], 0.7 + 0.4 * d[1], 0.25 + 0.3 * d[2]
    thin = 0.08 + 0.05 * d[3]
    pieces = [_cone("body", radius, radius, height, (0, 0, 0)), _cone("neck", radius, thin, 0.2, (0, 0, height / 2 + 0.1))]
    return [*pieces, _cone("neck", thin, thin, neck, (0, 0, height / 2 + 0.2 + neck / 2))]


def _goblet(d: Sequence[float]) -> list[_Piece]:
    stem, bowl, width = 0.4 + 0.4 * d[0], 0.4 + 0.3 * d[1], 0.3 + 0.2 * d[2]
    pieces = [_cone("base", width, 0.6 * width, 0.06, (0, 0, 0)), _cone("stem", 0.05, 0.05, stem, (0, 0, stem / 2))]
    return [*pieces, _cone("bowl", 0.4 * width, width * (1.0 + 0.4 * d[3]), bowl, (0, 0, stem + bowl / 2))]


def _mushroom(d: Sequence[float]) -> list[_Piece]:
    stem, cap = 0.5 + 0.5 * d[0], 0.4 + 0.3 * d[1]
    thick = 0.1 + 0.1 * d[2]
    head = _ellipsoid("head", cap, cap, cap * (0.6 + 0.5 * d[3]), (0, 0, stem), lowest=0.0)
    return [_cone("stem", thick, thick * (0.6 + 0.4 * d[4]), stem, (0, 0, stem / 2)), head]


def _hammer(d: Sequence[float]) -> list[_Piece]:
    length, head = 1.2 + 0.6 * d[0], 0.5 + 0.4 * d[1]
    thick = 0.05 + 0.04 * d[2]
    handle = _cone("handle", thick, thick, length, (0, 0, 0))
    high = 0.18 + 0.15 * d[3]
    return [handle, _box("head", head, high, high, (head * 0.2 * (d[4] - 0.5), 0, length / 2))]


def _dumbbell(d: Sequence[float]) -> list[_Piece]:
    length, radius = 0.7 + 0.6 * d[0], 0.25 + 0.2 * d[1]
    bar = _cone("handle", 0.07, 0.07, length, (0, 0, 0), axis=0)
    if d[2] < 0.5:
        return [bar, *(_ellipsoid("head", radius, radius, radius, (sign * length / 2, 0, 0)) for sign in (-1, 1))]
    return [bar, *(_cone("head", radius, radius, 0.1 + 0.2 * d[3], (sign * length / 2, 0, 0), axis=0) for sign in (-1, 1))]


def _plane(d: Sequence[float]) -> list[_Piece]:
    length, span, chord = 1.6 + 0.6 * d[0], 1.2 + 0.8 * d[1], 0.25 + 0.15 * d[2]
    body = _ellipsoid("body", length / 2, 0.13 + 0.06 * d[3], 0.13 + 0.06 * d[3], (0, 0, 0))
    wing = _box("wing", chord, span, 0.03, (0.15 * (d[4] - 0.5), 0, 0.1 * (d[5] - 0.5)))
    fin = _box("tail", 0.2, 0.03, 0.25 + 0.15 * d[6], (-0.45 * length, 0, 0.15))
    return [body, wing, fin, _box("tail", 0.15, 0.4 + 0.2 * d[7], 0.03, (-0.45 * length, 0, 0.05))]


def _rocket(d: Sequence[float]) -> list[_Piece]:
    height, radius, tip = 1.0 + 0.6 * d[0], 0.2 + 0.12 * d[1], 0.3 + 0.4 * d[2]
    fin = 0.25 + 0.2 * d[3]
    fins = [
        _box("wing", 2 * (radius + fin), 0.03, fin, (0, 0, -height / 2)),
        _box("wing", 0.03, 2 * (radius + fin), fin, (0, 0, -height / 2)),
    ]
    return [_cone("body", radius, radius, height, (0, 0, 0)), _cone("tip", radius, 0.01, tip, (0, 0, height / 2 + tip / 2)), *fins]


def _house(d: Sequence[float]) -> list[_Piece]:
    x, y, height, roof = 0.5 + 0.3 * d[0], 0.4 + 0.2 * d[1], 0.4 + 0.4 * d[2], 0.3 + 0.4 * d[3]
    pieces = [
        _box("body", 2 * x, 2 * y, height, (0, 0, 0)),
        _cone("top", math.hypot(x, y) * 1.1, 0.01, roof, (0, 0, height / 2 + roof / 2)),
    ]
    if d[4] < 0.6:  # a chimney
        pieces.append(_box("neck", 0.12, 0.12, roof, (0.5 * x, 0.5 * y, height / 2 + roof / 2)))
    return pieces


def _key(d: Sequence[float]) -> list[_Piece]:
    length, radius, thick = 1.0 + 0.5 * d[0], 0.25 + 0.15 * d[1], 0.05 + 0.03 * d[2]
    pieces = [_ring("handle", radius, thick, (0, 0, 0)), _cone("stem", thick, thick, length, (radius + length / 2, 0, 0), axis=0)]
    teeth = 2 + int(2 * d[3])
    return [*pieces, *(_box("tip", 0.08, 0.06, 0.25 + 0.1 * d[4], (radius + length * (1 - 0.18 * n), 0, -0.12)) for n in range(teeth))]


_CLASSES: dict[str, Callable[[Sequence[float]], list[_Piece]]] = {
    "table": _table,
    "chair": _chair,
    "stool": _stool,
    "bed": _bed,
    "lamp": _lamp,
    "mug": _mug,
    "bottle": _bottle,
    "goblet": _goblet,
    "mushroom": _mushroom,
    "hammer": _hammer,
    "dumbbell": _dumbbell,
    "plane": _plane,
    "rocket": _rocket,
    "house": _house,
    "key": _key,
}
CLASSES = tuple(_CLASSES)


class Solids(SyntheticSource, PointSource):
    """Point clouds on assembled solids, in the unit sphere. The label is the kind of solid, and the masks are its parts.

    Args:
        length: number of clouds.
        num_points: number of points of each cloud.
        split: `train` and `test` have the same classes with different proportions.
        seed: seed of all clouds.

    Raises:
        ValueError: `length` or `num_points` is too small, or `split` is unknown.
    """

    name = "solids"
    classes = CLASSES
    mask_classes = PARTS

    def __init__(self, length: int, *, num_points: int = 1024, split: Split = "train", seed: int = 0) -> None:
        super().__init__(length, split=split, seed=seed)
        if num_points < 32:
            raise ValueError(f"Solids: num_points is {num_points}; expected at least 32")
        self.num_points = num_points

    def with_split(self, split: Split, *, length: int) -> Source:
        return Solids(length, num_points=self.num_points, split=split, seed=self.seed)

    def __getitem__(self, index: int) -> Item:
        key = self.key(index)
        label, turn, cut, *rest = keys.uniform(keys.fold_in(key, 0), 6 + _NUM_DRAWS).tolist()
        label = int(label * len(CLASSES))
        pieces = _CLASSES[CLASSES[label]](rest[3:])
        points, chosen = _surface(pieces, keys.uniform(keys.fold_in(key, 1), 2 * self.num_points, 4).double().numpy())
        points *= np.exp(math.log(_STRETCH) * (2 * np.array(rest[:3]) - 1))
        # The points that are farthest in one direction are cut off. The others are in random order, and the first of them are kept.
        direction = keys.normal(keys.fold_in(key, 2), 3).double().numpy()
        depth = points @ direction
        seen = np.flatnonzero(depth <= np.quantile(depth, 1 - _CUT * cut))[: self.num_points]
        points, chosen = points[seen], chosen[seen]
        sine, cosine = math.sin(2 * math.pi * turn), math.cos(2 * math.pi * turn)
        points = points @ np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]])
        radius = np.linalg.norm(points - points.mean(axis=0), axis=1).max()
        points += _BLUR * radius * keys.normal(keys.fold_in(key, 3), self.num_points, 3).double().numpy()
        semantic = torch.tensor([PARTS.index(piece.part) for piece in pieces])[torch.from_numpy(chosen)]  # [P]
        instances = 1 + semantic.unique(return_inverse=True)[1]
        return Item(in_unit_sphere(torch.from_numpy(points).to(torch.float32)), label, instances, None, semantic)


def _surface(pieces: Sequence[_Piece], draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points that are uniformly distributed on all pieces together.

    Args:
        pieces: primitives.
        draws: Float[P 4], random numbers in [0, 1).

    Returns:
        Float[P 3] points, and Int[P] index of the piece of each point.
    """
    edges = np.cumsum([piece.area for piece in pieces])
    chosen = np.searchsorted(edges / edges[-1], draws[:, 0], side="right").clip(max=len(pieces) - 1)
    points = np.empty((len(draws), 3))
    for number, piece in enumerate(pieces):
        own = chosen == number
        points[own] = piece.sample(draws[own, 1:]) + np.array(piece.centre)
    return points, chosen
