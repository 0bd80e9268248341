"""Attention segmentation: does the class token look at the objects?

Protocol: Caron et al., "Emerging properties in self-supervised vision transformers", 2021, figure 4, and
visualize_attention.py of github.com/facebookresearch/dino: of each head's attention from the class token to the patches in the last
block, the patches that hold the largest 60 % of the mass are kept, brought to pixels by nearest neighbour and compared with the
image's objects, all of them as one mask, by the Jaccard index (IoU).
DINO reports the best head of each image, chosen by the truth: an upper bound that grows with the number of heads. The mean over heads
and each head's own score need no choice.
A choice of the share and refinement of the masks are left out on purpose.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain.encoders.attention import cls_attention
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score, require_share
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import evaluating, normalised
from glpretrain.evaluate.figures import attention_figure, shown_positions
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.intervals import mean_score
from glpretrain.evaluate.patches.segmentation import with_objects
from glpretrain.evaluate.rows import require_finite


class _Looked(NamedTuple):
    """Where the heads look in images that have an object."""

    images: Tensor  # UInt8[B C H W]
    attention: Tensor  # Float[B heads h w]
    kept: Tensor  # Bool[B heads h w]
    jaccard: Tensor  # Float[B heads]
    union: Tensor  # Float[B]  of all heads' masks together


@dataclass(frozen=True, kw_only=True)
class AttentionSegmentation(Evaluator):
    """Jaccard index of thresholded attention and the objects of `masked`, in percent, means over images that show an object.

    `jaccard_best`: the best head of each image, chosen by the truth (DINO's number, an upper bound); `jaccard_mean`: mean over heads;
    `jaccard_union`: what any head keeps; `jaccard_head1`, ...: each head. Attention is not cached. The encoder must be a ViT with a class
    token.

    Args:
        mass: share of a head's attention that is kept.
        features: size, block whose attention is taken, and number of images at a time.
    """

    headlines = ("jaccard_best", "jaccard_mean")
    scored = "masked"
    needs = ("masked",)
    truth = "masks"
    modality = "image"
    unused = ("bf16", "tokens", "crop")

    mass: float = 0.6

    def validate(self) -> None:
        require_share("mass", self.mass)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        items = sources["masked"]
        # Two numbers are kept of each image, not its maps of attention.
        numbers = [(looked.jaccard, looked.union) for looked in self._look(encoder, items)]
        jaccard, union = (torch.cat(parts) for parts in zip(*numbers, strict=True))
        if len(union) == 0:
            raise ValueError(f"source {items.name!r}: no image shows an object; at least one is needed")
        scores: dict[str, Score] = {
            "jaccard_best": mean_score(jaccard.amax(dim=1)),
            "jaccard_mean": mean_score(jaccard.mean(dim=1)),
            "jaccard_union": mean_score(union),
            **{f"jaccard_head{head + 1}": mean_score(values) for head, values in enumerate(jaccard.unbind(dim=1))},
        }
        return Result(scores, chosen={})

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`heads`: a few images, each head's attention, the outline of what is kept and its Jaccard index."""
        items = sources["masked"]
        options = {"resize": "stretch", "batch_size": self.features.batch_size}
        indices = with_objects(items.batches(self.features.shape(encoder), **options))
        shown = items.some([indices[position] for position in shown_positions(len(indices))])
        images, attention, kept, jaccard, _ = (torch.cat(parts) for parts in zip(*self._look(encoder, shown), strict=True))
        return {"heads": attention_figure(list(images), attention=list(attention), kept=list(kept), jaccard=list(jaccard))}

    def _look(self, encoder: Encoder, items: DecodedItems) -> Iterator[_Looked]:
        """Batch by batch, for the images that show an object."""
        for batch in self.features.batches(encoder, items, resize="stretch", description="attention on"):
            instances = batch.instance_masks()
            with evaluating(encoder):
                attention = cls_attention(encoder, normalised(batch.items, encoder), block=self.features.layer).cpu()  # [B heads h w]
            require_finite(attention, batch.index, what=f"source {items.name!r}: the attention weights")
            shown = (instances > 0).flatten(1).any(dim=1)
            yield _compared(batch.items[shown], attention[shown], instances[shown], mass=self.mass)


def keep_mass(attention: Tensor, *, mass: float) -> Tensor:
    """Bool[*S N]: the places that hold the largest `mass` of each row of Float[*S N], whose values are not negative.

    They are those where the sum of all smaller values and their own, as a share of the row's sum, exceeds 1 - mass.
    """
    value, place = attention.sort(dim=-1, stable=True)
    kept = (value / value.sum(dim=-1, keepdim=True)).cumsum(dim=-1) > 1 - mass
    return torch.zeros_like(kept).scatter(-1, place, kept)


def jaccard_index(predicted: Tensor, truth: Tensor, *, known: Tensor) -> Tensor:
    """Float[B M]: intersection over union over the pixels that count; the truth must not be empty.

    Args:
        predicted: Bool[B M H W], M predicted masks of each image.
        truth: Bool[B H W], the true mask of each image.
        known: Bool[B H W], pixels that count.
    """
    predicted, truth = predicted & known[:, None], (truth & known)[:, None]
    return (predicted & truth).sum(dim=(-2, -1)) / (predicted | truth).sum(dim=(-2, -1))


def _compared(images: Tensor, attention: Tensor, instances: Tensor, *, mass: float) -> _Looked:
    """Float[B heads h w] and Int[B H W], of images with objects."""
    kept = keep_mass(attention.flatten(2), mass=mass).unflatten(2, attention.shape[2:])  # [B heads h w]
    masks = functional.interpolate(kept.float(), size=instances.shape[1:], mode="nearest").bool()  # [B heads H W]
    masks = torch.cat([masks, masks.any(dim=1, keepdim=True)], dim=1)
    jaccard = jaccard_index(masks, instances > 0, known=instances >= 0)
    return _Looked(images, attention, kept, jaccard[:, :-1], jaccard[:, -1])
