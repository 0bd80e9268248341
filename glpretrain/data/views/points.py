"""Views of clouds of points, made by workers: spherical crops, rotation, scale, translation, jitter, dropout.

As in `multicrop`, all draws come from one key per item; there is a loop over settings but none over views or clouds. The crops are those
of POS-BERT (fukexue/POS-BERT at d922651, dataloader.py): the points nearest to a random one; where a crop has fewer points than the view,
means of four neighbours are added. Known differences: points are transformed and jittered after the crop, not before, and a point whose
neighbours are averaged twice gives the same mean twice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.core.batch import ViewGroup
from glpretrain.core.clouds import farthest_points, nearest_points, squared_distances, take
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.sources.base import Source
from glpretrain.data.views.base import ViewMaker, Views
from glpretrain.data.views.changes import Changes
from glpretrain.modalities.points import with_count

_CROP, _ROTATION, _SCALE, _TRANSLATION, _JITTER, _DROPOUT = range(6)
_LOCAL, _COARSE = 1 << 16, 1 << 17  # numbers of their first views, so that one more global view changes no other
_SAMPLE = 1 << 18  # what the key of an item is folded with to draw the points that all its views are made from
_AVERAGED = 4  # points in the mean that completes a crop
_ORDER_BITS = 61


@dataclass(frozen=True)
class PointViewSpec:
    """One view of a cloud, or `count` equal ones. Settings that are left out change nothing.

    Args:
        points: number of points P of the view.
        keep: smallest and largest share of the item's points that a crop covers.
        count: number of such views.
        sampling: how the view's points are chosen from the crop: at random, or each the farthest from all before it.
        rotation: axis of a random rotation; `any` draws from all rotations.
        scale: smallest and largest factor, drawn for every axis.
        translation: largest shift along every axis.
        jitter: standard deviation of the noise on coordinates.
        jitter_limit: largest absolute value of the jitter.
        dropout: largest share of points that are moved onto the view's first point; the share is drawn uniformly (PointNet++: 0.875).

    Raises:
        ValueError: a value outside its range.
    """

    points: int
    keep: tuple[float, float] = (1.0, 1.0)
    count: int = 1
    sampling: Literal["random", "farthest"] = "random"
    rotation: Literal["none", "x", "y", "z", "any"] = "none"
    scale: tuple[float, float] = (1.0, 1.0)
    translation: float = 0.0
    jitter: float = 0.0
    jitter_limit: float = 0.05
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.points < 1 or self.count < 1:
            raise ValueError(f"PointViewSpec: points and count are at least 1, not {self.points} and {self.count}")
        for name, value, high in (("keep", self.keep, 1.0), ("scale", self.scale, math.inf)):
            if len(value) != 2 or not 0.0 < value[0] <= value[1] <= high:
                raise ValueError(f"PointViewSpec: {name} is a (smallest, largest) pair above 0 and at most {high:g}, not {tuple(value)}")
        if self.sampling not in ("random", "farthest"):
            raise ValueError(f"PointViewSpec: sampling is 'random' or 'farthest', not {self.sampling!r}")
        if self.rotation not in ("none", "x", "y", "z", "any"):
            raise ValueError(f"PointViewSpec: rotation is none, x, y, z or any, not {self.rotation!r}")
        for name, value in (("translation", self.translation), ("jitter", self.jitter), ("jitter_limit", self.jitter_limit)):
            if value < 0.0:
                raise ValueError(f"PointViewSpec: {name} is at least 0, not {value}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"PointViewSpec: dropout is a share in [0, 1), not {self.dropout}")


class PointCrops(ViewMaker):
    """Crops, turns, scales and shifts clouds of points.

    Args:
        global_views: settings of the global views, in order; all of one number of points.
        local_views: settings of the local views, in order; all of one number of points.
        coarse_views: settings of views at other resolutions; every entry may have its own number of points.
        item_points: number of points that every item is brought to before it is cropped; when left out, `num_points`, or
            that of the largest view.
        num_points: number of points of an item that all its views are made from, drawn anew in every epoch without replacement, as POS-BERT
            draws 1,024 of 2,048; None takes all points of the item.

    Raises:
        ValueError: no global view, views that are stacked have different numbers of points, `num_points` is below 1 or above the points of
            an item, or so few points are left that a crop lacks the four whose mean completes it.
    """

    modality = "points"

    def __init__(
        self,
        global_views: list[PointViewSpec],
        local_views: list[PointViewSpec] | None = None,
        coarse_views: list[PointViewSpec] | None = None,
        item_points: int | None = None,
        num_points: int | None = None,
    ) -> None:
        super().__init__()
        if not global_views:
            raise ValueError("PointCrops: global_views is empty; give at least one PointViewSpec")
        for name, specs in (("global_views", global_views), ("local_views", local_views or [])):
            if len(numbers := sorted({spec.points for spec in specs})) > 1:
                raise ValueError(f"PointCrops: {name} have {numbers} points; they are stacked, so give all of them one number")
        if num_points is not None and num_points < 1:
            raise ValueError(f"PointCrops: num_points is at least 1, or null for all, not {num_points}")
        self.num_points = num_points
        self.global_views = tuple(global_views)
        self.local_views = tuple(local_views or ())
        self.coarse_views = tuple(coarse_views or ())
        specs = (*self.global_views, *self.local_views, *self.coarse_views)
        self.item_points = max(num_points or 0, *(spec.points for spec in specs)) if item_points is None else item_points
        if num_points is not None and num_points > self.item_points:
            raise ValueError(f"PointCrops: num_points is {num_points}, but an item has item_points = {self.item_points}; raise item_points")
        left = self.item_points if num_points is None else num_points
        for spec in specs:
            if math.ceil(spec.keep[0] * left) < _AVERAGED:
                raise ValueError(
                    f"PointCrops: {left} points of an item leave fewer than {_AVERAGED} where keep is {spec.keep[0]}; raise one of them"
                )

    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """`global`, `local` and a `coarse_<points>` for every lower resolution; points and coordinates of each."""
        return {
            name: (sum(spec.count for _, spec in specs), (specs[0][1].points, num_channels)) for name, specs in self._numbered().items()
        }

    def _numbered(self) -> dict[str, list[tuple[int, PointViewSpec]]]:
        """Settings by group, each with the number of its first view, by which its draws differ from those of other views."""
        found: dict[str, list[tuple[int, PointViewSpec]]] = {}
        for kind, first, specs in (
            ("global", 0, self.global_views),
            ("local", _LOCAL, self.local_views),
            ("coarse", _COARSE, self.coarse_views),
        ):
            for spec in specs:
                found.setdefault(f"coarse_{spec.points}" if kind == "coarse" else kind, []).append((first, spec))
                first += spec.count
        return found

    def default_size(self) -> int:
        """The number of points of an item."""
        return self.item_points

    def read(self, source: Source, index: int) -> Item:
        """The item with exactly `item_points` points."""
        return with_count(source[index], self.item_points)

    @torch.no_grad()
    def prepare(self, items: Sequence[Item], *, keys: Tensor, card: EncoderCard) -> dict[str, Tensor]:
        """By the name of each group its views Float[B V p 3], and as `<name>_frames` Float[B V 3 4]; coordinates as they are in the file.

        They are made here and not on the device: clouds are small, and what is done to them is hundreds of operations on few numbers, for
        each of which a GPU would take longer to begin than to compute it.
        """
        parts = {}
        for name, group in self(torch.stack([item.values for item in items]), keys=keys).groups.items():
            parts |= {name: group.items.transpose(0, 1), f"{name}_frames": group.frame.transpose(0, 1)}
        return parts

    def make(self, parts: Mapping[str, Tensor], *, changes: Mapping[str, Changes], keys: Tensor, card: EncoderCard) -> Views:
        """The views that `prepare` made."""
        names = self._numbered()
        return Views({name: ViewGroup(parts[name].transpose(0, 1), frame=parts[f"{name}_frames"].transpose(0, 1)) for name in names})

    @torch.no_grad()
    def forward(self, points: Tensor, *, keys: Tensor) -> Views:
        """Make the views of a batch.

        Args:
            points: Float[B P 3].
            keys: Int[B], one key per item.

        Returns:
            Views in float32.
        """
        points = points.to(torch.float32)
        if self.num_points is not None:
            points = take(points, rng.permutation(rng.fold_in(keys, _SAMPLE), points.shape[1])[:, : self.num_points])
        groups = {}
        for name, specs in self._numbered().items():
            made = [_views_of(points, spec=spec, keys=rng.numbered(keys, count=spec.count, first=first)) for first, spec in specs]
            views, frames = zip(*made, strict=True)
            groups[name] = ViewGroup(torch.cat(views), frame=torch.cat(frames))
        return Views(groups)


def _views_of(points: Tensor, *, spec: PointViewSpec, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Float[v B p 3] and Float[v B 3 4]: the views of one setting and their frames, for keys Int[v B]."""
    repeated = points.expand(len(keys), *points.shape).flatten(0, 1)  # [(v B) P 3]
    views, frames = view_of(repeated, spec=spec, keys=keys.flatten())
    return views.unflatten(0, keys.shape), frames.unflatten(0, keys.shape)


def view_of(points: Tensor, *, spec: PointViewSpec, keys: Tensor) -> tuple[Tensor, Tensor]:
    """One view of every cloud.

    Args:
        points: Float[B P 3].
        spec: settings of the view.
        keys: Int[B].

    Returns:
        Float[B p 3], p points of the view in random order (or in farthest-point order from a random point on), and the frame
        Float[B 3 4] that takes them back to the cloud, jitter and dropout aside.
    """
    view = _cropped(points, spec=spec, keys=rng.fold_in(keys, _CROP))
    back = torch.eye(3, 4, device=view.device).repeat(len(view), 1, 1)  # [B 3 4]
    if spec.rotation != "none":
        rotation = rotations(rng.fold_in(keys, _ROTATION), axis=spec.rotation)
        view = (rotation.unsqueeze(1) * view.unsqueeze(2)).sum(dim=3)  # no matrix product, which may run in half precision or TF32
        back[..., :3] = rotation.transpose(1, 2)
    if spec.scale != (1.0, 1.0):
        low, high = spec.scale
        scale = low + (high - low) * rng.uniform(rng.fold_in(keys, _SCALE), 1, 3)  # [B 1 3]
        view = view * scale
        back[..., :3] = back[..., :3] / scale
    if spec.translation > 0.0:
        shift = spec.translation * (2.0 * rng.uniform(rng.fold_in(keys, _TRANSLATION), 1, 3) - 1.0)  # [B 1 3]
        view = view + shift
        back[..., 3] = -(back[..., :3] * shift).sum(dim=2)
    if spec.jitter > 0.0:
        noise = spec.jitter * rng.normal(rng.fold_in(keys, _JITTER), *view.shape[1:])
        view = view + noise.clamp(-spec.jitter_limit, spec.jitter_limit)
    if spec.dropout > 0.0:
        draws = rng.uniform(rng.fold_in(keys, _DROPOUT), view.shape[1] + 1)  # [B p+1]
        fallen = draws[:, 1:] < spec.dropout * draws[:, :1]
        view = torch.where(fallen.unsqueeze(2), view[:, :1], view)
    return view, back


def _cropped(points: Tensor, *, spec: PointViewSpec, keys: Tensor) -> Tensor:
    """Float[B p 3]: points near a random one, as many as the view has."""
    num_items, num_points, _ = points.shape
    low, high = (math.ceil(share * num_points) for share in spec.keep)
    inside = torch.ones(num_items, num_points, dtype=torch.bool, device=points.device)
    count = torch.full((num_items,), num_points, device=points.device)  # of the points inside
    if low < num_points:
        centre = take(points, rng.integers(rng.fold_in(keys, 0), 0, num_points, 1))  # [B 1 3]
        share = spec.keep[0] + (spec.keep[1] - spec.keep[0]) * rng.uniform(rng.fold_in(keys, 1))
        count = torch.ceil(share * num_points).clamp(low, high).to(torch.int64)  # [B]
        order = squared_distances(centre, points).squeeze(1).argsort(dim=1, stable=True)  # [B P]
        inside = torch.zeros_like(inside).scatter(1, order, torch.arange(num_points, device=points.device) < count.unsqueeze(1))
    # Points inside first, in random order: integers, since floats of 24 bits would tie.
    draws = (rng.bits(rng.fold_in(keys, 2), num_points) & ((1 << _ORDER_BITS) - 1)) + (~inside).to(torch.int64) * (1 << _ORDER_BITS)
    order = draws.argsort(dim=1)  # [B P]
    if spec.sampling == "farthest" and spec.points < num_points:
        ordered = take(points, order)
        # Points outside are moved onto the first one, so that they are taken last.
        alike = torch.where((torch.arange(num_points, device=points.device) < count.unsqueeze(1)).unsqueeze(2), ordered, ordered[:, :1])
        return take(alike, farthest_points(alike, count=spec.points))
    position = torch.arange(spec.points, device=points.device).expand(num_items, -1)  # [B p]
    chosen = take(points, order.gather(1, position % count.unsqueeze(1)))  # [B p 3]
    if spec.points > low:  # some crop may have too few points: its last ones become means of neighbours
        late = chosen[:, low:]
        among = torch.where(inside.unsqueeze(2), points, torch.inf)
        means = take(points, nearest_points(late, among, count=_AVERAGED)).mean(dim=2)  # [B p-low 3]
        added = (position[:, low:] >= count.unsqueeze(1)).unsqueeze(2)
        chosen = torch.cat([chosen[:, :low], torch.where(added, means, late)], dim=1)
    return chosen


def rotations(keys: Tensor, *, axis: Literal["x", "y", "z", "any"]) -> Tensor:
    """Uniformly random rotations, Float[B 3 3], about one axis or, with "any", over all of them."""
    if axis == "any":
        quaternion = torch.nn.functional.normalize(rng.normal(keys, 4), dim=1)
    else:
        half = torch.pi * rng.uniform(keys)
        about = torch.zeros(len(keys), 3, device=keys.device)
        about[:, "xyz".index(axis)] = half.sin()
        quaternion = torch.cat([half.cos().unsqueeze(1), about], dim=1)
    w, x, y, z = quaternion.unbind(dim=1)
    return torch.stack(list(_rotation_rows(w, x, y, z)), dim=1).unflatten(1, (3, 3))


def _rotation_rows(w: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Sequence[Tensor]:
    return (
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    )
