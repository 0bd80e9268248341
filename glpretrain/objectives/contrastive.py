"""Contrast between items, against a queue of earlier items, and between the patches of one item that show the same place."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core.distributed import gather_with_grad, rank
from glpretrain.core.frames import matches, token_centres, token_sides
from glpretrain.objectives.base import Objective, mean_over_pairs
from glpretrain.training.memory import FeatureQueue


class InfoNCE(Objective):
    """InfoNCE between items: each query against the keys of all items in all processes.

    2 temp * mean over items i of -log softmax_j(cos(query_i, key_j) / temp)[i], as MoCo v3 and SiT (main.py).
    Near zero where matching pairs are alike and far from all others.
    """

    def __init__(self, *, temp: float = 0.2) -> None:
        super().__init__()
        if not temp > 0.0:
            raise ValueError(f"temp: accepted are values above 0, not {temp}")
        self.temp = temp

    def forward(self, *, queries: Tensor, keys: Tensor, hallucinated: Tensor | None = None) -> Tensor:
        """Float[B]: contrast in one direction, every query against the keys of all processes.

        Args:
            queries: Float[B D], of this process.
            keys: Float[B D], in the same order.
            hallucinated: Float[B D], one more query per item, with the same weight as the item's own.
        """
        num_items, _ = queries.shape
        assert queries.shape == keys.shape, f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        keys = gather_with_grad(F.normalize(keys, dim=-1))  # [world*B D]
        labels = torch.arange(num_items, device=queries.device) + num_items * rank()
        if hallucinated is not None:
            assert hallucinated.shape == queries.shape, f"{tuple(hallucinated.shape)} and {tuple(queries.shape)}"
            queries, labels = torch.cat([queries, hallucinated]), labels.repeat(2)
        logits = torch.einsum("bd,kd->bk", F.normalize(queries, dim=-1), keys) / self.temp
        cross = F.cross_entropy(logits, labels, reduction="none")  # [B], or [2B] with the hallucinated ones behind
        return 2.0 * self.temp * cross.unflatten(0, (-1, num_items)).mean(dim=0)


class QueueInfoNCE(Objective):
    """MoCo's loss between the views of an item, with negatives from a queue of earlier keys (Mugs src/loss.py, InfoNCELoss).

    Mean over items, over pairs of a key view g and a query view v != g, of -log softmax([query_v . key_g, query_v . queue] / temp)[0];
    pairs with a global and pairs with a local query view count one half each. Near zero where queries are like their keys and
    far from the queue. The queue holds the keys of earlier steps only.

    Args:
        dim: width D.
        queue_size: number of rows of the queue, K.
        temp: temperature.
    """

    def __init__(self, *, dim: int, queue_size: int = 65536, temp: float = 0.2) -> None:
        super().__init__()
        if not temp > 0.0:
            raise ValueError(f"temp: accepted are values above 0, not {temp}")
        self.temp = temp
        self.queue = FeatureQueue(queue_size, dim, unit=True)

    def forward(self, *, queries: Tensor, keys: Tensor, hallucinated: Tensor | None = None) -> Tensor:
        """Float[B]: contrast of all pairs of different views.

        Args:
            queries: Float[V B D], rows of length one; the first G views are the keys'.
            keys: Float[G B D], rows of length one.
            hallucinated: Float[G V B D], rows of length one: one more query per pair, with the same weight as the pair's own.
        """
        _, num_items, dim = queries.shape
        _, *rest = keys.shape
        assert rest == [num_items, dim], f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}"
        keys = keys.detach()
        loss = self._pairs(torch.einsum("vbd,gbd->gvb", queries, keys), self._negatives(queries))
        if hallucinated is None:
            return loss
        return 0.5 * (loss + self._pairs(torch.einsum("gvbd,gbd->gvb", hallucinated, keys), self._negatives(hallucinated)))

    def _negatives(self, queries: Tensor) -> Tensor:
        """Float[*S D] to Float[*S]: a query's negatives are the same for every key, so their sum is taken once."""
        return torch.logsumexp(F.linear(queries, self.queue.rows) / self.temp, dim=-1)

    def _pairs(self, positives: Tensor, negatives: Tensor) -> Tensor:
        positives = positives / self.temp  # [G V B]
        return mean_over_pairs(torch.logaddexp(positives, negatives) - positives, balanced=True)

    def update(self, *, keys: Tensor) -> None:
        """Gather the keys of one micro-batch, Float[G B D]; the queue moves in `advance`."""
        self.queue.update(keys)


class PatchInfoNCE(Objective):
    """InfoNCE between the patches of two views that show the same place of an item.

    A query whose centre lies within `max_distance` key patches of the nearest key's centre has that key as its positive and the
    item's other keys as negatives; the loss of an item is InfoNCE over its queries with a positive. Views that do not overlap
    have the loss 0. Our choice, as plain as possible: negatives come from the same item only, so the loss does not depend on how a batch
    is cut into processes.
    """

    def __init__(self, *, temp: float = 0.2, max_distance: float = 0.75) -> None:
        super().__init__()
        if not (temp > 0.0 and max_distance > 0.0):
            raise ValueError(f"temp and max_distance: accepted are values above 0, not {temp} and {max_distance}")
        self.temp = temp
        self.max_distance = max_distance

    def match(self, *, query_frames: Tensor, key_frames: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Int[B N] and Bool[B N]: the nearest key of every query, and whether it is within `max_distance`.

        Args:
            query_frames: Float[B A A+1], where the first view lies in the item.
            key_frames: Float[B A A+1], where the second view lies.
            grid: tokens along each axis of both views, N in all.
        """
        query_places, key_places = (token_centres(frames, grid=grid) for frames in (query_frames, key_frames))
        return matches(query_places, key_places, spacing=token_sides(key_frames, grid=grid), max_distance=self.max_distance)

    def forward(self, *, queries: Tensor, keys: Tensor, nearest: Tensor, valid: Tensor) -> Tensor:
        """Float[B]: contrast in one direction, patches of one view against those of the other.

        Args:
            queries: Float[B M D], patches of one view, all or some of them.
            keys: Float[B N D], patches of the other.
            nearest: Int[B M], which key shows the place of a query (`match`).
            valid: Bool[B M], whether it does; where it does not, the query has no loss.
        """
        num_items, num_queries, _ = queries.shape
        assert keys.shape[::2] == queries.shape[::2] and nearest.shape == valid.shape == (num_items, num_queries), (queries, keys)
        logits = torch.einsum("bmd,bnd->bmn", F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)) / self.temp
        cross = F.cross_entropy(logits.flatten(0, 1), nearest.flatten(), reduction="none").unflatten(0, (num_items, num_queries))
        # The mean of each item, so that items count the same and the halves of a batch average to the whole.
        return 2.0 * self.temp * (cross * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


class NPair(Objective):
    """N-pair contrast between a teacher's assignments and a student's logits (PointGLR; never called in POS-BERT).

    mean over teacher views g, crops v and items b of -log softmax_j(scale * <assignments[g, b], logits[v, j] / student_temp>)[b], as
    POS-BERT's pretrain.py, get_npair_loss. Ours: the items of all processes are compared. Near zero where the teacher's
    assignments fit the logits of their own item only.

    Args:
        scale: factor on the products.
        student_temp: temperature of the logits.
    """

    def __init__(self, *, scale: float = 64.0, student_temp: float = 0.1) -> None:
        super().__init__()
        if not (scale > 0.0 and student_temp > 0.0):
            raise ValueError(f"scale and student_temp: accepted are values above 0, not {scale} and {student_temp}")
        self.scale, self.student_temp = scale, student_temp

    def forward(self, *, assignments: Tensor, logits: Tensor) -> Tensor:
        """Float[B] of teacher views' assignments, Float[G B K] with rows that sum to one, without gradient, and logits Float[V B K]."""
        _, num_items, num_prototypes = assignments.shape
        _, *rest = logits.shape
        assert rest == [num_items, num_prototypes], f"{tuple(assignments.shape)} and {tuple(logits.shape)}"
        keys = gather_with_grad(logits.transpose(0, 1)) / self.student_temp  # [world*B V K]
        scores = self.scale * torch.einsum("gbk,jvk->gvbj", assignments.detach(), keys)
        own = torch.arange(num_items, device=scores.device)
        return -torch.log_softmax(scores, dim=-1)[:, :, own, own + num_items * rank()].mean(dim=(0, 1))


class NegativeCosine(Objective):
    """-1/2 mean over items of cos(query_i, key_i), for one of SimSiam's two directions (FSFM util/loss_contrastive.py, SimSiamLoss).

    Smallest, at -1/2, where every query points in the direction of its key.
    """

    def forward(self, *, queries: Tensor, keys: Tensor) -> Tensor:
        """Float[B]: rows Float[B D] compared with rows Float[B D] in the same order; both may get gradients."""
        assert queries.shape == keys.shape and queries.dim() == 2, f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        return -0.5 * F.cosine_similarity(queries, keys, dim=1)
