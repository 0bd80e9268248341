"""In-context segmentation: every patch takes the classes of the most similar patches of labelled images; nothing is trained.

Protocol: Balazevic et al., "Towards in-context scene understanding", NeurIPS 2023 (Hummingbird). A memory holds training patches and the
shares of the classes among their pixels; a patch attends to its k nearest in cosine with softmax(cosine / temp); the shares that it
finds are upsampled bilinearly, a pixel shows the class with the largest. k = 30 and temp = 0.02 are the paper's.
Differences: the memory is a uniform sample of the training patches where the paper prefers patches with many classes, without
augmented copies. Left out on purpose: approximate search.
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import evaluation_shape
from glpretrain.evaluate.patches.segmentation import (
    FeatureOptions,
    Predictor,
    best_class,
    class_patches,
    class_pixels_pair,
    class_shares,
    predicted_figure,
    predicted_scores,
)
from glpretrain.evaluate.pixels import Pixels

_MEMORY_SEED = 90
_QUERY_CHUNK = 1024  # bounds the similarity table to 1,024 x the memory


class InContextSegmentation(Evaluator):
    """Segmentation by nearest patches: `miou` over the classes that occur, `accuracy` of pixels, `iou_<class>`.

    Args:
        masked_train: images with masks of classes, whose patches make the memory.
        masked: images that are scored.
        k: nearest patches that a patch attends to.
        temp: temperature of the attention.
        memory_size: patches in the memory at most, as many from every training image, drawn pseudo-randomly and the same each time.
        image_size: side of the square, or height and width; None for the card's item shape.
        layer: block whose features are taken; negative numbers count from the last.
        batch_size: images at a time.
        bf16: encode under bfloat16 autocast.

    Raises:
        ValueError: masks hold no classes or different ones, or a number is out of range.
    """

    headlines = ("miou", "accuracy")

    def __init__(
        self,
        masked_train: Source | Pixels,
        masked: Source | Pixels,
        *,
        k: int = 30,
        temp: float = 0.02,
        memory_size: int = 10_240,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        self.masked_train, self.masked = class_pixels_pair(masked_train, masked)
        if temp <= 0:
            raise ValueError(f"temp: {temp}; accepted: a positive number")
        if not 1 <= k <= memory_size:
            raise ValueError(f"k: {k}; accepted: 1 to {memory_size}, the memory_size")
        if memory_size < len(self.masked_train):
            raise ValueError(f"memory_size: {memory_size}; accepted: from {len(self.masked_train)}, one patch per training image")
        self.k, self.temp, self.memory_size = k, temp, memory_size
        self.image_size, self.layer, self.batch_size, self.bf16 = image_size, layer, batch_size, bf16

    @property
    def scored(self) -> Pixels:
        return self.masked

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        options = self._options(cache)
        return Result(predicted_scores(encoder, self.masked, self._predictor(encoder, options), options=options), chosen={})

    def pictures(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> dict[str, Figure]:
        """`classes`: a few scored images, their masks and the prediction."""
        options = self._options(cache)
        return {"classes": predicted_figure(encoder, self.masked, self._predictor(encoder, options), options=options)}

    def _options(self, cache: FeatureCache | None) -> FeatureOptions:
        return FeatureOptions(self.image_size, self.layer, self.batch_size, self.bf16, cache)

    def _predictor(self, encoder: Encoder, options: FeatureOptions) -> Predictor:
        grid = encoder.grid(evaluation_shape(encoder, self.image_size))
        device = next(encoder.parameters(), torch.empty(0)).device
        memory, shares = (part.to(device) for part in self._memory(encoder, grid, options))
        if len(memory) < self.k:
            raise ValueError(f"k: {self.k}; only {len(memory)} patches of masked_train have a class and are in the memory")

        def predict(patches: Tensor, size: tuple[int, int]) -> Tensor:
            found = attend(patches.flatten(0, 1).to(device), memory, shares, k=self.k, temp=self.temp)
            return best_class(found.cpu().unflatten(0, patches.shape[:2]), grid=grid, size=size)

        return predict

    def _memory(self, encoder: Encoder, grid: tuple[int, int], options: FeatureOptions) -> tuple[Tensor, Tensor]:
        """Float[M D] patches, and Float[M C] the shares of their known pixels."""
        num_patches, num_classes = grid[0] * grid[1], len(self.masked.source.mask_classes)
        of_image = min(num_patches, self.memory_size // len(self.masked_train))
        patches: list[Tensor] = []
        shares: list[Tensor] = []
        for batch, found in class_patches(encoder, self.masked_train, options=options):
            item_keys = keys.item_keys(seed=_MEMORY_SEED, epoch=0, index=batch.index)
            drawn = keys.permutation(item_keys, num_patches)[:, :of_image, None]  # [B M 1]
            of_batch = class_shares(batch.semantic, grid=grid, num_classes=num_classes)  # [B N C]
            patches.append(found.gather(1, drawn.expand(-1, -1, found.shape[2])).flatten(0, 1))
            shares.append(of_batch.gather(1, drawn.expand(-1, -1, num_classes)).flatten(0, 1))
        memory, known = torch.cat(patches), torch.cat(shares)
        total = known.sum(dim=1, keepdim=True)  # [M 1]
        usable = total[:, 0] > 0
        return memory[usable], known[usable] / total[usable]


def attend(queries: Tensor, memory: Tensor, values: Tensor, *, k: int, temp: float) -> Tensor:
    """The mean of the values of the k nearest, weighted by softmax(cosine / temp).

    Args:
        queries: Float[B D].
        memory: Float[M D].
        values: Float[M C].
        k: at most M.
        temp: temperature.

    Returns:
        Float[B C].
    """
    targets = functional.normalize(memory, dim=-1)
    found: list[Tensor] = []
    for chunk in functional.normalize(queries, dim=-1).split(_QUERY_CHUNK):
        similarity, neighbour = (chunk @ targets.T).topk(k, dim=-1)  # [B k]
        found.append(torch.einsum("bk,bkc->bc", (similarity / temp).softmax(dim=-1), values[neighbour]))
    return torch.cat(found)
