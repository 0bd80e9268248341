"""State that moves once per optimizer step, and the kind that holds features: queues of negatives, memories of neighbours.

Left out: what is computed from the features (objectives, methods).
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glpretrain.core.distributed import gather_with_grad, world_size


class State(nn.Module, ABC):
    """Buffers that move once per optimizer step, and alike in every process.

    A subclass's `update` only gathers what a micro-batch has to say; `advance`, which the method calls once per optimizer step,
    moves the buffers by all of it. So a loss does not change while gradients accumulate.
    """

    @abstractmethod
    def advance(self, progress: float = 0.0) -> None:
        """Move by one optimizer step.

        Args:
            progress: share of the run that was done before this step, for states that move at certain shares of it.
        """


class FeatureQueue(State):
    """The last K features that were put in, in a ring: the oldest row is the next to be overwritten.

    Rows enter in the order of views, micro-batches, processes and items, which is the order of one process with the joined batch.
    Starts with normal random numbers, so that a search or a softmax has something to look at before the first round is over.

    Args:
        num_rows: K.
        dim: width D.
        unit: rows start on the unit sphere (negatives of a contrast, MoCo) or as they were drawn (Mugs' memories).
        advance_twice: move the place for the next row on by twice what was written unless the writing wrapped around, as Mugs' code
            does (src/model.py, Block_mem): half of the rows may then keep their random numbers for ever. Only for comparisons with it.

    Raises:
        ValueError: no row.
    """

    def __init__(self, num_rows: int, dim: int, *, unit: bool = False, advance_twice: bool = False) -> None:
        super().__init__()
        if num_rows < 1:
            raise ValueError(f"num_rows: a queue has at least 1 row, not {num_rows}")
        rows = torch.randn(num_rows, dim)
        self.register_buffer("rows", F.normalize(rows, dim=-1) if unit else rows)  # [K D]
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))  # of the next row
        self.advance_twice = advance_twice
        self._pending: list[Tensor] = []  # of this step's micro-batches

    @torch.no_grad()
    def update(self, features: Tensor, *, chosen: Tensor | None = None) -> None:
        """Take in one micro-batch's features; the queue moves in `advance`.

        Args:
            features: Float[V B D].
            chosen: Bool[B], the items that are to enter; None takes all.
        """
        num_views, num_items, _ = features.shape
        flags = features.new_ones(num_items) if chosen is None else chosen
        assert flags.shape == (num_items,), f"{tuple(features.shape)} and {tuple(flags.shape)}"
        # One tensor and so one collective; the flag is its last column.
        flags = flags.float().view(1, num_items, 1).expand(num_views, -1, -1)
        self._pending.append(torch.cat([features.detach().float(), flags], dim=-1))

    @torch.no_grad()
    def advance(self, progress: float = 0.0) -> None:
        """Write what came in since the last call."""
        if not self._pending:
            return
        columns = [gather_with_grad(part.unsqueeze(0)) for part in self._pending]  # [W V B D+1] each
        self._pending = []
        # Micro-batches before processes: what all processes saw at one time is one batch of the run on a single process.
        rows = torch.cat([part.transpose(0, 1).flatten(1, 2) for part in columns], dim=1).flatten(0, 1)  # [(V M W B) D+1]
        capacity = len(self.rows)
        for part in rows.split(capacity):
            self._write(part[:, :-1], part[:, -1] > 0.5)

    def _write(self, rows: Tensor, chosen: Tensor) -> None:
        """At most K rows, Float[R D], of which Bool[R] enter; the host never learns how many, so it need not wait for the device."""
        capacity, count = len(self.rows), chosen.sum()
        order = torch.argsort((~chosen).to(torch.uint8), stable=True)  # chosen rows first
        number = torch.arange(len(rows), device=rows.device)
        places = (self.place + number) % capacity  # all different, since there are at most K
        self.rows[places] = torch.where((number < count).unsqueeze(1), rows[order], self.rows[places])
        moved = self.place + count
        if self.advance_twice:
            moved = torch.where(moved <= capacity, moved + count, moved)
        self.place.copy_(moved % capacity)

    @torch.no_grad()
    def neighbours(self, queries: Tensor, *, count: int) -> Tensor:
        """The rows that are nearest by cosine, nearest first, as they are stored.

        Args:
            queries: Float[B D].
            count: k.

        Returns:
            Float[B k D].
        """
        # In float32: with half the bits the eighth and the ninth neighbour are often equal.
        with torch.autocast(device_type=queries.device.type, enabled=False):
            # Lengths divide the products and not the rows: a normalised copy of a large memory would cost more than the search.
            lengths = torch.linalg.vector_norm(self.rows, dim=-1).clamp_min_(1e-12)  # [K]
            cosine = F.linear(F.normalize(queries.float(), dim=-1), self.rows).div_(lengths)  # [B K]
        return self.rows[cosine.topk(count, dim=-1).indices]


def broadcast_states(module: nn.Module) -> None:
    """Give every process the state of the first one: random numbers of a start may differ."""
    if world_size() > 1:
        for state in states_of(module):
            for buffer in state.buffers():
                torch.distributed.broadcast(buffer, src=0)


def states_of(module: nn.Module) -> list[State]:
    """All states below a module."""
    return [part for part in module.modules() if isinstance(part, State)]
