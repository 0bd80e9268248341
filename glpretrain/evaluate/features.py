"""From items to an encoder's features: normalise as the encoder's card says, encode, or take them from the cache.

Left out on purpose: decoding (`pixels`) and what is done with the features.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.layers import features_of_layers, layer_number
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.pixels import PixelBatch, Pixels

_PATIENCE = 2.0  # seconds without a progress bar

Element = TypeVar("Element")


class LabelledFeatures(NamedTuple):
    """One row per item that has a label."""

    cls: Tensor  # Float[B D]
    labels: Tensor  # Int[B]


def evaluation_shape(encoder: Encoder, image_size: int | Sequence[int] | None) -> tuple[int, int, int]:
    """Channels, height and width that items are brought to: the card's, a square, or height and width.

    Raises:
        ValueError: the encoder is not for images, or the size does not divide into its patches.
    """
    if encoder.card.modality != "image":
        raise ValueError(f"encoder {encoder.card.encoder!r} is for {encoder.card.modality}; this evaluator accepts: image")
    channels, height, width = encoder.card.item_shape
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    encoder.grid((channels, height, width))
    return channels, height, width


def fitted_shape(encoder: Encoder, image_size: int | Sequence[int] | None) -> tuple[int, ...]:
    """The shape that items are brought to: `evaluation_shape` of images, (points, 3) of clouds.

    Args:
        encoder: of any modality.
        image_size: see `evaluation_shape`, or a number of points.

    Raises:
        ValueError: the encoder does not take such a size.
    """
    if encoder.card.modality != "points":
        return evaluation_shape(encoder, image_size)
    if image_size is not None and not isinstance(image_size, int):
        raise ValueError(f"image_size: {image_size}; accepted for points: their number")
    shape = (encoder.card.item_shape[0] if image_size is None else image_size, 3)
    encoder.grid(shape)
    return shape


def normalised(images: Tensor, encoder: Encoder) -> Tensor:
    """UInt8[B C H W] on any device to what the encoder takes, Float[B C H W] on its own device; clouds Float[B P 3] are as they are."""
    device = next(encoder.parameters(), torch.empty(0)).device
    if encoder.card.modality == "points":
        return images.to(device)
    mean = torch.tensor(encoder.card.mean, device=device)[:, None, None]  # [C 1 1]
    std = torch.tensor(encoder.card.std, device=device)[:, None, None]  # [C 1 1]
    return (images.to(device).float() / 255 - mean) / std


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


def encode(
    encoder: Encoder,
    pixels: Pixels,
    *,
    fit: Literal["crop", "stretch"],
    image_size: int | Sequence[int] | None = None,
    layer: int = -1,
    batch_size: int = 64,
    bf16: bool = False,
    patches: bool = True,
    cache: FeatureCache | None = None,
) -> Iterator[tuple[PixelBatch, EncoderOutput]]:
    """Encode every item in evaluation mode, on the encoder's device, without gradient.

    Args:
        encoder: gets its training mode back, module by module.
        pixels: the items.
        fit: as in `Pixels.batches`.
        image_size: side of the square that items are brought to, or height and width, or points of a cloud; None for the card's.
        layer: block whose features are taken, under the final norm; negative numbers count from the last.
        batch_size: items at a time.
        bf16: compute under bfloat16 autocast.
        patches: whether the patches are needed; without, an output may come with none, and none are kept.
        cache: of this encoder; what is in it is not computed again.

    Yields:
        Each batch with its features in float32, on the CPU.
    """
    options = {"image_size": image_size, "batch_size": batch_size, "bf16": bf16, "cache": cache}
    for batch, outputs in encode_layers(encoder, pixels, fit=fit, layers={layer: patches}, **options):
        yield batch, outputs[layer]


def encode_layers(
    encoder: Encoder,
    pixels: Pixels,
    *,
    fit: Literal["crop", "stretch"],
    layers: Mapping[int, bool],
    image_size: int | Sequence[int] | None = None,
    batch_size: int = 64,
    bf16: bool = False,
    cache: FeatureCache | None = None,
) -> Iterator[tuple[PixelBatch, dict[int, EncoderOutput]]]:
    """`encode` for several layers, in one pass over the items. Other arguments as there.

    Args:
        layers: blocks whose features are taken, each with whether its patches are needed.

    Yields:
        Each batch with its features by layer.
    """
    assert cache is None or cache.encoder is encoder
    shape = fitted_shape(encoder, image_size)
    num_batches = -(-len(pixels) // batch_size)
    batches = pixels.batches(shape, fit=fit, batch_size=batch_size)
    for batch in tracked(batches, total=num_batches, description=f"encoding {pixels.source.name}"):
        yield batch, encode_batch(encoder, batch.images, digests=batch.digests, fit=fit, layers=layers, bf16=bf16, cache=cache)


def encode_batch(
    encoder: Encoder,
    images: Tensor,
    *,
    digests: Sequence[str],
    fit: str,
    layers: Mapping[int, bool],
    bf16: bool = False,
    cache: FeatureCache | None = None,
) -> dict[int, EncoderOutput]:
    """Features of images of one size, by layer. Other arguments as in `encode_layers`.

    Args:
        images: UInt8[B C H W].
        digests: of each image, before it was resized.
        fit: how it was resized.
    """
    names: dict[int, str] = {}
    for layer in layers:
        settings = f"{tuple(images.shape[1:])} {fit} {layer_number(encoder, layer)} {'bf16' if bf16 else 'float32'}"
        names[layer] = hashlib.sha256("".join((settings, *digests)).encode()).hexdigest()
    outputs = {} if cache is None else {layer: cache.find(name, patches=layers[layer]) for layer, name in names.items()}
    missing = [layer for layer in layers if outputs.get(layer) is None]
    if missing:
        device = next(encoder.parameters(), torch.empty(0)).device
        with evaluating(encoder), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = features_of_layers(encoder, normalised(images, encoder), layers=missing)
        for layer, output in zip(missing, found, strict=True):
            outputs[layer] = EncoderOutput(output.cls.float().cpu(), output.patches.float().cpu())
            if cache is not None:
                cache.keep(names[layer], outputs[layer], patches=layers[layer])
    return outputs


def cls_features(
    encoder: Encoder,
    pixels: Pixels,
    *,
    image_size: int | Sequence[int] | None = None,
    layer: int = -1,
    batch_size: int = 64,
    bf16: bool = False,
    cache: FeatureCache | None = None,
) -> LabelledFeatures:
    """`cls` and label of every item that has a label, on the CPU. Arguments as in `encode`.

    Raises:
        ValueError: no item has a label.
    """
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    options = {"image_size": image_size, "layer": layer, "batch_size": batch_size, "bf16": bf16, "cache": cache}
    for batch, output in encode(encoder, pixels, fit="crop", patches=False, **options):
        labelled = batch.labels >= 0
        rows.append(output.cls[labelled])
        labels.append(batch.labels[labelled])
    features = LabelledFeatures(torch.cat(rows), torch.cat(labels))
    if len(features.labels) == 0:
        raise ValueError(f"source {pixels.source.name!r}: no item has a label; this evaluator needs labels")
    if not features.cls.isfinite().all():
        raise ValueError(f"source {pixels.source.name!r}: the encoder's cls features are not finite; nothing can be scored on them")
    return features


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
