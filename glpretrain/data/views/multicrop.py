"""Multi-crop: crops of a picture's own pixels, made by workers; flips, colours and normalisation of all of them on the device.

All draws come from one key per item (`glpretrain.core.keys`), so views do not depend on the batch, the process or the device, and a worker
knows the boxes of an item before the device sees it. So the pixels of a view are resampled once, from the decoded file, and what is moved
to the device has the size of the views, whatever the size of the picture. Strong augmentation works on whole pictures, so that workers do
it. What the device does is batched over items and views, and nothing there waits for the device.

A picture that is so large that every crop of it would be scaled down by four or more is first reduced by a power of two, which a JPEG
decoder does in a fraction of the time. Left out: masks over tokens (`masking`), reading files (`sources`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.core.batch import ViewGroup
from glpretrain.core.frames import crop_frames
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.sources.base import Source
from glpretrain.data.views.base import ViewMaker, Views
from glpretrain.data.views.colour import augment, require_rgb
from glpretrain.data.views.erasing import erase
from glpretrain.data.views.randaugment import apply_where, rand_augment
from glpretrain.data.views.resample import crop, crop_labels, pixel_boxes, random_boxes, reduced, reduction
from glpretrain.data.views.spec import Strong, ViewSpec
from glpretrain.data.views.stain import quarter_turns, turn

_BOX, _COLOUR, _STRONG, _RAND_AUGMENT, _ERASE, _TURN = range(6)
# Number of the first view of each kind, so that one more global view changes no local one.
_LOCAL, _STUDENT, _ALL_STUDENT_VIEWS = (kind << 16 for kind in range(1, 4))
_LEAST_SHRINKING = 4  # of crops of a picture that was reduced before: less would cost more than 2 % of the energy of their gradients


class Kind(NamedTuple):
    """A group of views."""

    name: str
    first: int  # number of its first view, which tells its draws from those of other views
    specs: tuple[ViewSpec, ...]

    def keyed(self, keys: Tensor) -> Iterator[tuple[ViewSpec, Tensor]]:
        """Each setting with keys Int[v B] of its views, for keys Int[B] of items."""
        first = self.first
        for spec in self.specs:
            yield spec, torch.stack([rng.fold_in(keys, first + number) for number in range(spec.count)])
            first += spec.count

    def strong(self, keys: Tensor, view_keys: Tensor, *, spec: ViewSpec) -> Tensor:
        """Bool[v B]: which views of this setting are strongly augmented; the student's views of an item are all, or none."""
        if self.name == "student":
            return _is_strong(rng.fold_in(keys, _ALL_STUDENT_VIEWS), spec.strong).expand(view_keys.shape)
        return _is_strong(rng.fold_in(view_keys, _STRONG), spec.strong)


def _check_sizes(name: str, specs: Sequence[ViewSpec]) -> None:
    shapes = sorted({spec.shape for spec in specs})
    if len(shapes) > 1:
        raise ValueError(f"MultiCrop: {name} have sizes {shapes}; they are stacked, so give all of them one size")


def _normalise(views: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    # Channel by channel with Python numbers: a tensor made from a list would be copied to the device and waited for.
    for channel, centre, spread in zip(views.unbind(2), mean, std, strict=True):
        channel.sub_(centre).div_(spread)
    return views


class MultiCrop(ViewMaker):
    """Crops, flips, colours and normalises images.

    Args:
        global_views: settings of the global views, in order.
        local_views: settings of the local views, in order.
        student_views: settings of the student's own views of the global size, in order, for methods whose teacher sees the
            global ones. One draw per item decides whether all of them are strongly augmented or none.

    Raises:
        ValueError: no global view, globals (or locals) of different sizes, or student views of another size than the globals or
            with different `strong`.
    """

    modality = "image"

    def __init__(
        self, global_views: list[ViewSpec], local_views: list[ViewSpec] | None = None, student_views: list[ViewSpec] | None = None
    ) -> None:
        super().__init__()
        if not global_views:
            raise ValueError("MultiCrop: global_views is empty; give at least one ViewSpec")
        _check_sizes("global_views", global_views)
        _check_sizes("local_views", local_views or [])
        _check_sizes("global_views and student_views", [*global_views, *(student_views or [])])
        strong = [spec.strong for spec in student_views or []]
        if any(setting != strong[0] for setting in strong):
            raise ValueError(
                f"MultiCrop: student_views have strong {strong}; one draw decides for all of them, so give all of them the same"
            )
        self.global_views = tuple(global_views)
        self.local_views = tuple(local_views or ())
        self.student_views = tuple(student_views or ())

    def kinds(self) -> list[Kind]:
        """The groups of views that the recipe asks for."""
        kinds = (
            Kind("global", 0, self.global_views),
            Kind("local", _LOCAL, self.local_views),
            Kind("student", _STUDENT, self.student_views),
        )
        return [kind for kind in kinds if kind.specs]

    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """`global`, and `local` and `student` where the recipe asks for them; channels, height and width of each."""
        return {kind.name: (sum(spec.count for spec in kind.specs), (num_channels, *kind.specs[0].shape)) for kind in self.kinds()}

    def default_size(self) -> int:
        """A third more than the view, rounded up."""
        return -(-4 * max(self.global_views[0].shape) // 3)

    def ample_side(self) -> int:
        """Pixels on the shorter side of a picture that are enough for every crop to be scaled down by four or more."""
        needed = 0.0
        for spec in (*self.global_views, *self.local_views, *self.student_views):
            (height, width), (low, high) = spec.shape, spec.ratio
            needed = max(needed, width / math.sqrt(spec.scale[0] * low), height * math.sqrt(high / spec.scale[0]))
        return math.ceil(_LEAST_SHRINKING * needed)

    def read(self, source: Source, index: int) -> Item:
        """The picture at its own size; a very large one at a half, a quarter and so on, unless it has a region map."""
        side = self.ample_side()
        item = source.reduced(index, side=side)
        if item.regions is not None:
            return item._replace(regions=item.regions.to(torch.int16))
        factor = reduction(*item.values.shape[1:], side=side)
        return item if factor == 1 else item._replace(values=reduced(item.values, factor=factor))

    @torch.no_grad()
    def prepare(self, items: Sequence[Item], *, keys: Tensor, card: EncoderCard) -> dict[str, Tensor]:
        """Crops that are ready for flips, turns and colours.

        Args:
            items: pictures UInt8[C H W], each of its own size, with or without region maps Int[H W].
            keys: Int[B], one key per item.
            card: card of the encoder; its mean fills the empty places that strong augmentation leaves.

        Returns:
            By the name of each group its crops UInt8[B V C h w], and as `<name>_boxes` Float[B V 5] their boxes x0 y0 x1 y1 in the unit
            square of the item and their orientation: 1 for a flip, and 2 for each quarter turn after it. As `regions`, Int[B G h w], the
            region maps cut as the global views.

        Raises:
            ValueError: items have other channels than the card, an operation needs RGB and there is none, or a region map has not the
                size of its item.
        """
        for item in items:
            self._require(item, card=card)
        parts: dict[str, Tensor] = {}
        for kind in self.kinds():
            crops, boxes, regions = [], [], []
            for spec, view_keys in kind.keyed(keys):
                unit, pixels = _drawn_boxes(items, spec=spec, keys=view_keys)
                strong = kind.strong(keys, view_keys, spec=spec)
                for view, (view_boxes, corners) in enumerate(zip(unit, pixels.tolist(), strict=True)):
                    pictures = _pictures(items, spec=spec, keys=view_keys[view], selected=strong[view], boxes=view_boxes, mean=card.mean)
                    cut = partial(crop, size=spec.shape, interpolation=spec.interpolation)
                    crops.append(torch.stack([cut(picture, box=box) for picture, box in zip(pictures, corners, strict=True)]))
                    maps = [item.regions for item in items if item.regions is not None]
                    if kind.name == "global" and maps:
                        regions.append(torch.stack([crop_labels(m, box=b, size=spec.shape) for m, b in zip(maps, corners, strict=True)]))
                boxes.append(unit)
            parts[kind.name] = torch.stack(crops, dim=1)
            parts[f"{kind.name}_boxes"] = torch.cat(boxes).transpose(0, 1)
            if regions:
                parts["regions"] = torch.stack(regions, dim=1)
        return parts

    def _require(self, item: Item, *, card: EncoderCard) -> None:
        channels, *size = item.values.shape
        for name, values in (("mean", card.mean), ("std", card.std)):
            if len(values) != channels:
                raise ValueError(f"views: {name} has {len(values)} numbers, but the items have {channels} channels")
        if item.regions is not None and list(item.regions.shape) != size:
            raise ValueError(f"views: regions are {tuple(item.regions.shape)}, but the item is {tuple(size)}; one id per pixel")
        for spec in (*self.global_views, *self.local_views, *self.student_views):
            require_rgb(spec, channels=channels)

    @torch.no_grad()
    def make(self, parts: Mapping[str, Tensor], *, keys: Tensor, card: EncoderCard) -> Views:
        """Views in float32 of what `prepare` gave."""
        # Under autocast the matrix products of the blur would run in half precision and lose more than the 8 bits of the input hold. The
        # 11 bits of TF32, where a run allows it for float32, cost about one level at worst.
        with torch.autocast(device_type=keys.device.type, enabled=False):
            groups = {kind.name: self._group(kind, parts, keys=keys, card=card) for kind in self.kinds()}
        if "student" in groups:
            strong = _is_strong(rng.fold_in(keys, _ALL_STUDENT_VIEWS), self.student_views[0].strong)  # [B]
            groups["student"] = groups["student"]._replace(strong=strong)
        regions = None
        if "regions" in parts:
            cut = parts["regions"].transpose(0, 1).unsqueeze(2).long()  # [G B 1 h w]
            regions = _oriented(cut, boxes=parts["global_boxes"].transpose(0, 1), specs=self.global_views).squeeze(2)
        return Views(groups, regions=regions)

    @staticmethod
    def _group(kind: Kind, parts: Mapping[str, Tensor], *, keys: Tensor, card: EncoderCard) -> ViewGroup:
        """A group of V views with their frames."""
        boxes = parts[f"{kind.name}_boxes"].transpose(0, 1)  # [V B 5]
        crops = _oriented(parts[kind.name].transpose(0, 1), boxes=boxes, specs=kind.specs)  # [V B C h w]
        made, first = [], 0
        for spec, view_keys in kind.keyed(keys):
            views = crops[first : first + spec.count].flatten(0, 1).to(torch.float32).div_(255.0)  # [(v B) C h w]
            first += spec.count
            colour_keys = rng.fold_in(view_keys, _COLOUR).flatten()
            if spec.strong is None:
                views = augment(views, spec=spec, keys=colour_keys)
            else:
                strong = kind.strong(keys, view_keys, spec=spec).flatten()
                views = apply_where(views, where=~strong, change=partial(augment, spec=spec), per_item={"keys": colour_keys})
                views = erase(views, keys=rng.fold_in(view_keys, _ERASE).flatten(), selected=strong, prob=spec.strong.erase_prob)
            made.append(views.unflatten(0, view_keys.shape))
        frame = crop_frames(boxes[..., :4], flip=boxes[..., 4] % 2 > 0.5, turns=(boxes[..., 4] // 2).long())
        return ViewGroup(_normalise(torch.cat(made), mean=card.mean, std=card.std), frame=frame)


def _is_strong(keys: Tensor, strong: Strong | None) -> Tensor:
    """Bool[*S] for keys Int[*S]."""
    return rng.uniform(keys) < (0.0 if strong is None else strong.prob)


def _drawn_boxes(items: Sequence[Item], *, spec: ViewSpec, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes and orientations Float[v B 5] as `prepare` gives them, and the boxes in pixels Int[v B 4], for keys Int[v B] of views."""
    sizes = torch.tensor([item.values.shape[:0:-1] for item in items])  # [B 2]  width and height
    aspect = sizes[:, 0].double() / sizes[:, 1]
    drawn = random_boxes(rng.fold_in(keys, _BOX), aspect=aspect, scale=spec.scale, ratio=spec.ratio, flip=spec.flip)  # [v B 5]
    pixels = pixel_boxes(drawn[..., :4], sizes=sizes)
    orientation = drawn[..., 4:]
    if spec.turn_prob > 0:
        orientation = orientation + 2 * quarter_turns(rng.fold_in(keys, _TURN), prob=spec.turn_prob).unsqueeze(-1)
    return torch.cat((pixels.double() / sizes.repeat(1, 2), orientation), dim=-1).float(), pixels


def _pictures(
    items: Sequence[Item], *, spec: ViewSpec, keys: Tensor, selected: Tensor, boxes: Tensor, mean: Sequence[float]
) -> Iterator[Tensor]:
    """The pictures that one view is cut from, by keys Int[B]; those that Bool[B] selects after RandAugment."""
    for number, (item, is_strong) in enumerate(zip(items, selected.tolist(), strict=True)):
        if spec.strong is None or not is_strong:
            yield item.values
            continue
        one = slice(number, number + 1)
        key, flipped = rng.fold_in(keys[one], _RAND_AUGMENT), boxes[one, 4] % 2 > 0.5
        yield rand_augment(item.values[None], keys=key, flipped=flipped, strong=spec.strong, mean=mean)[0]


def _oriented(cut: Tensor, *, boxes: Tensor, specs: Sequence[ViewSpec]) -> Tensor:
    """[V B C h w]: crops flipped and turned as the last number of Float[V B 5] says."""
    flat, orientation = cut.flatten(0, 1), boxes[..., 4].flatten()
    flat = torch.where((orientation % 2 > 0.5).view(-1, 1, 1, 1), flat.flip(3), flat)
    if any(spec.turn_prob > 0 for spec in specs):
        flat = turn(flat, turns=(orientation // 2).long())
    return flat.unflatten(0, boxes.shape[:2])
