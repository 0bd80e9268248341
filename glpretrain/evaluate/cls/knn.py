"""k-NN on `cls`: the weighted vote of DINO, for every k in one pass.

Protocol: Caron et al., "Emerging properties in self-supervised vision transformers", 2021, appendix F, and eval_knn.py of
github.com/facebookresearch/dino: cosine similarity, each of the k nearest training items votes for its class with
exp(similarity / 0.07). Left out on purpose: a choice of k on the test items.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import LabelledFeatures, cls_features
from glpretrain.evaluate.metrics.intervals import rate_interval
from glpretrain.evaluate.pixels import Pixels

_TEST_CHUNK, _TABLE_CELLS = 512, 1 << 26  # test items at a time, and fewer where the table of similarities would pass 256 MB


class KNN(Evaluator):
    """Accuracy of the weighted k-NN vote: `k10`, `k20`, ... and `accuracy`, which is that of the last k given.

    Args:
        train: items that vote.
        test: items that are classified.
        k: numbers of neighbours. DINO reports 20 as the best over its models.
        temp: temperature of the votes.
        image_size: side of the square, or height and width; None for the card's item shape.
        layer: block whose features are taken; negative numbers count from the last.
        batch_size: items at a time.
        bf16: encode under bfloat16 autocast.

    Raises:
        ValueError: there are fewer training items than neighbours, or the two sources have different classes.
    """

    headlines = ("accuracy",)

    def __init__(
        self,
        train: Source | Pixels,
        test: Source | Pixels,
        *,
        k: Sequence[int] = (10, 20),
        temp: float = 0.07,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        self.train, self.test = labelled_pair(train, test)
        if not k or min(k) < 1 or max(k) > len(self.train):
            raise ValueError(f"k: {list(k)}; accepted: numbers from 1 to {len(self.train)}, the training items")
        if temp <= 0:
            raise ValueError(f"temp: {temp}; accepted: a positive number")
        self.k, self.temp = tuple(k), temp
        self.image_size, self.layer, self.batch_size, self.bf16 = image_size, layer, batch_size, bf16

    @property
    def scored(self) -> Pixels:
        return self.test

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        options = {"image_size": self.image_size, "layer": self.layer, "batch_size": self.batch_size, "bf16": self.bf16, "cache": cache}
        train, test = cls_features(encoder, self.train, **options), cls_features(encoder, self.test, **options)
        if len(train.labels) < max(self.k):
            raise ValueError(f"k: {list(self.k)}; only {len(train.labels)} training items can be read and have a label")
        predictions = knn_predict(train, test.cls, k=self.k, temp=self.temp)
        scores = {f"k{k}": accuracy(predicted, test.labels) for k, predicted in zip(self.k, predictions, strict=True)}
        return Result({"accuracy": scores[f"k{self.k[-1]}"], **scores}, chosen={})


def accuracy(predicted: Tensor, labels: Tensor) -> Score:
    """Share of Int[B] that equals Int[B], in percent, with Wilson's interval."""
    rate, count = (predicted == labels).float().mean().item(), len(labels)
    return Score(100 * rate, 100 * rate_interval(rate, count=count), count)


def labelled_pair(train: Source | Pixels, test: Source | Pixels) -> tuple[Pixels, Pixels]:
    """Both as `Pixels`.

    Raises:
        ValueError: a source has no classes, or the two have different ones.
    """
    pair = Pixels.of(train), Pixels.of(test)
    for pixels in pair:
        if not pixels.source.classes:
            raise ValueError(f"source {pixels.source.name!r} has no classes; this evaluator needs labelled items")
    if list(pair[0].source.classes) != list(pair[1].source.classes):
        raise ValueError(f"test: classes {list(pair[1].source.classes)}; accepted: those of train, {list(pair[0].source.classes)}")
    return pair


def knn_predict(train: LabelledFeatures, queries: Tensor, *, k: Sequence[int], temp: float) -> list[Tensor]:
    """The class with the largest sum of exp(cosine / temp) over the k nearest; the lower class on a tie.

    Args:
        train: who votes.
        queries: Float[B D].
        k: numbers of neighbours, each at most the number of voters.
        temp: temperature.

    Returns:
        Int[B] for each k.
    """
    keys = functional.normalize(train.cls, dim=-1)
    num_classes = int(train.labels.max()) + 1
    predictions: list[list[Tensor]] = [[] for _ in k]
    per_chunk = min(_TEST_CHUNK, max(1, _TABLE_CELLS // len(keys)))
    for chunk in functional.normalize(queries, dim=-1).split(per_chunk):
        similarity, neighbour = (chunk @ keys.T).topk(max(k), dim=-1)  # [B max(k)]
        # Relative to the nearest: the same vote, and exp cannot overflow at a small temperature.
        votes = ((similarity - similarity[:, :1]) / temp).exp()
        labels = train.labels[neighbour]  # [B max(k)]
        for part, count in zip(predictions, k, strict=True):
            ballot = torch.zeros(len(chunk), num_classes).scatter_add_(1, labels[:, :count], votes[:, :count])
            part.append(ballot.argmax(dim=-1))
    return [torch.cat(part) for part in predictions]
