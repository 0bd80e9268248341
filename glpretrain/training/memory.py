"""State that moves once per optimizer step, and queues of features: negatives of a contrast, memories of neighbours.

Left out: what is computed from the features (objectives, methods).
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glpretrain.core.distributed import gather_with_grad, world_size


class State(nn.Module, ABC):
    """Buffers that move once per optimizer step, and by the same amount in every process.

    The `update` of a subclass only gathers values of a micro-batch. `advance`, which the method calls once per optimizer step, moves the
    buffers by all of these values. So a loss does not change while gradients accumulate.
    """

    moves_every_step: ClassVar[bool] = True  # one that stands still between certain shares of the run is not stuck

    @abstractmethod
    def advance(self, progress: float = 0.0) -> None:
        """Move by one optimizer step; `progress`, the share of the run done before it, is for states that move at certain shares."""

    @abstractmethod
    def discard(self) -> None:
        """Forget what was gathered since the last step, because the step is refused."""


class FeatureQueue(State):
    """The last K features, in a ring buffer: the oldest row is the next one to be overwritten.

    Rows enter in the order of views, micro-batches, processes and items, which is the order of one process with the joined batch.
    The queue starts with normal random numbers, so that a search or a softmax works before it is full for the first time.

    Args:
        num_rows: number of rows K.
        dim: width D of the features.
        unit: whether the random rows are scaled to length one (negatives of a contrast, MoCo) or left as they are (Mugs' memories).
        advance_twice: whether the place of the next row moves by twice the number of written rows unless the writing wrapped around, as
            in Mugs' code (src/model.py, Block_mem). Half of the rows may then keep their random numbers for ever; for comparisons only.

    Raises:
        ValueError: there is not a single row.
    """

    rows: Tensor  # Float[K D]
    place: Tensor  # Int[], position of the next row

    def __init__(self, num_rows: int, dim: int, *, unit: bool = False, advance_twice: bool = False) -> None:
        super().__init__()
        if num_rows < 1:
            raise ValueError(f"num_rows: a queue has at least 1 row, not {num_rows}")
        rows = torch.randn(num_rows, dim)
        self.register_buffer("rows", F.normalize(rows, dim=-1) if unit else rows)
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.advance_twice = advance_twice
        self._pending: list[Tensor] = []  # features of this step's micro-batches

    @torch.no_grad()
    def update(self, features: Tensor, *, chosen: Tensor | None = None) -> None:
        """Gather one micro-batch, Float[V B D], or the items of it that Bool[B] chooses; the queue itself moves in `advance`."""
        num_views, num_items, _ = features.shape
        flags = features.new_ones(num_items) if chosen is None else chosen
        assert flags.shape == (num_items,), f"{tuple(features.shape)} and {tuple(flags.shape)}"
        # The flag is the last column of one tensor, so that one collective is enough.
        flags = flags.float().view(1, num_items, 1).expand(num_views, -1, -1)
        self._pending.append(torch.cat([features.detach().float(), flags], dim=-1))

    @torch.no_grad()
    def advance(self, progress: float = 0.0) -> None:
        """Write what came in since the last call."""
        if not self._pending:
            return
        columns = [gather_with_grad(part.unsqueeze(0)) for part in self._pending]  # [W V B D+1] each
        self._pending = []
        # Micro-batches before processes: one micro-batch of all processes is one micro-batch of a run on a single process.
        rows = torch.cat([part.transpose(0, 1).flatten(1, 2) for part in columns], dim=1).flatten(0, 1)  # [(V M W B) D+1]
        capacity = len(self.rows)
        for part in rows.split(capacity):
            self._write(part[:, :-1], part[:, -1] > 0.5)

    def discard(self) -> None:
        """Forget what came in since the last call of `advance`."""
        self._pending = []

    def _write(self, rows: Tensor, chosen: Tensor) -> None:
        """Write the chosen ones, Bool[R], of at most K rows, Float[R D]. The host never learns how many, so it does not wait for them."""
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
        """Float[B k D]: the k = `count` rows of the highest cosine similarity with Float[B D], most similar first, as they are stored."""
        # In float32: with half of the bits, the eighth and the ninth neighbour are often equally similar.
        with torch.autocast(device_type=queries.device.type, enabled=False):
            # The products are divided by the lengths, not the rows: a normalised copy of a large memory would cost more than the search.
            lengths = torch.linalg.vector_norm(self.rows, dim=-1).clamp_min_(1e-12)  # [K]
            cosine = F.linear(F.normalize(queries.float(), dim=-1), self.rows).div_(lengths)  # [B K]
        return self.rows[cosine.topk(count, dim=-1).indices]


def broadcast_states(module: nn.Module) -> None:
    """Copy the state of the first process to all others: their random numbers may differ at the start."""
    if world_size() > 1:
        for state in states_of(module):
            for buffer in state.buffers():
                torch.distributed.broadcast(buffer, src=0)


def keep_from_ddp(module: nn.Module) -> None:
    """Let DistributedDataParallel pass over all states; it would send them around before every step."""
    states = {id(buffer) for state in states_of(module) for buffer in state.buffers()}
    ignored = [name for name, buffer in module.named_buffers() if id(buffer) in states]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)


def states_of(module: nn.Module) -> list[State]:
    """All states inside a module."""
    return [part for part in module.modules() if isinstance(part, State)]


def moving_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a checkpoint that a forward pass may move, such as the statistics of batch norm; those of states it leaves alone."""
    found: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():
        if part.training and part._buffers and not isinstance(part, State):
            held = {name: buffer for name, buffer in part._buffers.items() if name not in part._non_persistent_buffers_set}
            found |= {f"{prefix}.{name}".lstrip("."): buffer for name, buffer in held.items() if buffer is not None}
    return found
