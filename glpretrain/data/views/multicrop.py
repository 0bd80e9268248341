"""Multi-crop: crops of a picture's own pixels, made by workers; colours, blur and normalisation of all of them on the device.

All draws come from one key per item (`glpretrain.core.keys`), so views do not depend on the batch, the process or the device. Workers draw
them, hence they know the boxes of an item, and which views an operation changes (`changes`), before the device sees them. So the pixels of
a view are resampled once, from the decoded file, and what is moved to the device has the size of the views, whatever the size of the
picture. Strong augmentation works on whole pictures, so that workers do it. What the device does is one pass for each operation, over the
views that drew it, and nothing there waits for the device.

A picture that is so large that every crop of it would be scaled down by four or more is first reduced by a power of two, which a JPEG
decoder does in a fraction of the time. Left out: masks over tokens (`masking`), reading files (`sources`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.core.batch import ViewGroup
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.sources.base import Source
from glpretrain.data.views.base import ViewMaker, Views
from glpretrain.data.views.changes import Change, Changes, apply_changes, divided
from glpretrain.data.views.colour import blend, draw_colours, gaussian_blur, require_rgb, shift_hue, solarize
from glpretrain.data.views.cutting import cut_regions, cut_views, drawn_cuts
from glpretrain.data.views.erasing import draw_erasing, erase
from glpretrain.data.views.resample import reduced, reduction
from glpretrain.data.views.spec import ViewSizes, ViewSpec
from glpretrain.data.views.stain import restain

_COLOUR, _STRONG, _RAND_AUGMENT, _ERASE = range(1, 5)  # 0 and 5 are those of `cutting`
# Number of the first view of each kind, so that one more global view changes no local one.
_LOCAL, _STUDENT, _ALL_STUDENT_VIEWS = (kind << 16 for kind in range(1, 4))
_BLOCK_BYTES = 1 << 20  # of the views that a CPU changes at once, so that they stay in its cache from one operation to the next
_LEAST_SHRINKING = 4  # of crops of a picture that was reduced before: less would cost more than 2 % of the energy of their gradients


class Kind(NamedTuple):
    """A group of views."""

    name: str
    first: int  # number of its first view, which tells its draws from those of other views
    specs: tuple[ViewSpec, ...]  # one for each of its views

    @property
    def count(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  hides tuple.count
        return len(self.specs)

    def keys(self, keys: Tensor) -> Tensor:
        """Int[V B]: keys of the views, for keys Int[B] of items."""
        return rng.numbered(keys, count=self.count, first=self.first)


class _Sheet(NamedTuple):
    """All views of one size, which are made together."""

    name: str
    kinds: tuple[Kind, ...]
    views: slice  # their numbers among all views, which are numbered sheet by sheet


class _AllViews(NamedTuple):
    """The V views of all groups."""

    specs: list[ViewSpec]
    keys: Tensor  # Int[V B]
    strong: Tensor  # Bool[V B]
    are_student: list[bool]


def _check_sizes(name: str, specs: Sequence[ViewSpec]) -> None:
    shapes = sorted({spec.shape for spec in specs})
    if len(shapes) > 1:
        raise ValueError(f"MultiCrop: {name} have sizes {shapes}; they are stacked, so give all of them one size")


OPERATIONS: Mapping[str, Callable[[Tensor, Change], Tensor]] = {
    "stain": lambda images, change: restain(images, gains=change.numbers[:, :3], offsets=change.numbers[:, 3:]),
    "blend": lambda images, change: blend(images, factors=change.numbers),
    "hue": lambda images, change: shift_hue(images, turns=change.numbers[:, 0]),
    "blur": lambda images, change: gaussian_blur(images, taps=change.numbers),
    "solarize": lambda images, change: solarize(images, thresholds=change.numbers[:, 0]),
    "erase": lambda images, change: erase(images, boxes=change.integers[:, :4], keys=change.integers[:, 4]),
}


class MultiCrop(ViewMaker):
    """Crops, flips, colours and normalises images.

    Args:
        global_views: settings of the global views, in order.
        local_views: settings of the local views, in order.
        student_views: settings of the student's own views of the global size, in order, for methods whose teacher sees the
            global ones. One draw per item decides whether all of them are strongly augmented or none.
        clean_size: size of crops of the same places as the global views, flipped and turned like them and with the item's own colours, for
            an anchor (`Gram.views`); None makes none.
        other_sizes: sizes that all views of a step may have in place of their own, as in DINOv3's stage of high resolution. Which sizes a
            step has is drawn from its number, for all processes alike; what these shares leave of 1 is the share of the own sizes.

    Raises:
        ValueError: no global view, globals (or locals) of different sizes, student views of another size than the globals or
            with different `strong`, or other sizes for views that are not there, or whose shares leave nothing.
    """

    modality = "image"

    def __init__(
        self,
        global_views: list[ViewSpec],
        local_views: list[ViewSpec] | None = None,
        student_views: list[ViewSpec] | None = None,
        clean_size: int | tuple[int, int] | None = None,
        other_sizes: list[ViewSizes] | None = None,
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
        self.clean_views = () if clean_size is None else tuple(spec.clean(clean_size) for spec in self.global_views)
        self.other_sizes = tuple(other_sizes or ())
        if (given := sum(sizes.share for sizes in self.other_sizes)) >= 1.0 - 1e-9:
            raise ValueError(f"MultiCrop: other_sizes have shares of {given:g} together; expected below 1, the rest is for the own sizes")
        self._others = tuple(self._sized(sizes) for sizes in self.other_sizes)

    def _sized(self, sizes: ViewSizes) -> "MultiCrop":
        """The same views in these sizes."""
        for name, size, there in (("local", sizes.local_size, self.local_views), ("clean", sizes.clean_size, self.clean_views)):
            if (size is None) == bool(there):
                needed = f"give {name}_size, the recipe has {name} views" if there else f"leave it out, the recipe has no {name} views"
                raise ValueError(f"MultiCrop: other_sizes: {name}_size is {size}; {needed}")
        global_views, student_views = (
            [replace(spec, size=sizes.global_size) for spec in specs] for specs in (self.global_views, self.student_views)
        )
        local_views = [] if sizes.local_size is None else [replace(spec, size=sizes.local_size) for spec in self.local_views]
        return MultiCrop(global_views, local_views, student_views, sizes.clean_size)

    def of_each_size(self) -> Sequence["MultiCrop"]:
        """This maker, and one for each of the other sizes."""
        return (self, *self._others)

    def drawn_size(self, key: Tensor) -> int:
        """The number of sizes whose shares are used up by a uniform draw, counted from the own ones."""
        if not self.other_sizes:
            return 0
        shares = [sizes.share for sizes in self.other_sizes]
        bounds = torch.tensor([1.0 - sum(shares), *shares[:-1]], dtype=torch.float64).cumsum(0)
        return int((rng.uniform(key, 1).double() >= bounds).sum())

    def kinds(self) -> list[Kind]:
        """The groups of views that the recipe asks for."""
        # Clean views have the numbers of the global ones, so their places are the same.
        given = (
            *(("global", 0, self.global_views), ("local", _LOCAL, self.local_views), ("student", _STUDENT, self.student_views)),
            ("clean", 0, self.clean_views),
        )
        kinds = (Kind(name, first, tuple(spec for spec in specs for _ in range(spec.count))) for name, first, specs in given)
        return [kind for kind in kinds if kind.specs]

    def _sheets(self) -> list[_Sheet]:
        """All views by their size."""
        sheets: list[_Sheet] = []
        first = 0
        for shape in dict.fromkeys(kind.specs[0].shape for kind in self.kinds()):
            kinds = tuple(kind for kind in self.kinds() if kind.specs[0].shape == shape)
            sheets.append(_Sheet("{}x{}".format(*shape), kinds, slice(first, first := first + sum(kind.count for kind in kinds))))
        return sheets

    def _all_views(self, keys: Tensor) -> _AllViews:
        """All views, sheet by sheet, for keys Int[B] of items. Of the student's views all are strongly augmented, or none."""
        kinds = [kind for sheet in self._sheets() for kind in sheet.kinds]
        specs = [spec for kind in kinds for spec in kind.specs]
        view_keys = torch.cat([kind.keys(keys) for kind in kinds])
        is_student = torch.tensor([[kind.name == "student"] for kind in kinds for _ in kind.specs])
        probs = torch.tensor([[0.0 if spec.strong is None else spec.strong.prob] for spec in specs])
        strong = torch.zeros(view_keys.shape, dtype=torch.bool)
        if probs.any():
            decisive = torch.where(is_student, rng.fold_in(keys, _ALL_STUDENT_VIEWS), rng.fold_in(view_keys, _STRONG))
            strong = rng.uniform(decisive) < probs
        return _AllViews(specs, view_keys, strong, is_student.squeeze(1).tolist())

    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """`global`, and `local`, `student` and `clean` where the recipe asks for them; channels, height and width of each."""
        return {kind.name: (kind.count, (num_channels, *kind.specs[0].shape)) for kind in self.kinds()}

    def default_size(self) -> int:
        """A third more than the view, rounded up."""
        return -(-4 * max(self.global_views[0].shape) // 3)

    def ample_side(self) -> int:
        """Pixels on the shorter side of a picture that are enough for every crop of any size to be scaled down by four or more."""
        needed = 0.0
        specs = (spec for maker in self.of_each_size() for kind in maker.kinds() for spec in kind.specs)
        for spec in specs:
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
        """Crops, flipped and turned, that are ready for colours.

        Args:
            items: pictures UInt8[C H W], each of its own size, with or without region maps Int[H W].
            keys: Int[B], one key per item.
            card: card of the encoder; its mean fills the empty places that strong augmentation leaves.

        Returns:
            By their size, as in `crops_224x224`, UInt8[B V C h w]: the crops of all groups of this size, one after the other; and as
            `frames_224x224`, Float[B V 2 3], where they lie in their items. As `regions`, Int[B G h w], the region maps cut as the global
            views, and as `strong`, Bool[B], which items have strong student views.

        Raises:
            ValueError: items have other channels than the card, an operation needs RGB and there is none, or a region map has not the
                size of its item.
        """
        for item in items:
            self._require(item, card=card)
        views = self._all_views(keys)
        cuts = drawn_cuts(items, specs=views.specs, keys=views.keys)
        augment_keys = rng.fold_in(views.keys, _RAND_AUGMENT)
        parts: dict[str, Tensor] = {}
        for sheet in self._sheets():
            v = sheet.views
            own = cuts.of(v)
            crops = cut_views(items, specs=views.specs[v], keys=augment_keys[v], strong=views.strong[v], cuts=own, mean=card.mean)
            parts |= {f"crops_{sheet.name}": crops, f"frames_{sheet.name}": own.frames.transpose(0, 1)}
        if any(item.regions is not None for item in items):
            count = self.kinds()[0].count  # the global views come first
            parts["regions"] = cut_regions(items, size=self.global_views[0].shape, cuts=cuts.of(slice(count)))
        if self.student_views:
            parts["strong"] = views.strong[views.are_student.index(True)]
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
    def draw(self, keys: Tensor) -> dict[str, Changes]:
        """Colours, blur and erasing of all views of each size."""
        views = self._all_views(keys)
        changes = draw_colours(views.specs, keys=rng.fold_in(views.keys, _COLOUR), selected=~views.strong)
        if any(spec.strong is not None for spec in views.specs):
            changes += draw_erasing(views.specs, keys=rng.fold_in(views.keys, _ERASE), selected=views.strong)
        sheets = self._sheets()
        parts = divided(changes, [len(keys) * sheet.views.stop for sheet in sheets])
        return {sheet.name: Changes.of(part) for sheet, part in zip(sheets, parts, strict=True)}

    @torch.no_grad()
    def make(self, parts: Mapping[str, Tensor], *, changes: Mapping[str, Changes], keys: Tensor, card: EncoderCard) -> Views:
        """Views in float32 of what `prepare` and `draw` gave."""
        groups = {}
        # Under autocast the matrix products of the blur would run in half precision and lose more than the 8 bits of the input hold. The
        # 11 bits of TF32, where a run allows it for float32, cost about one level at worst.
        with torch.autocast(device_type=keys.device.type, enabled=False):
            for sheet in self._sheets():
                crops, frames = (parts[f"{part}_{sheet.name}"].transpose(0, 1) for part in ("crops", "frames"))
                items = _changed(crops, changes=changes[sheet.name].unpacked(), card=card)
                counts = [kind.count for kind in sheet.kinds]
                for kind, views, frame in zip(sheet.kinds, items.split(counts), frames.split(counts), strict=True):
                    groups[kind.name] = ViewGroup(views, frame=frame, strong=parts["strong"] if kind.name == "student" else None)
        regions = parts["regions"].transpose(0, 1).long() if "regions" in parts else None
        return Views({kind.name: groups[kind.name] for kind in self.kinds()}, regions=regions)


def _changed(cut: Tensor, *, changes: Sequence[Change], card: EncoderCard) -> Tensor:
    """Float[V B C h w]: views UInt8[V B C h w] after all changes, normalised."""
    V, B = cut.shape[:2]
    at_once = B * V if cut.device.type != "cpu" else max(1, _BLOCK_BYTES // (4 * cut[0, 0].numel()))
    if at_once >= B * V:
        images = cut.to(torch.float32, memory_format=torch.contiguous_format).flatten(0, 1).div_(255.0)
        images = apply_changes(images, changes, operations=OPERATIONS)
        return _normalise(images, into=images, card=card).unflatten(0, (V, B))
    made = torch.empty(V * B, *cut.shape[2:])
    blocks = [(v, start, min(start + at_once, B)) for v in range(V) for start in range(0, B, at_once)]
    for (v, start, end), part in zip(blocks, divided(changes, [v * B + end for v, _, end in blocks]), strict=True):
        images = apply_changes(cut[v, start:end].to(torch.float32).div_(255.0), part, operations=OPERATIONS)
        _normalise(images, into=made[v * B + start : v * B + end], card=card)
    return made.unflatten(0, (V, B))


def _normalise(images: Tensor, *, into: Tensor, card: EncoderCard) -> Tensor:
    # Channel by channel with Python numbers: a tensor made from a list would be copied to the device and waited for.
    for channel, (centre, spread) in enumerate(zip(card.mean, card.std, strict=True)):
        torch.sub(images[:, channel], centre, out=into[:, channel]).div_(spread)
    return into
