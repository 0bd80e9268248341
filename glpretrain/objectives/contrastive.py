"""InfoNCE between items, against a queue of earlier items, and between the patches of one item that show the same place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core.distributed import gather_with_grad, rank
from glpretrain.objectives.base import Objective, mean_over_pairs
from glpretrain.training.memory import FeatureQueue


class InfoNCE(Objective):
    """For every item: which of the keys of all items, in all processes, belongs to it?

    2 temp * mean over items i of -log softmax_j(cos(query_i, key_j) / temp)[i], as MoCo v3 and SiT (main.py).
    Zero in the limit of matching pairs that are far from all others.
    """

    def __init__(self, *, temp: float = 0.2) -> None:
        super().__init__()
        if temp <= 0.0:
            raise ValueError(f"temp: accepted are values above 0, not {temp}")
        self.temp = temp

    def forward(self, *, queries: Tensor, keys: Tensor, hallucinated: Tensor | None = None) -> Tensor:
        """Contrast in one direction: every query against the keys of all processes.

        Args:
            queries: Float[B D], of this process.
            keys: Float[B D], in the same order.
            hallucinated: Float[B D], one more query per item, which counts like the item's own.

        Returns:
            Float[].
        """
        num_items, _ = queries.shape
        assert queries.shape == keys.shape, f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        keys = gather_with_grad(F.normalize(keys.float(), dim=-1))  # [world*B D]
        labels = torch.arange(num_items, device=queries.device) + num_items * rank()
        if hallucinated is not None:
            assert hallucinated.shape == queries.shape, f"{tuple(hallucinated.shape)} and {tuple(queries.shape)}"
            queries, labels = torch.cat([queries, hallucinated]), labels.repeat(2)
        logits = torch.einsum("bd,kd->bk", F.normalize(queries.float(), dim=-1), keys) / self.temp
        return 2.0 * self.temp * F.cross_entropy(logits, labels)


class QueueInfoNCE(Objective):
    """MoCo's loss between the views of an item, with negatives from a queue of earlier keys (Mugs src/loss.py, InfoNCELoss).

    Mean over items, over pairs of a key view g and a query view v != g, of -log softmax([query_v . key_g, query_v . queue] / temp)[0];
    pairs with a global and pairs with a local query view count one half each. Zero in the limit of queries on their keys and far
    from the queue. The queue holds the keys of steps before, not of this one.

    Args:
        dim: width D.
        queue_size: K.
        temp: temperature.
    """

    def __init__(self, *, dim: int, queue_size: int = 65536, temp: float = 0.2) -> None:
        super().__init__()
        if temp <= 0.0:
            raise ValueError(f"temp: accepted are values above 0, not {temp}")
        self.temp = temp
        self.queue = FeatureQueue(queue_size, dim, unit=True)

    def forward(self, *, queries: Tensor, keys: Tensor, hallucinated: Tensor | None = None) -> Tensor:
        """Contrast of all pairs of different views.

        Args:
            queries: Float[V B D], rows of length one; the first G views are the keys'.
            keys: Float[G B D], rows of length one.
            hallucinated: Float[G V B D], rows of length one: one more query per pair, which counts like the pair's own.

        Returns:
            Float[].
        """
        _, num_items, dim = queries.shape
        _, *rest = keys.shape
        assert rest == [num_items, dim], f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}"
        queries, keys = queries.float(), keys.detach().float()
        loss = self._pairs(torch.einsum("vbd,gbd->gvb", queries, keys), self._negatives(queries))
        if hallucinated is None:
            return loss
        hallucinated = hallucinated.float()
        return 0.5 * (loss + self._pairs(torch.einsum("gvbd,gbd->gvb", hallucinated, keys), self._negatives(hallucinated)))

    def _negatives(self, queries: Tensor) -> Tensor:
        """Float[*S D] to Float[*S]: a query's negatives are the same for every key, so their sum is taken once."""
        with torch.autocast(device_type=queries.device.type, enabled=False):  # cosines in bf16 are off by up to 0.004
            return torch.logsumexp(F.linear(queries, self.queue.rows) / self.temp, dim=-1)

    def _pairs(self, positives: Tensor, negatives: Tensor) -> Tensor:
        positives = positives / self.temp  # [G V B]
        return mean_over_pairs((torch.logaddexp(positives, negatives) - positives).mean(dim=-1), balanced=True)

    def update(self, *, keys: Tensor) -> None:
        """Take in one micro-batch's keys, Float[G B D]; the queue moves in `advance`."""
        self.queue.update(keys)


def token_centres(boxes: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """Where the centre of every token of a view lies in its item's unit square.

    Args:
        boxes: Float[B 5], the view's crop (x0 y0 x1 y1), and 1 where it was flipped left to right + 2 * the quarter turns
            counterclockwise after that.
        grid: tokens along height and width, N together.

    Returns:
        Float[B N 2], x and y.
    """
    height, width = grid
    x0, y0, x1, y1, orientation = (value.unsqueeze(1) for value in boxes.unbind(dim=1))  # [B 1] each
    turns = torch.div(orientation, 2, rounding_mode="floor")
    along = ((torch.arange(width, device=boxes.device) + 0.5) / width).repeat(height)  # [N]
    down = ((torch.arange(height, device=boxes.device) + 0.5) / height).repeat_interleave(width)
    # Turned back: one turn brought what was at (1 - down, along) to (along, down).
    odd = turns % 2 == 1
    along, down = torch.where(odd, 1.0 - down, along), torch.where(odd, along, down)  # [B N]
    along, down = torch.where(turns >= 2, 1.0 - along, along), torch.where(turns >= 2, 1.0 - down, down)
    along = torch.where(orientation % 2 == 1, 1.0 - along, along)
    return torch.stack([x0 + (x1 - x0) * along, y0 + (y1 - y0) * down], dim=-1)


class PatchInfoNCE(Objective):
    """For every patch of one view: which patch of the item's other view shows the same place?

    A query whose centre lies within `max_distance` key patches of the nearest key's centre has that key as its positive and the
    item's other keys as negatives; the loss is InfoNCE's over all such queries of the batch. A pair of views that do not
    overlap adds nothing. Our choice, as plain as possible: negatives come from the same item only, so the loss does not
    depend on how a batch is cut into processes.
    """

    def __init__(self, *, temp: float = 0.2, max_distance: float = 0.75) -> None:
        super().__init__()
        if temp <= 0.0 or max_distance <= 0.0:
            raise ValueError(f"temp and max_distance: accepted are values above 0, not {temp} and {max_distance}")
        self.temp = temp
        self.max_distance = max_distance

    def match(self, *, query_boxes: Tensor, key_boxes: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The nearest key of every query, and whether it is near enough.

        Args:
            query_boxes: Float[B 5].
            key_boxes: Float[B 5].
            grid: tokens along height and width of both views.

        Returns:
            Int[B N] index of the key, Bool[B N].
        """
        x0, y0, x1, y1, _ = key_boxes.unbind(dim=1)
        side = torch.stack([(x1 - x0) / grid[1], (y1 - y0) / grid[0]], dim=-1)[:, None, :]  # [B 1 2]: one key patch
        scaled = [token_centres(boxes, grid=grid) / side for boxes in (query_boxes, key_boxes)]
        distance, nearest = torch.cdist(*scaled).min(dim=-1)
        return nearest, distance <= self.max_distance

    def forward(self, *, queries: Tensor, keys: Tensor, query_boxes: Tensor, key_boxes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Contrast in one direction: every patch of one view against the patches of the other.

        Args:
            queries: Float[B N D], patches of one view.
            keys: Float[B N D], patches of the other.
            query_boxes: Float[B 5], where the first view came from.
            key_boxes: Float[B 5], where the second came from.
            grid: tokens along height and width, N together.

        Returns:
            Float[].
        """
        num_items, num_tokens, _ = queries.shape
        assert queries.shape == keys.shape and grid[0] * grid[1] == num_tokens, f"{queries.shape}, {keys.shape}, {grid}"
        nearest, valid = self.match(query_boxes=query_boxes, key_boxes=key_boxes, grid=grid)
        logits = torch.einsum("bnd,bmd->bnm", F.normalize(queries.float(), dim=-1), F.normalize(keys.float(), dim=-1)) / self.temp
        cross = F.cross_entropy(logits.flatten(0, 1), nearest.flatten(), reduction="none").unflatten(0, (num_items, num_tokens))
        # Per item, then over items: every item weighs the same, which is what makes halves of a batch average to the whole.
        per_item = (cross * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
        return 2.0 * self.temp * per_item.mean()
