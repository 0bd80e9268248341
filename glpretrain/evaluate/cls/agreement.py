"""Whether `cls` says the same of an image and of a changed copy of it, which needs no labels.

The copy is mirrored, and its middle, 80 % of each side, fills the frame. Nothing is drawn at random, so two backbones see the same copies.
Changes of colour, which many backbones are trained to ignore and others are not, are left out on purpose.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import Encoding, encode_batch
from glpretrain.evaluate.items import Sources
from glpretrain.evaluate.metrics.intervals import mean_score, rate_score
from glpretrain.evaluate.rows import Rows, require_finite

_MIDDLE = 0.8
_CHUNK = 512  # items that are compared with all others at a time


class _Copies(NamedTuple):
    """Changed copies of items, under digests of their own."""

    digests: Sequence[str]
    items: Tensor  # UInt8[B C H W]


@dataclass(frozen=True, kw_only=True)
class Agreement(Evaluator):
    """`found`: percent of the images of `test` whose changed copy is more like them than like any other; `kept`: percent of the k nearest
    images of an image that are also those of its copy, on average.

    Labels are not looked at. With few images both are easy, so scores of sets of different sizes do not compare.

    Args:
        k: number of neighbours.
    """

    headlines = ("found", "kept")
    scored = "test"
    needs = ("test",)
    modality = "image"

    k: int = 10

    def validate(self) -> None:
        require_positive("k", self.k)

    def check_items(self, sources: Sources) -> None:
        if len(sources["test"]) <= self.k + 1:
            raise ValueError(f"k: {self.k} with {len(sources['test'])} images; accepted: at least {self.k + 2} images, or a smaller k")

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        items, features = sources["test"], self.features
        encoding = Encoding(
            tuple(features.shape(encoder)), features.cropping, features.batch_size, {features.layer: "none"}, features.bf16, features.tokens
        )
        rows = Rows(len(items))
        for batch, output in features.encode(encoder, items, resize=features.cropping, patches="none", cache=cache, is_looked_at=True):
            copies = _Copies([hashlib.sha256(f"copy {digest}".encode()).hexdigest() for digest in batch.digests], changed(batch.items))
            of_copies = encode_batch(encoder, copies, encoding, cache=cache)[features.layer].cls
            for cls in (output.cls, of_copies):
                require_finite(cls, batch.index, what=f"source {items.name!r}: the features")
            rows.add(functional.normalize(output.cls, dim=-1), functional.normalize(of_copies, dim=-1))
        own, copied = rows.tensors(2)
        if len(own) <= self.k + 1:
            raise ValueError(f"source {items.name!r}: {len(own)} images can be read; at least {self.k + 2} are needed for k={self.k}")
        found, kept = agreement(own, copied, k=self.k)
        return Result({"found": rate_score(found), "kept": mean_score(kept)}, chosen={})


def changed(items: Tensor) -> Tensor:
    """UInt8[B C H W] or Float[B C H W]: mirrored, and the middle of each enlarged to the whole."""
    height, width = items.shape[2:]
    top, left = (round(side * (1 - _MIDDLE) / 2) for side in (height, width))
    middle = items[:, :, top : height - top, left : width - left].flip(-1)
    return functional.interpolate(middle, size=(height, width), mode="bicubic", antialias=True)


def agreement(own: Tensor, copied: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Which copies find their items, and how many neighbours they share with them.

    Args:
        own: Float[B D], items, of length one.
        copied: Float[B D], their copies, of length one.
        k: number of neighbours, below B - 1.

    Returns:
        Float[B] of zeros and ones, and Float[B] in [0, 1].
    """
    count = len(own)
    found, kept = torch.empty(count), torch.empty(count)
    for start in range(0, count, _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, count))
        place = torch.arange(len(index))
        of_items, of_copies = own[index] @ own.T, copied[index] @ own.T  # [chunk B]
        found[index] = (of_copies.argmax(dim=1) == index).float()
        nearest: list[Tensor] = []
        for cosine in (of_items, of_copies):
            cosine[place, index] = -torch.inf  # not the item itself
            nearest.append(cosine.topk(k, dim=1).indices)
        first, second = nearest
        kept[index] = (first[:, :, None] == second[:, None, :]).any(dim=2).float().mean(dim=1)
    return found, kept
