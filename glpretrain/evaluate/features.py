"""From items to the features of an encoder: normalise as the card of the encoder says, encode, or take them from the cache.

Decoding is left out (`items`), and so is what is done with the features.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from glpretrain import modalities
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.layers import features_of_layers, layer_number
from glpretrain.evaluate.cache import FeatureCache, Patches, with_patches
from glpretrain.evaluate.items import DecodedItems, ItemBatch, Resize
from glpretrain.evaluate.metrics.roc import numbered

_PATIENCE = 2.0  # seconds without a progress bar

Element = TypeVar("Element")


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """One row per item that has a label."""

    cls: Tensor  # Float[B D]
    labels: Tensor  # Int[B]
    index: Tensor  # Int[B]  dataset index
    groups: Tensor | None = None  # Int[B]  which rows belong together, such as frames of one video; None where all are independent

    def at(self, positions: Tensor) -> "LabelledFeatures":
        """Some of the rows, by position or by Bool[B]."""
        groups = None if self.groups is None else self.groups[positions]
        return LabelledFeatures(self.cls[positions], self.labels[positions], self.index[positions], groups)

    def with_cls(self, cls: Tensor) -> "LabelledFeatures":
        """The same items with other rows, Float[B D]."""
        return replace(self, cls=cls)


@dataclass(frozen=True)
class Features:
    """How items become features. Every evaluator has one of these among its settings.

    Args:
        size: size that items are brought to: side of the square, or height and width of an image; number of points of a cloud. None takes
            the size of the encoder's card.
        layer: block whose features are taken, under the final norm; negative numbers count from the last block.
        batch_size: number of items that are encoded at a time.
        bf16: whether to encode under bfloat16 autocast.
    """

    size: int | Sequence[int] | None = None
    layer: int = -1
    batch_size: int = 64
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"features.batch_size: {self.batch_size}; accepted: a positive number")

    def refuse(self, *names: str) -> None:
        """Refuse settings that an evaluator would ignore.

        Raises:
            ValueError: one of them has another value than its default.
        """
        for field in fields(self):
            if field.name in names and vars(self)[field.name] != field.default:
                raise ValueError(f"features.{field.name}: {vars(self)[field.name]}; this evaluator does not use it; leave it out")

    def shape(self, encoder: Encoder) -> tuple[int, ...]:
        """The shape that items are brought to for an encoder.

        Raises:
            ValueError: the encoder does not take items of this size.
        """
        shape = modalities.get(encoder.card.modality).item_shape(encoder.card, self.size)
        encoder.grid(shape)
        return shape

    def image_grid(self, encoder: Encoder) -> tuple[int, int]:
        """Rows and columns of the patches of an image.

        Raises:
            ValueError: see `shape`.
        """
        rows, columns = encoder.grid(self.shape(encoder))
        return rows, columns

    def batches(self, encoder: Encoder, items: DecodedItems, *, resize: Resize, description: str) -> Iterator[ItemBatch]:
        """Items at the size for an encoder, with a progress bar.

        Args:
            encoder: the encoder that they are for.
            items: the items.
            resize: see `DecodedItems.batches`.
            description: what the bar says before the name of the source.
        """
        found = items.batches(self.shape(encoder), resize=resize, batch_size=self.batch_size)
        return tracked(found, total=-(-len(items) // self.batch_size), description=f"{description} {items.name}")

    def encode(
        self, encoder: Encoder, items: DecodedItems, *, resize: Resize, patches: Patches = "all", cache: FeatureCache | None = None
    ) -> Iterator[tuple[ItemBatch, EncoderOutput]]:
        """Encode every item in evaluation mode, on the device of the encoder, without gradient.

        Args:
            encoder: the encoder; every module of it gets its own mode back.
            items: the items.
            resize: see `DecodedItems.batches`.
            patches: how much of the patches is needed, which is what comes and is kept.
            cache: features of this encoder; what is in it is not computed again.

        Yields:
            Each batch with its features in float32, on the CPU.
        """
        for batch, outputs in self.encode_layers(encoder, items, resize=resize, layers={self.layer: patches}, cache=cache):
            yield batch, outputs[self.layer]

    def encode_layers(
        self, encoder: Encoder, items: DecodedItems, *, resize: Resize, layers: Mapping[int, Patches], cache: FeatureCache | None = None
    ) -> Iterator[tuple[ItemBatch, dict[int, EncoderOutput]]]:
        """`encode` for several layers, in one pass over the items. Other arguments as there.

        Args:
            layers: blocks whose features are taken, each with how much of its patches is needed.

        Yields:
            Each batch with its features by layer.
        """
        for batch in self.batches(encoder, items, resize=resize, description="encoding"):
            options = {"digests": batch.digests, "resize": resize, "layers": layers}
            yield batch, encode_batch(encoder, batch.items, **options, bf16=self.bf16, cache=cache)

    def labelled(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None = None) -> LabelledFeatures:
        """`cls` of every item that has a label. Arguments as in `encode`; see `labelled_rows`."""
        batches = self.encode(encoder, items, resize="crop", patches="none", cache=cache)
        return labelled_rows(batches, lambda output: output.cls, items=items)


def labelled_rows(
    batches: Iterable[tuple[ItemBatch, Element]], rows: Callable[[Element], Tensor], *, items: DecodedItems
) -> LabelledFeatures:
    """A row for every item that has a label, on the CPU.

    Args:
        batches: each batch with what its rows are made of.
        rows: function of that to Float[B D].
        items: the items that the batches are of.

    Raises:
        ValueError: no item has a label, or a number is not finite.
    """
    parts: list[LabelledFeatures] = []
    for batch, output in batches:
        parts.append(LabelledFeatures(rows(output), batch.labels, batch.index).at(batch.labels >= 0))
    columns = ([part.cls for part in parts], [part.labels for part in parts], [part.index for part in parts])
    found = LabelledFeatures(*(torch.cat(column) for column in columns))
    if len(found.labels) == 0:
        raise ValueError(f"source {items.name!r}: no item has a label; this evaluator needs labels")
    require_finite(found.cls, found.index, what=f"source {items.name!r}: the features")
    names = items.source.groups
    if not names:
        return found
    return replace(found, groups=numbered([str(names[index]) for index in found.index.tolist()], count=len(found.index)))


def require_finite(features: Tensor, index: Tensor, *, what: str) -> None:
    """Refuse features that are not numbers.

    Args:
        features: Float[B *S], what an encoder makes of items.
        index: Int[B], dataset index of each item, or time of each frame.
        what: whose features they are, for the message.

    Raises:
        ValueError: a number is not finite. The message names the items, or the backbone where it is all of them.
    """
    lost = index[~features.flatten(1).isfinite().all(dim=1)].tolist()
    if len(lost) == len(index) > 0:
        raise ValueError(f"{what} are not finite for any of {len(index)} items; give a backbone whose weights are finite")
    if lost:
        others = f" and {len(lost) - 1} others" if len(lost) > 1 else ""
        raise ValueError(f"{what} are not finite for item {lost[0]}{others}, of {len(index)} items; give a source without such items")


def encode_batch(
    encoder: Encoder,
    items: Tensor,
    *,
    digests: Sequence[str],
    resize: str,
    layers: Mapping[int, Patches],
    bf16: bool = False,
    cache: FeatureCache | None = None,
) -> dict[int, EncoderOutput]:
    """Features of items of one size, by layer. Other arguments as in `Features.encode_layers`.

    Args:
        items: UInt8[B C H W], or Float[B P 3].
        digests: digest of each item, before it was resized.
        resize: how they were resized; a part of their names in the cache.
    """
    assert cache is None or cache.encoder is encoder
    names: dict[int, str] = {}
    for layer in layers:
        settings = f"{tuple(items.shape[1:])} {resize} {layer_number(encoder, layer)} {'bf16' if bf16 else 'float32'}"
        names[layer] = hashlib.sha256("".join((settings, *digests)).encode()).hexdigest()
    outputs: dict[int, EncoderOutput] = {}
    if cache is not None:
        found = {layer: cache.find(name, patches=layers[layer]) for layer, name in names.items()}
        outputs = {layer: output for layer, output in found.items() if output is not None}
    missing = [layer for layer in layers if layer not in outputs]
    if missing:
        with evaluating(encoder), torch.autocast(device_of(encoder).type, torch.bfloat16, enabled=bf16):
            computed = features_of_layers(encoder, normalised(items, encoder), layers=missing)
        for layer, output in zip(missing, computed, strict=True):
            needed = with_patches(EncoderOutput(output.cls.float(), output.patches.float()), layers[layer])  # before it leaves the device
            outputs[layer] = EncoderOutput(needed.cls.cpu(), needed.patches.cpu())
            if cache is not None:
                cache.keep(names[layer], outputs[layer], patches=layers[layer])
    return outputs


def device_of(encoder: Encoder) -> torch.device:
    """The device of the weights; the CPU where there are none."""
    return next(encoder.parameters(), torch.empty(0)).device


def normalised(items: Tensor, encoder: Encoder) -> Tensor:
    """Items as sources give them, on any device, to what the encoder takes, Float[B *item] on its own device."""
    return modalities.get(encoder.card.modality).normalise(items.to(device_of(encoder)), encoder.card)


@contextmanager
def evaluating(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode and no gradient inside; every module gets its own mode back."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        # Not inference_mode: a module that keeps a tensor (a resized position table) would hand it to the next training step.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def tracked(elements: Iterable[Element], *, total: int, description: str) -> Iterator[Element]:
    """Pass `elements` on; on a terminal, show a bar that vanishes at the end once this has taken more than two seconds."""
    console = Console(stderr=True, force_jupyter=False)  # in a notebook a bar would need a package of its own
    progress = Progress(console=console, transient=True)
    task = progress.add_task(description, total=total)
    start = time.monotonic()
    shown = False
    try:
        for element in elements:
            yield element
            progress.advance(task)
            if not shown and console.is_terminal and time.monotonic() - start > _PATIENCE:
                progress.start()
                shown = True
    finally:
        if shown:
            progress.stop()
