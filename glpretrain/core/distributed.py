"""The few collectives that objectives need, and batch norm over all processes. With one process each collective is the identity, so no
caller asks how many processes there are.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

T = TypeVar("T")


def has_process_group() -> bool:
    """Whether there is a process group; it may consist of a single process."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if has_process_group() else 1


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if has_process_group() else 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over processes, Float[*S], without gradient; `value` itself does not change."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def all_reduce_max(value: Tensor) -> Tensor:
    """Maximum over processes, Float[*S], without gradient; `value` itself does not change."""
    if world_size() == 1:
        return value.detach()
    largest = value.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


class _AllReduceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        # The loss of every process depends on the mean: their gradients are summed, and 1 / world_size is the factor of the mean itself.
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


def all_reduce_mean(value: Tensor) -> Tensor:
    """Mean over processes, Float[*S], with gradient."""
    return value if world_size() == 1 else _AllReduceMean.apply(value)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        # Every process uses these rows in its own loss, so their gradients add up. DDP divides by world_size afterwards, which gives the
        # gradient of the mean of the processes' losses.
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # autograd may still need the tensor itself
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_grad(value: Tensor) -> Tensor:
    """Float[world_size*B *S]: rows Float[B *S] of all processes in the order of their ranks, with gradient; B is the same in each."""
    return value if world_size() == 1 else _Gather.apply(value)


def gathered(parts: list[T]) -> list[T]:
    """What all processes give, in the order of their ranks; each may give any number. It travels by pickle, between our own processes."""
    if world_size() == 1:
        return parts
    of_all: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(of_all, parts)
    return [part for own in of_all for part in own]


class SyncedBatchNorm(nn.BatchNorm1d):
    """Batch norm over all axes but the last one, and over all processes. torch's own SyncBatchNorm refuses CPU tensors, so that losses
    could not be tested with two processes on a machine without a GPU.

    Parameters, buffers and constructor are those of torch's batch norm. With running statistics, evaluation mode uses them, the result
    has the input's dtype, and a single process runs torch's own kernel. Without (`track_running_stats=False`), both modes normalise with
    the statistics of the current batch, and the result is float32, as a head needs whose teacher normalises its own batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Float[*S C] to Float[*S C]."""
        rows = input.flatten(0, -2)  # [R C]
        if self.track_running_stats and (not self.training or world_size() == 1):
            return super().forward(rows).reshape(input.shape)
        return over_processes(rows, norm=self).reshape(input.shape)


def over_processes(rows: Tensor, *, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
    """What a batch norm makes of rows Float[R C], with the statistics of the rows of all processes; R is the same in each.

    With running statistics, they are moved, and the result has the dtype of the rows; without, it is float32.

    Args:
        rows: Float[R C].
        norm: batch norm with C channels, in training mode or without running statistics.
    """
    values = rows.float()
    mean = all_reduce_mean(values.mean(dim=0))  # [C]
    centred = values - mean
    variance = all_reduce_mean(centred.square().mean(dim=0))  # [C]
    normed = centred * torch.rsqrt(variance + norm.eps)
    if norm.affine:
        normed = normed * norm.weight + norm.bias
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return normed
    assert norm.momentum is not None, "the plain average of all batches is not implemented"
    with torch.no_grad():
        count = len(rows) * world_size()
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)
    return normed.to(rows.dtype)
