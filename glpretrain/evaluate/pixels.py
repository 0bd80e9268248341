"""The items that scores are computed on: decoded and brought to one size once, and known by their content.

Left out on purpose: augmentation (none in evaluation) and features.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.data.sources.base import Item, Source, UnreadableItemError
from glpretrain.data.sources.points import with_count
from glpretrain.encoders.fingerprint import bytes_of

_LOG = logging.getLogger(__name__)
_CACHE_BYTES = 1 << 30  # larger sets are decoded anew for each run
_SUBSET_SEED = 20


class PixelBatch(NamedTuple):
    """Items of one size."""

    images: Tensor  # UInt8[B C H W], or Float[B P 3]; masks of clouds are Int[B P]
    labels: Tensor  # Int[B]  -1 where there is none
    instances: Tensor | None  # Int[B H W]  as in `Item`
    semantic: Tensor | None  # Int[B H W]  as in `Item`
    index: Tensor  # Int[B]  dataset index
    digests: tuple[str, ...]  # per item, of what the source gave, before any resize


class Pixels:
    """The items that a score is computed on, decoded and resized once however often they are asked for.

    Give one object to several evaluators and they share the decoded items.

    Args:
        source: where the items come from.
        max_items: more than this many are cut to a fixed pseudo-random subset; None for all.
    """

    def __init__(self, source: Source, *, max_items: int | None = None) -> None:
        if max_items is not None and max_items < 1:
            raise ValueError(f"max_items: {max_items}; accepted: a positive number, or None for all")
        if len(source) == 0:
            raise ValueError(f"source {source.name!r} has no items; at least one is needed")
        self.source = source
        count = len(source) if max_items is None else min(max_items, len(source))
        # Neither the first items (folders come class by class) nor every n-th (classes may alternate) would be a fair subset.
        order = keys.permutation(torch.tensor(_SUBSET_SEED), len(source)) if count < len(source) else torch.arange(count)
        self.indices: list[int] = order[:count].sort().values.tolist()
        self._cache: dict[tuple, list[PixelBatch]] = {}
        self._digests: dict[int, str] = {}
        self._unreadable: set[int] = set()

    @classmethod
    def of(cls, source: "Source | Pixels") -> "Pixels":
        """`source` itself if it is decoded already, otherwise all its items."""
        return source if isinstance(source, Pixels) else cls(source)

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, item_shape: Sequence[int], *, fit: Literal["crop", "stretch"], batch_size: int) -> Iterator[PixelBatch]:
        """Batches at one size, in the order of the source; an item that cannot be read is left out with a warning.

        Args:
            item_shape: channels, height, width; (points, 3) of clouds.
            fit: "crop" keeps the aspect ratio and cuts the centre, "stretch" keeps the whole picture; clouds only lose or repeat points.
            batch_size: items at a time.

        Raises:
            ValueError: an item has another number of channels, or none can be read.
        """
        cache_key = (*item_shape, fit, batch_size)
        if cache_key in self._cache:
            yield from self._cache[cache_key]
            return
        chunks = [self.indices[start : start + batch_size] for start in range(0, len(self), batch_size)]
        keep = len(self) * math.prod(item_shape) <= _CACHE_BYTES
        kept: list[PixelBatch] = []
        readable = False
        for chunk in chunks:
            batch = self._read(chunk, item_shape, fit)
            if batch is None:
                continue
            readable = True
            if keep:
                kept.append(batch)
            yield batch
        if not readable:
            raise ValueError(f"source {self.source.name!r}: none of {len(self)} items can be read")
        if keep:
            self._cache[cache_key] = kept

    def fingerprint(self) -> str:
        """SHA-256 of all readable items as the source gives them: pixels, labels and masks, in order."""
        if len(self._digests) + len(self._unreadable) < len(self):
            for index in self.indices:
                if index not in self._digests and index not in self._unreadable:
                    self._item(index)
        return hashlib.sha256("".join(self._digests[index] for index in self.indices if index in self._digests).encode()).hexdigest()

    def _item(self, index: int) -> Item | None:
        try:
            item = self.source[index]
        except UnreadableItemError as error:
            if index not in self._unreadable:
                _LOG.warning("left out of the evaluation: %s", error)
            self._unreadable.add(index)
            return None
        self._digests[index] = _digest(item)
        return item

    def _read(self, indices: Sequence[int], item_shape: Sequence[int], fit: Literal["crop", "stretch"]) -> PixelBatch | None:
        items: list[tuple[int, Item]] = []
        for index in indices:
            item = self._item(index)
            if item is None:
                continue
            if item.image.dim() != len(item_shape):
                kind = "images" if len(item_shape) == 3 else "clouds of points"
                raise ValueError(
                    f"source {self.source.name!r}: item {index} has shape {tuple(item.image.shape)}; the encoder accepts {kind}"
                )
            if len(item_shape) == 2:
                items.append((index, with_count(item, item_shape[0])))
                continue
            if item.image.shape[0] != item_shape[0]:
                raise ValueError(
                    f"source {self.source.name!r}: item {index} has {item.image.shape[0]} channels; the encoder accepts {item_shape[0]}"
                )
            items.append((index, _resized(item, (item_shape[1], item_shape[2]), fit)))
        if not items:
            return None
        return PixelBatch(
            images=torch.stack([item.image for _, item in items]),
            labels=torch.tensor([item.label for _, item in items]),
            instances=_stacked([item.instances for _, item in items]),
            semantic=_stacked([item.semantic for _, item in items]),
            index=torch.tensor([index for index, _ in items]),
            digests=tuple(self._digests[index] for index, _ in items),
        )


def _stacked(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Int[B H W], None where an item has none."""
    there = [mask for mask in masks if mask is not None]
    return torch.stack(there) if len(there) == len(masks) else None


def _digest(item: Item) -> str:
    digest = hashlib.sha256(f"{tuple(item.image.shape)} {item.label}".encode())
    for tensor in (item.image, item.instances, item.semantic):
        digest.update(b"-" if tensor is None else bytes_of(tensor))
    return digest.hexdigest()


def _resized(item: Item, size: tuple[int, int], fit: Literal["crop", "stretch"]) -> Item:
    height, width = item.image.shape[1:]
    inner = size
    if fit == "crop":
        scale = max(size[0] / height, size[1] / width)
        inner = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    image, masks = item.image, {"instances": item.instances, "semantic": item.semantic}
    if inner != (height, width):
        image = functional.interpolate(image.unsqueeze(0), size=inner, mode="bicubic", antialias=True)[0]
        masks = {name: None if mask is None else _resized_ids(mask, inner) for name, mask in masks.items()}
    top, left = (inner[0] - size[0]) // 2, (inner[1] - size[1]) // 2
    window = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    return item._replace(
        image=image[window].clone(), **{name: None if mask is None else mask[window].clone() for name, mask in masks.items()}
    )


def _resized_ids(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Int[H W] to Int[*size]: ids cannot be averaged. Float64 holds every id that a mask file can hold."""
    return functional.interpolate(mask[None, None].double(), size=size, mode="nearest-exact")[0, 0].long()
