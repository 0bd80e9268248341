"""From items to the features of an encoder: normalise as the card of the encoder says, encode, or take them from the cache.

Decoding is left out (`items`), and so is what is done with the features.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from glpretrain import modalities
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.layers import features_of_layers, layer_number
from glpretrain.evaluate.cache import FeatureCache, Patches, with_patches
from glpretrain.evaluate.items import DecodedItems, ItemBatch
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.reading import Resize
from glpretrain.evaluate.rows import LabelledFeatures, labelled_rows


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
        self,
        encoder: Encoder,
        items: DecodedItems,
        *,
        resize: Resize,
        patches: Patches = "all",
        cache: FeatureCache | None = None,
        is_looked_at: bool = False,
    ) -> Iterator[tuple[ItemBatch, EncoderOutput]]:
        """Encode every item in evaluation mode, on the device of the encoder, without gradient.

        Args:
            encoder: the encoder; every module of it gets its own mode back.
            items: the items.
            resize: see `DecodedItems.batches`.
            patches: how much of the patches is needed, which is what comes and is kept.
            cache: features of this encoder; what is in it is not computed again.
            is_looked_at: whether the caller needs the values or masks of the items, which are not read where their features are known.

        Yields:
            Each batch with its features in float32, on the CPU.
        """
        options = {"resize": resize, "cache": cache, "is_looked_at": is_looked_at}
        for batch, outputs in self.encode_layers(encoder, items, layers={self.layer: patches}, **options):
            yield batch, outputs[self.layer]

    def encode_layers(
        self,
        encoder: Encoder,
        items: DecodedItems,
        *,
        resize: Resize,
        layers: Mapping[int, Patches],
        cache: FeatureCache | None = None,
        is_looked_at: bool = False,
    ) -> Iterator[tuple[ItemBatch, dict[int, EncoderOutput]]]:
        """`encode` for several layers, in one pass over the items. Other arguments as there.

        Args:
            layers: blocks whose features are taken, each with how much of its patches is needed.

        Yields:
            Each batch with its features by layer.
        """
        shape, numbers = self.shape(encoder), range(items.num_batches(self.batch_size))

        def is_needed(batch: ItemBatch) -> bool:
            if cache is None or is_looked_at:
                return True
            names = batch_names(encoder, shape, digests=batch.digests, resize=resize, layers=layers, bf16=self.bf16)
            return not all(cache.has(name, patches=layers[layer]) for layer, name in names.items())

        files = None if cache is None else cache.files
        if files is not None:
            files.recall(items.source, items.known)
        found = items.numbered(shape, resize=resize, batch_size=self.batch_size, numbers=numbers, is_needed=is_needed)
        readable = False
        try:
            for _, batch in tracked(found, total=len(numbers), description=f"encoding {items.name}"):
                readable = True
                yield batch, encode_batch(encoder, batch, shape=shape, resize=resize, layers=layers, bf16=self.bf16, cache=cache)
        finally:  # an evaluation that is interrupted goes on where it was
            if files is not None:
                files.learn(items.source, items.known, since=items.since)
        if not readable:
            raise items.nothing_to_read()

    def labelled(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None = None) -> LabelledFeatures:
        """`cls` of every item that has a label. Arguments as in `encode`; see `labelled_rows`."""
        batches = self.encode(encoder, items, resize="crop", patches="none", cache=cache)
        return labelled_rows(batches, lambda output: output.cls, items=items)


def batch_names(
    encoder: Encoder, shape: Sequence[int], *, digests: Sequence[str], resize: str, layers: Iterable[int], bf16: bool
) -> dict[int, str]:
    """Name of a batch in the cache, by layer. Arguments as of `encode_batch`."""
    names: dict[int, str] = {}
    for layer in layers:
        settings = f"{tuple(shape)} {resize} {layer_number(encoder, layer)} {'bf16' if bf16 else 'float32'}"
        names[layer] = hashlib.sha256("".join((settings, *digests)).encode()).hexdigest()
    return names


class Encodable(Protocol):
    """What is encoded: the items of an `ItemBatch`, or frames of a video."""

    @property
    def digests(self) -> Sequence[str]:
        """Digest of each item, before it was resized."""
        ...

    @property
    def items(self) -> Tensor:
        """UInt8[B C H W], or Float[B P 3]; asked for only where features have to be computed."""
        ...


def encode_batch(
    encoder: Encoder,
    batch: Encodable,
    *,
    shape: Sequence[int],
    resize: str,
    layers: Mapping[int, Patches],
    bf16: bool = False,
    cache: FeatureCache | None = None,
) -> dict[int, EncoderOutput]:
    """Features of items of one size, by layer. Other arguments as in `Features.encode_layers`.

    Args:
        batch: the items.
        shape: their shape.
        resize: how they were resized; a part of their names in the cache.
    """
    assert cache is None or cache.encoder is encoder
    names = batch_names(encoder, shape, digests=batch.digests, resize=resize, layers=layers, bf16=bf16)
    outputs: dict[int, EncoderOutput] = {}
    if cache is not None:
        found = {layer: cache.find(name, patches=layers[layer]) for layer, name in names.items()}
        outputs = {layer: output for layer, output in found.items() if output is not None}
    missing = [layer for layer in layers if layer not in outputs]
    if missing:
        with evaluating(encoder), torch.autocast(device_of(encoder).type, torch.bfloat16, enabled=bf16):
            computed = features_of_layers(encoder, normalised(batch.items, encoder), layers=missing)
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
