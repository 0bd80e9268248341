"""k-NN on `cls`: the weighted vote of DINO, for every k in one pass.

Protocol: Caron et al., "Emerging properties in self-supervised vision transformers", 2021, appendix F, and eval_knn.py of
github.com/facebookresearch/dino: cosine similarity, each of the k nearest training items votes for its class with
exp(similarity / 0.07). Pictures are read whole along their short side; DINO's numbers need its transform, `features.crop: inner`, and a
size of 224. A choice of k on the test items is left out on purpose.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive, with_accuracy
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import device_of
from glpretrain.evaluate.items import Sources
from glpretrain.evaluate.metrics.intervals import accuracy
from glpretrain.evaluate.probes import answerable
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.rows import LabelledFeatures, Rows

_DEFAULT_K = (10, 20)  # DINO reports 20 as the best over its models
_ORDER_SEED = 92
_CPU = torch.device("cpu")
_TRIED = 64  # queries, and a hundred times as many voters, that tell how long all will take
_TEST_CHUNK, _TABLE_CELLS = 512, 1 << 26  # test items at a time, and fewer where the table of similarities would pass 256 MB


@dataclass(frozen=True, kw_only=True)
class KNN(Evaluator):
    """Accuracy of the weighted k-NN vote: `k10`, `k20`, ... and `accuracy`, which is that of the last k.

    `train` votes, `test` is classified.

    Args:
        k: numbers of neighbours; None takes 10 and 20, of these only the numbers that `train` has items for, and 1 where it has neither.
        temp: temperature of the votes.
    """

    headlines = ("accuracy",)
    scored = "test"
    needs = ("train", "test")
    truth = "classes"

    k: Sequence[int] | None = None
    temp: float = 0.07

    def validate(self) -> None:
        if self.k is not None:
            require_positive("k", self.k)
        require_positive("temp", self.temp)

    def comparing_seconds(self, dim: int, counts: Mapping[str, int], device: torch.device) -> float:
        """See `Evaluator`."""
        count = min(100 * _TRIED, counts["train"])
        rows = LabelledFeatures(keys.normal(torch.tensor(_ORDER_SEED), count, dim), torch.arange(count) % 2, torch.arange(count))
        start = time.perf_counter()
        knn_predict(rows, rows.cls[:_TRIED], k=[k for k in self.k or _DEFAULT_K if k <= count] or [1], temp=self.temp, device=device)
        cells = min(_TRIED, count) * count
        return (time.perf_counter() - start) / cells * counts["train"] * counts["test"]

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        train, test = (self.features.labelled(encoder, sources[role], cache) for role in ("train", "test"))
        test, unlike = answerable(train, test, sources)
        train = train.at(keys.permutation(torch.tensor(_ORDER_SEED), len(train.labels)))  # so that ties follow no order of classes
        count = len(train.labels)
        wanted = tuple(k for k in _DEFAULT_K if k <= count) or (1,) if self.k is None else self.k
        numbers = [k for k in wanted if k <= count]
        reason = f"k: {list(wanted)}; accepted: numbers from 1 to {count}, the training items"
        if not numbers:
            raise ValueError(reason)
        predictions = knn_predict(train, test.cls, k=numbers, temp=self.temp, device=device_of(encoder))
        scores = {f"k{k}": accuracy(predicted, test.labels, test.groups) for k, predicted in zip(numbers, predictions, strict=True)}
        return with_accuracy(scores, of=f"k{wanted[-1]}", left_out={**{f"k{k}": reason for k in wanted if k > count}, **unlike})


def knn_predict(train: LabelledFeatures, queries: Tensor, *, k: Sequence[int], temp: float, device: torch.device = _CPU) -> list[Tensor]:
    """The class with the largest sum of exp(cosine / temp) over the k nearest; the lower class on a tie.

    Args:
        train: the items that vote.
        queries: Float[B D], the rows that are classified.
        k: numbers of neighbours, each at most the number of voters.
        temp: temperature of the votes.
        device: where similarities are computed; all voters have to fit there.

    Returns:
        Int[B] for each k, on the CPU.
    """
    voters, of_voter = functional.normalize(train.cls, dim=-1).to(device), train.labels.to(device)
    num_classes = int(train.labels.max()) + 1
    predictions = Rows(len(queries))
    per_chunk = min(_TEST_CHUNK, max(1, _TABLE_CELLS // len(voters)))
    chunks = functional.normalize(queries, dim=-1).split(per_chunk)
    for chunk in tracked(chunks, total=len(chunks), description="nearest neighbours"):
        similarity, neighbour = (chunk.to(device) @ voters.T).topk(max(k), dim=-1)  # [B max(k)]
        # Relative to the nearest: the same vote, and exp cannot overflow at a small temperature.
        votes = ((similarity - similarity[:, :1]) / temp).exp()
        labels = of_voter[neighbour]  # [B max(k)]
        empty = votes.new_zeros(len(chunk), num_classes)
        predictions.add(*(empty.scatter_add(1, labels[:, :count], votes[:, :count]).argmax(dim=-1).cpu() for count in k))
    return predictions.tensors(len(k))
