"""In-context segmentation: every patch takes the classes of the most similar patches of labelled images; nothing is trained.

Protocol: Balazevic et al., "Towards in-context scene understanding", NeurIPS 2023 (Hummingbird). A memory holds training patches and the
shares of the classes among their pixels; a patch attends to its k nearest in cosine with softmax(cosine / temp); the shares that it
finds are upsampled bilinearly, a pixel shows the class with the largest. k = 30 and temp = 0.02 are the paper's.
Differences: the memory is a uniform sample of the training patches where the paper prefers patches with many classes, without
augmented copies. Approximate search is left out on purpose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import device_of
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.patches.segmentation import (
    Predictor,
    TokenSample,
    best_class,
    class_shares,
    image_patches,
    predicted_figure,
    predicted_scores,
    taken,
)
from glpretrain.evaluate.rows import Rows

_MEMORY_SEED = 90
_QUERY_CHUNK, _TABLE_CELLS = 1024, 1 << 26  # queries at a time, and fewer where the table of similarities would pass 256 MB


@dataclass(frozen=True, kw_only=True)
class InContextSegmentation(Evaluator):
    """Segmentation of `masked` by nearest patches: `miou` over the classes that occur, `accuracy` of pixels, `iou_<class>`.

    The patches of `masked_train` make the memory.

    Args:
        k: number of nearest patches that a patch attends to.
        temp: temperature of the attention.
        memory_size: number of patches in the memory at most, as many from every training image, drawn pseudo-randomly and always the same;
            one of each of so many images where there are more.
    """

    headlines = ("miou", "accuracy")
    scored = "masked"
    needs = ("masked_train", "masked")
    truth = "mask_classes"
    unused = ("crop",)
    modality = "image"

    k: int = 30
    temp: float = 0.02
    memory_size: int = 10_240

    def validate(self) -> None:
        require_positive("temp", self.temp)
        if not 1 <= self.k <= self.memory_size:
            raise ValueError(f"k: {self.k}; accepted: 1 to {self.memory_size}, the memory_size")

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        predict = self._predictor(encoder, sources["masked_train"], cache)
        return Result(predicted_scores(encoder, sources["masked"], predict, features=self.features, cache=cache), chosen={})

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`classes`: a few scored images, their masks and the prediction."""
        predict = self._predictor(encoder, sources["masked_train"], cache)
        return {"classes": predicted_figure(encoder, sources["masked"], predict, features=self.features, cache=cache)}

    def _predictor(self, encoder: Encoder, train: DecodedItems, cache: FeatureCache | None) -> Predictor:
        grid, device = self.features.image_grid(encoder), device_of(encoder)
        memory, shares = (part.to(device) for part in self._memory(encoder, train, grid, cache))
        if len(memory) < self.k:
            raise ValueError(f"k: {self.k}; only {len(memory)} patches of masked_train have a class and are in the memory")

        def predict(patches: Tensor, size: Sequence[int]) -> Tensor:
            found = attend(patches.flatten(0, 1).to(device), memory, shares, k=self.k, temp=self.temp)
            return best_class(found.cpu().unflatten(0, patches.shape[:2]), grid=grid, size=size)

        return predict

    def _memory(self, encoder: Encoder, train: DecodedItems, grid: tuple[int, int], cache: FeatureCache | None) -> tuple[Tensor, Tensor]:
        """Float[M D] patches, and Float[M C] the shares of their known pixels."""
        num_classes = len(train.source.mask_classes)
        sample = TokenSample(train, num_tokens=grid[0] * grid[1], at_most=self.memory_size, seed=_MEMORY_SEED)
        rows = Rows(len(sample.items) * sample.of_item)
        for batch, found in image_patches(encoder, sample.items, features=self.features, cache=cache):
            places = sample.places(batch.index)
            of_batch = class_shares(batch.class_masks(), grid=grid, num_classes=num_classes)  # [B N C]
            rows.add(taken(found, places).flatten(0, 1), taken(of_batch, places).flatten(0, 1))
        memory, known = rows.tensors(2)
        total = known.sum(dim=1, keepdim=True)  # [M 1]
        usable = total[:, 0] > 0
        return memory[usable], known[usable] / total[usable]


def attend(queries: Tensor, memory: Tensor, values: Tensor, *, k: int, temp: float) -> Tensor:
    """Float[B C]: the mean of the values of the k nearest, weighted by softmax(cosine / temp).

    Args:
        queries: Float[B D], features that attend.
        memory: Float[M D], features that are attended to.
        values: Float[M C], values of the memory.
        k: number of nearest features that count, at most M.
        temp: temperature of the softmax.
    """
    targets = functional.normalize(memory, dim=-1)
    found = Rows(len(queries))
    for chunk in functional.normalize(queries, dim=-1).split(min(_QUERY_CHUNK, max(1, _TABLE_CELLS // len(targets)))):
        similarity, neighbour = (chunk @ targets.T).topk(k, dim=-1)  # [B k]
        found.add(torch.einsum("bk,bkc->bc", (similarity / temp).softmax(dim=-1), values[neighbour]))
    return found.tensors(1)[0]
