"""What the evaluators of semantic segmentation share: masks of classes, patches that go with them, and from patch scores to pixels.

Left out: the classifiers and their protocols, each in its own file, and the scores (`confusion`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import encode, evaluation_shape
from glpretrain.evaluate.figures import segmentation_figure, shown_positions
from glpretrain.evaluate.metrics.confusion import areas, confusion, segmentation_scores
from glpretrain.evaluate.pixels import PixelBatch, Pixels

# Float[B N D] to Int[B H W]: patches of some images to the class of each pixel, for a size (H, W).
Predictor = Callable[[Tensor, tuple[int, int]], Tensor]


class FeatureOptions(NamedTuple):
    """How features are made, as in `encode`."""

    image_size: int | Sequence[int] | None
    layer: int
    batch_size: int
    bf16: bool
    cache: FeatureCache | None


def class_pixels(source: Source | Pixels) -> Pixels:
    """As `Pixels`.

    Raises:
        ValueError: the masks of the source do not hold classes.
    """
    pixels = Pixels.of(source)
    if not pixels.source.mask_classes:
        raise ValueError(f"source {pixels.source.name!r} has no masks of classes (mask_classes); this evaluator needs them")
    return pixels


def class_pixels_pair(masked_train: Source | Pixels, masked: Source | Pixels) -> tuple[Pixels, Pixels]:
    """Both as `Pixels`.

    Raises:
        ValueError: the masks of a source do not hold classes, or those of the two hold different ones.
    """
    pair = class_pixels(masked_train), class_pixels(masked)
    if list(pair[0].source.mask_classes) != list(pair[1].source.mask_classes):
        accepted, given = (list(pixels.source.mask_classes) for pixels in pair)
        raise ValueError(f"masked: mask_classes {given}; accepted: those of masked_train, {accepted}")
    return pair


def class_patches(encoder: Encoder, pixels: Pixels, *, options: FeatureOptions) -> Iterator[tuple[PixelBatch, Tensor]]:
    """Batches whose items all have a mask of classes, stretched to the evaluation size, and their patches.

    Args:
        encoder: see `encode`.
        pixels: the items.
        options: size, layer and precision.

    Yields:
        A batch and Float[B N D].

    Raises:
        ValueError: an item has no mask of classes, or the features are not finite or no grid.
    """
    height, width = encoder.grid(evaluation_shape(encoder, options.image_size))
    for batch, output in encode(encoder, pixels, fit="stretch", **options._asdict()):
        if batch.semantic is None:
            raise ValueError(f"source {pixels.source.name!r}: an item among {batch.index.tolist()} has no mask of classes")
        yield batch, checked_patches(output.patches, count=height * width, encoder=encoder, pixels=pixels)


def checked_patches(patches: Tensor, *, count: int, encoder: Encoder, pixels: Pixels) -> Tensor:
    """`patches`, Float[B N D].

    Raises:
        ValueError: they are not `count` per item, or not finite.
    """
    if patches.shape[1] != count:
        raise ValueError(f"encoder {encoder.card.encoder!r}: {patches.shape[1]} patches; its grid has {count}")
    if not patches.isfinite().all():
        raise ValueError(f"source {pixels.source.name!r}: the encoder's patch features are not finite; nothing can be scored on them")
    return patches


def class_shares(semantic: Tensor, *, grid: tuple[int, int], num_classes: int) -> Tensor:
    """The share of each patch's pixels that shows each class; what is to be ignored is missing from the sum of 1.

    Args:
        semantic: Int[B H W], -1 to be ignored.
        grid: patches along height and width.
        num_classes: C.

    Returns:
        Float[B N C].
    """
    count, (height, width) = len(semantic), semantic.shape[1:]
    rows, columns = (torch.arange(length) * parts // length for length, parts in zip((height, width), grid, strict=True))
    patch = rows[:, None] * grid[1] + columns + (torch.arange(count) * grid[0] * grid[1])[:, None, None]  # [B H W]
    num_patches = count * grid[0] * grid[1]
    known = semantic >= 0
    shares = (patch * num_classes + semantic)[known].bincount(minlength=num_patches * num_classes).unflatten(0, (num_patches, num_classes))
    return (shares / patch.flatten().bincount(minlength=num_patches)[:, None]).float().unflatten(0, (count, -1))  # [B N C]


def best_class(scores: Tensor, *, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The class with the largest score at each pixel, the scores of patches being upsampled bilinearly.

    Args:
        scores: Float[B N C].
        grid: patches along height and width.
        size: height and width of the image.

    Returns:
        Int[B H W].
    """
    maps = scores.transpose(1, 2).unflatten(2, grid)  # [B C h w]
    # Image by image: many classes at every pixel of a batch would be gigabytes.
    upsampled = (functional.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps.split(1))
    return torch.cat([one.argmax(dim=1) for one in upsampled])


def predicted_scores(encoder: Encoder, pixels: Pixels, predict: Predictor, *, options: FeatureOptions) -> dict[str, Score]:
    """`segmentation_scores` of what `predict` says; arguments as in `class_patches`."""
    classes = pixels.source.mask_classes
    per_image: list[Tensor] = []
    for batch, patches in class_patches(encoder, pixels, options=options):
        predicted = predict(patches, batch.semantic.shape[1:])
        per_image.append(areas(confusion(batch.semantic, predicted, num_classes=len(classes), num_predicted=len(classes))))
    return segmentation_scores(torch.cat(per_image), classes=classes)


def predicted_figure(encoder: Encoder, pixels: Pixels, predict: Predictor, *, options: FeatureOptions) -> Figure:
    """A few images, their masks and what `predict` says; arguments as in `class_patches`."""
    chosen = shown_positions(len(pixels))
    images: list[Tensor] = []
    truths: list[Tensor] = []
    predictions: list[Tensor] = []
    seen = 0
    for batch, patches in class_patches(encoder, pixels, options=options):
        here = [position - seen for position in chosen if seen <= position < seen + len(patches)]
        seen += len(patches)
        if here:
            images += batch.images[here]
            truths += batch.semantic[here]
            predictions += predict(patches[here], batch.semantic.shape[1:])
    return segmentation_figure(images, truths=truths, predictions=predictions, classes=pixels.source.mask_classes)
