"""What the evaluators of semantic segmentation share: masks of classes, samples of patches, and from patch scores to pixels.

The classifiers and their protocols are left out, each has its own file, and so are the scores (`metrics.confusion`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import Features
from glpretrain.evaluate.figures import segmentation_figure, shown_positions
from glpretrain.evaluate.items import DecodedItems
from glpretrain.evaluate.metrics.confusion import areas, confusion, segmentation_scores
from glpretrain.evaluate.reading import ItemBatch
from glpretrain.evaluate.rows import Rows, require_finite

# Float[B N D] to Int[B H W]: patches of some images to the class of each pixel, for a size (H, W).
Predictor = Callable[[Tensor, Sequence[int]], Tensor]


def image_patches(
    encoder: Encoder, items: DecodedItems, *, features: Features, cache: FeatureCache | None
) -> Iterator[tuple[ItemBatch, Tensor]]:
    """Batches of images, stretched to the evaluation size, and their patches, Float[B N D]; arguments as in `Features.encode`.

    Raises:
        ValueError: the features are not finite or no grid.
    """
    rows, columns = features.image_grid(encoder)
    for batch, output in features.encode(encoder, items, resize="stretch", cache=cache, is_looked_at=True):
        yield batch, checked_patches(output.patches, batch.index, count=rows * columns, encoder=encoder, items=items)


def checked_patches(patches: Tensor, index: Tensor, *, count: int, encoder: Encoder, items: DecodedItems) -> Tensor:
    """`patches`, Float[B N D], of items with the dataset indices Int[B].

    Raises:
        ValueError: they are not `count` per item, or not finite.
    """
    if patches.shape[1] != count:
        raise ValueError(f"encoder {encoder.card.encoder!r}: {patches.shape[1]} patches; its grid has {count}")
    require_finite(patches, index, what=f"source {items.name!r}: the patch features")
    return patches


class TokenSample:
    """At most so many of the tokens of all items: as many of each item, a fixed pseudo-random subset; all of them where they are few.

    Where there are more items than tokens that may be taken, one is taken of each of as many items.

    Args:
        items: the items.
        num_tokens: number of tokens of each of them.
        at_most: number of tokens in the sample at most.
        seed: seed of the subset.
    """

    def __init__(self, items: DecodedItems, *, num_tokens: int, at_most: int, seed: int) -> None:
        count = len(items)
        self.items = items
        if at_most < count:
            self.items = items.some(
                [items.indices[position] for position in keys.permutation(torch.tensor(seed), count)[:at_most].tolist()]
            )
        self._num_tokens, self._seed = num_tokens, seed
        self.of_item = min(num_tokens, max(1, at_most // count))  # number of tokens of an item

    def places(self, index: Tensor) -> Tensor:
        """Int[B M]: which tokens of the items with dataset indices Int[B] are in the sample."""
        if self.of_item == self._num_tokens:
            return torch.arange(self._num_tokens).expand(len(index), -1)
        drawn = keys.permutation(keys.item_keys(seed=self._seed, epoch=0, index=index), self._num_tokens)
        return drawn[:, : self.of_item]


def taken(tokens: Tensor, places: Tensor) -> Tensor:
    """Float[B M D]: of the tokens of each item, Float[B N D], those at Int[B M]."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def with_objects(batches: Iterable[ItemBatch]) -> list[int]:
    """Dataset indices of the images that show an object."""
    found: list[int] = []
    for batch in batches:
        found += batch.index[(batch.instance_masks() > 0).flatten(1).any(dim=1)].tolist()
    return found


def class_shares(semantic: Tensor, *, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Float[B N C]: the share of each patch's pixels that shows each class of Int[B H W]; pixels of -1 are missing from the sum of 1."""
    count, (height, width) = len(semantic), semantic.shape[1:]
    rows, columns = (torch.arange(length) * parts // length for length, parts in zip((height, width), grid, strict=True))
    patch = rows[:, None] * grid[1] + columns + (torch.arange(count) * grid[0] * grid[1])[:, None, None]  # [B H W]
    num_patches = count * grid[0] * grid[1]
    known = semantic >= 0
    shares = (patch * num_classes + semantic)[known].bincount(minlength=num_patches * num_classes).unflatten(0, (num_patches, num_classes))
    return (shares / patch.flatten().bincount(minlength=num_patches)[:, None]).float().unflatten(0, (count, -1))  # [B N C]


def best_class(scores: Tensor, *, grid: tuple[int, int], size: Sequence[int]) -> Tensor:
    """Int[B H W]: the class with the largest score at each pixel, the scores of patches, Float[B N C], being upsampled bilinearly."""
    maps = scores.transpose(1, 2).unflatten(2, grid)  # [B C h w]
    # Image by image: many classes at every pixel of a batch would be gigabytes.
    classes = torch.empty(len(maps), *size, dtype=torch.int64, device=maps.device)
    for position, one in enumerate(maps.split(1)):
        classes[position] = functional.interpolate(one, size=tuple(size), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    return classes


def predicted_scores(
    encoder: Encoder, items: DecodedItems, predict: Predictor, *, features: Features, cache: FeatureCache | None
) -> dict[str, Score]:
    """`segmentation_scores` of what `predict` says; other arguments as in `image_patches`."""
    classes = items.source.mask_classes
    per_image = Rows(len(items))
    for batch, patches in image_patches(encoder, items, features=features, cache=cache):
        truth = batch.class_masks()
        counts = confusion(truth, predict(patches, truth.shape[1:]), num_classes=len(classes), num_predicted=len(classes))
        per_image.add(areas(counts))
    return segmentation_scores(*per_image.tensors(1), classes=classes)


def predicted_figure(
    encoder: Encoder, items: DecodedItems, predict: Predictor, *, features: Features, cache: FeatureCache | None
) -> Figure:
    """A few images, their masks and what `predict` says; other arguments as in `image_patches`."""
    wanted = {items.indices[position] for position in shown_positions(len(items))}
    images: list[Tensor] = []
    truths: list[Tensor] = []
    predictions: list[Tensor] = []
    for batch, patches in image_patches(encoder, items, features=features, cache=cache):
        if here := batch.positions_of(wanted):
            truth = batch.class_masks()[here]
            images += batch.items[here]
            truths += truth
            predictions += predict(patches[here], truth.shape[1:])
    return segmentation_figure(images, truths=truths, predictions=predictions, classes=items.source.mask_classes)
