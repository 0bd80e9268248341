"""Attention segmentation: does the class token look at the objects?

Protocol: Caron et al., "Emerging properties in self-supervised vision transformers", 2021, figure 4, and
visualize_attention.py of github.com/facebookresearch/dino: of each head's attention from the class token to the patches in the last
block, the patches that hold the largest 60 % of the mass are kept, brought to pixels by nearest neighbour and compared with the
image's objects, all of them as one mask, by the Jaccard index (IoU).
DINO reports the best head of each image, chosen by the truth: an upper bound that grows with the number of heads. The mean over heads
and each head's own score need no choice.
Left out on purpose: a choice of the share, and refinement of the masks.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain.data.sources.base import Source
from glpretrain.encoders.attention import cls_attention
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import evaluating, evaluation_shape, normalised, tracked
from glpretrain.evaluate.figures import attention_figure, shown_positions
from glpretrain.evaluate.patches.prompt_segmentation import masked_pixels, mean_score
from glpretrain.evaluate.pixels import PixelBatch, Pixels


class _Looked(NamedTuple):
    """Where the heads look in the images of a batch that have an object."""

    attention: Tensor  # Float[B heads h w]
    kept: Tensor  # Bool[B heads h w]
    jaccard: Tensor  # Float[B heads]
    union: Tensor  # Float[B]  of all heads' masks together


class AttentionSegmentation(Evaluator):
    """Jaccard index of thresholded attention and objects, in percent, means over images that show an object.

    `jaccard_best`: the best head of each image, chosen by the truth (DINO's number, an upper bound); `jaccard_mean`: mean over heads;
    `jaccard_union`: what any head keeps; `jaccard_head1`, ...: each head. Attention is not cached.

    Args:
        masked: images with masks of objects.
        mass: share of a head's attention that is kept.
        image_size: side of the square, or height and width; None for the card's item shape.
        layer: block whose attention is taken; negative numbers count from the last.
        batch_size: images at a time.

    Raises:
        ValueError: the source has no masks, or a number is out of range.
    """

    headlines = ("jaccard_best", "jaccard_mean")

    def __init__(
        self,
        masked: Source | Pixels,
        *,
        mass: float = 0.6,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
    ) -> None:
        self.masked = masked_pixels(masked)
        if not 0 < mass < 1:
            raise ValueError(f"mass: {mass}; accepted: between 0 and 1")
        self.mass, self.image_size, self.layer, self.batch_size = mass, image_size, layer, batch_size

    @property
    def scored(self) -> Pixels:
        return self.masked

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        """See `Evaluator.run`; the encoder must be a ViT with a class token."""
        looked = [found for _, found in self._look(encoder)]
        per_head = torch.cat([found.jaccard for found in looked])  # [B heads]
        if len(per_head) == 0:
            raise ValueError(f"source {self.masked.name!r}: no image shows an object; at least one is needed")
        scores: dict[str, Score] = {
            "jaccard_best": mean_score(per_head.amax(dim=1)),
            "jaccard_mean": mean_score(per_head.mean(dim=1)),
            "jaccard_union": mean_score(torch.cat([found.union for found in looked])),
            **{f"jaccard_head{head + 1}": mean_score(values) for head, values in enumerate(per_head.unbind(dim=1))},
        }
        return Result(scores, chosen={})

    def pictures(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> dict[str, Figure]:
        """`heads`: a few images, each head's attention, the outline of what is kept and its Jaccard index."""
        images: list[Tensor] = []
        looked: list[_Looked] = []
        for batch, found in self._look(encoder):
            images.append(batch.images[_has_object(batch.instances)])
            looked.append(found)
        attention, kept, jaccard, _ = (torch.cat(parts) for parts in zip(*looked, strict=True))
        chosen = shown_positions(len(jaccard))
        return {
            "heads": attention_figure(torch.cat(images)[chosen], attention=attention[chosen], kept=kept[chosen], jaccard=jaccard[chosen])
        }

    def _look(self, encoder: Encoder) -> Iterator[tuple[PixelBatch, _Looked]]:
        shape = evaluation_shape(encoder, self.image_size)
        batches = self.masked.batches(shape, fit="stretch", batch_size=self.batch_size)
        total = -(-len(self.masked) // self.batch_size)
        for batch in tracked(batches, total=total, description=f"attention on {self.masked.name}"):
            if batch.instances is None:
                raise ValueError(f"source {self.masked.name!r}: an item among {batch.index.tolist()} has no mask")
            with evaluating(encoder):
                attention = cls_attention(encoder, normalised(batch.images, encoder), block=self.layer).cpu()  # [B heads h w]
            if not attention.isfinite().all():
                raise ValueError(f"source {self.masked.name!r}: the encoder's attention is not finite; nothing can be scored on it")
            shown = _has_object(batch.instances)
            yield batch, _compared(attention[shown], batch.instances[shown], mass=self.mass)


def keep_mass(attention: Tensor, *, mass: float) -> Tensor:
    """The places that hold the largest `mass` of each row: those where the sum of all smaller values and their own exceeds 1 - mass.

    Args:
        attention: Float[*S N], not negative.
        mass: in (0, 1).

    Returns:
        Bool[*S N].
    """
    value, place = attention.sort(dim=-1, stable=True)
    kept = (value / value.sum(dim=-1, keepdim=True)).cumsum(dim=-1) > 1 - mass
    return torch.zeros_like(kept).scatter(-1, place, kept)


def jaccard_index(predicted: Tensor, truth: Tensor, *, known: Tensor) -> Tensor:
    """Intersection over union over the pixels that count; the truth must not be empty.

    Args:
        predicted: Bool[B M H W].
        truth: Bool[B H W].
        known: Bool[B H W].

    Returns:
        Float[B M].
    """
    predicted, truth = predicted & known[:, None], (truth & known)[:, None]
    return (predicted & truth).sum(dim=(-2, -1)) / (predicted | truth).sum(dim=(-2, -1))


def _has_object(instances: Tensor) -> Tensor:
    return (instances > 0).flatten(1).any(dim=1)


def _compared(attention: Tensor, instances: Tensor, *, mass: float) -> _Looked:
    """Float[B heads h w] and Int[B H W], of images with objects."""
    kept = keep_mass(attention.flatten(2), mass=mass).unflatten(2, attention.shape[2:])  # [B heads h w]
    masks = functional.interpolate(kept.float(), size=instances.shape[1:], mode="nearest").bool()  # [B heads H W]
    masks = torch.cat([masks, masks.any(dim=1, keepdim=True)], dim=1)
    jaccard = jaccard_index(masks, instances > 0, known=instances >= 0)
    return _Looked(attention, kept, jaccard[:, :-1], jaccard[:, -1])
