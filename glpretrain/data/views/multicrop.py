"""Multi-crop on the device that holds the batch: every view of every item in a few batched operations.

Workers stretch items to one square; crops are drawn in the true proportions. All draws come from one key per item
(`glpretrain.core.keys`), so views do not depend on the batch, the process or the device. Nothing here waits for the device.
Left out: masks over tokens (`masking`), reading files (`data`).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from glpretrain.core import keys as rng
from glpretrain.core.batch import ViewGroup
from glpretrain.core.frames import crop_frames
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.loading import RawBatch
from glpretrain.data.sources.base import FittedItem
from glpretrain.data.views.base import ViewMaker, Views
from glpretrain.data.views.colour import augment, require_rgb
from glpretrain.data.views.erasing import erase
from glpretrain.data.views.randaugment import apply_where, rand_augment
from glpretrain.data.views.resample import crop, crop_nearest, random_boxes
from glpretrain.data.views.spec import Strong, ViewSpec
from glpretrain.data.views.stain import quarter_turns, turn

_BOX, _COLOUR, _STRONG, _RAND_AUGMENT, _ERASE, _TURN = range(6)
# Number of the first view of each kind, so that one more global view changes no local one.
_LOCAL, _STUDENT, _ALL_STUDENT_VIEWS = (kind << 16 for kind in range(1, 4))


def _check_sizes(name: str, specs: Sequence[ViewSpec]) -> None:
    shapes = sorted({spec.shape for spec in specs})
    if len(shapes) > 1:
        raise ValueError(f"MultiCrop: {name} have sizes {shapes}; they are stacked, so give all of them one size")


def _resized(image: Tensor, size: int, *, mode: str) -> Tensor:
    """[C S S] of [C H W], antialiased where the mode allows it."""
    if image.shape[1:] == (size, size):
        return image
    if mode == "nearest":
        return interpolate(image[None].float(), size=(size, size), mode="nearest-exact")[0].to(image.dtype)
    return interpolate(image[None], size=(size, size), mode=mode, antialias=True)[0]


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

    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """`global`, and `local` and `student` where the recipe asks for them; channels, height and width of each."""
        kinds = {"global": self.global_views, "local": self.local_views, "student": self.student_views}
        return {name: (sum(spec.count for spec in specs), (num_channels, *specs[0].shape)) for name, specs in kinds.items() if specs}

    def default_size(self) -> int:
        """1.15 times the view, rounded up, so that a crop of most of the item is still scaled down."""
        return math.ceil(1.15 * max(self.global_views[0].shape))

    def require_size(self, size: int) -> None:
        """Refuse items that are smaller than a global view."""
        height, width = self.global_views[0].shape
        if size < max(height, width):
            raise ValueError(f"DataModule: item_size {size} is smaller than the global view of {height} x {width} pixels")

    def fitted(self, item: Item, *, size: int) -> FittedItem:
        """The item stretched to a square, with its true aspect."""
        height, width = item.values.shape[1:]
        regions = None if item.regions is None else _resized(item.regions[None], size, mode="nearest")[0].to(torch.int16)
        return FittedItem(_resized(item.values, size, mode="bilinear"), width / height, regions)

    def make(self, raw: RawBatch, *, keys: Tensor, card: EncoderCard) -> Views:
        """`forward` on a batch as workers give it."""
        regions = None if raw.regions is None else raw.regions.long()
        return self(raw.items, aspect=raw.aspect, keys=keys, mean=card.mean, std=card.std, regions=regions)

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        *,
        aspect: Tensor,
        keys: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        regions: Tensor | None = None,
    ) -> Views:
        """Make the views of a batch.

        Args:
            images: UInt8[B C H W], or Float[B C H W] in [0, 1]; each item stretched to one size.
            aspect: Float[B], true width / height of each item.
            keys: Int[B], one key per item.
            mean: mean of each channel, of items scaled to [0, 1].
            std: standard deviation of each channel.
            regions: Int[B H W], region id per pixel.

        Returns:
            Views in float32.

        Raises:
            ValueError: `mean` or `std` has another length than C, or an operation needs RGB and the items have other channels.
        """
        B, C, H, W = images.shape
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != C:
                raise ValueError(f"views: {name} has {len(values)} numbers, but the items have {C} channels")
        if regions is not None and regions.shape != (B, H, W):
            raise ValueError(f"views: regions are {tuple(regions.shape)}, but the items are {(B, H, W)}; one id per pixel")
        for spec in (*self.global_views, *self.local_views, *self.student_views):
            require_rgb(spec, channels=C)

        # Under autocast the matrix products would run in half precision and lose more than the 8 bits of the input hold. The
        # 11 bits of TF32, where a run allows it for float32, cost about one level at worst.
        with torch.autocast(device_type=images.device.type, enabled=False):
            source = images.to(torch.float32)
            if images.dtype == torch.uint8:
                source = source / 255.0
            make = partial(self._make, source=source, aspect=aspect, keys=keys, mean=mean, std=std)
            groups = {}
            groups["global"], boxes = make(self.global_views, first=0)
            cut = None
            if regions is not None:
                cut = torch.stack([_regions_of(regions, boxes=box, size=self.global_views[0].shape) for box in boxes])
            if self.local_views:
                groups["local"], _ = make(self.local_views, first=_LOCAL)
            if self.student_views:
                strong = _is_strong(rng.fold_in(keys, _ALL_STUDENT_VIEWS), self.student_views[0].strong)  # [B]
                student, _ = make(self.student_views, first=_STUDENT, selected=strong)
                groups["student"] = student._replace(strong=strong)
        return Views(groups, regions=cut)

    @staticmethod
    def _make(
        specs: Sequence[ViewSpec],
        *,
        source: Tensor,
        first: int,
        aspect: Tensor,
        keys: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        selected: Tensor | None = None,
    ) -> tuple[ViewGroup, Tensor]:
        """A group of V views with their frames, and the packed boxes Float[V B 5].

        `selected`, Bool[B], says which items are strongly augmented; without it each view is drawn by itself.
        """
        all_views, all_boxes = [], []
        for spec in specs:
            view_keys = torch.stack([rng.fold_in(keys, first + number) for number in range(spec.count)])  # [V B]
            first += spec.count
            boxes = random_boxes(rng.fold_in(view_keys, _BOX), aspect=aspect, scale=spec.scale, ratio=spec.ratio, flip=spec.flip)  # [V B 5]
            if spec.turn_prob > 0:
                boxes[..., 4] += 2 * quarter_turns(rng.fold_in(view_keys, _TURN), prob=spec.turn_prob)
            if spec.strong is None:
                views = _cut(source, spec=spec, boxes=boxes)  # [(V B) C h w]
                views = augment(views, spec=spec, keys=rng.fold_in(view_keys, _COLOUR).flatten())
            else:
                strong = _is_strong(rng.fold_in(view_keys, _STRONG), spec.strong) if selected is None else selected.expand(view_keys.shape)
                views = _weak_or_strong(source, spec=spec, boxes=boxes, keys=view_keys, selected=strong, aspect=aspect, mean=mean)
            all_views.append(views.unflatten(0, boxes.shape[:2]))
            all_boxes.append(boxes)
        boxes = torch.cat(all_boxes)
        frame = crop_frames(boxes[..., :4], flip=boxes[..., 4] % 2 > 0.5, turns=_turns_of(boxes))
        return ViewGroup(_normalise(torch.cat(all_views), mean=mean, std=std), frame=frame), boxes


def _is_strong(keys: Tensor, strong: Strong | None) -> Tensor:
    """Bool[*S] for keys Int[*S]."""
    return rng.uniform(keys) < (0.0 if strong is None else strong.prob)


def _cut(source: Tensor, *, spec: ViewSpec, boxes: Tensor) -> Tensor:
    """Float[(V B) C h w]."""
    cut = [crop(source, boxes=box, size=spec.shape, interpolation=spec.interpolation) for box in boxes]
    views = torch.cat(cut).clamp_(0.0, 1.0)  # bicubic overshoots
    return turn(views, turns=_turns_of(boxes).flatten()) if spec.turn_prob > 0 else views


def _weak_or_strong(
    source: Tensor, *, spec: ViewSpec, boxes: Tensor, keys: Tensor, selected: Tensor, aspect: Tensor, mean: Sequence[float]
) -> Tensor:
    """Float[(V B) C h w] for keys Int[V B], strongly augmented where Bool[V B] is selected."""

    strong = spec.strong
    assert strong is not None
    cut = []
    for box, key, where in zip(boxes, rng.fold_in(keys, _RAND_AUGMENT), selected, strict=True):  # view by view: whole items are large
        items = rand_augment(source, keys=key, selected=where, aspect=aspect, flipped=box[:, 4] % 2 > 0.5, strong=strong, mean=mean)
        cut.append(_cut(items, spec=spec, boxes=box.unsqueeze(0)))
    views = torch.cat(cut)  # [(V B) C h w]
    colour_keys, erase_keys = rng.fold_in(keys, _COLOUR).flatten(), rng.fold_in(keys, _ERASE).flatten()
    views = apply_where(views, where=~selected.flatten(), change=partial(augment, spec=spec), per_item={"keys": colour_keys})
    return erase(views, keys=erase_keys, selected=selected.flatten(), prob=strong.erase_prob)


def _turns_of(boxes: Tensor) -> Tensor:
    """Int[*S] of boxes Float[*S 5]."""
    return (boxes[..., 4] // 2).long()


def _regions_of(regions: Tensor, *, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Int[B h w]: a region map cut, flipped and turned as a view."""
    cut = crop_nearest(regions, boxes=boxes, size=size)
    return turn(cut.unsqueeze(1), turns=_turns_of(boxes)).squeeze(1) if size[0] == size[1] else cut
