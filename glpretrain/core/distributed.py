"""The few collectives that objectives need. With one process each is the identity, so no caller asks how many there are."""

import torch
import torch.distributed as dist
from torch import Tensor


def has_process_group() -> bool:
    """Is there a process group? It may be one of a single process."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if has_process_group() else 1


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if has_process_group() else 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """Float[*S]: sum over processes, without gradient; `value` itself is left alone."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def all_reduce_max(value: Tensor) -> Tensor:
    """Float[*S]: largest over processes, without gradient; `value` itself is left alone."""
    if world_size() == 1:
        return value.detach()
    largest = value.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


class _AllReduceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:  # noqa: ANN001
        total = value.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # noqa: ANN001
        # Each process's loss depends on the mean; the gradients are summed, and 1 / world_size is the mean's own factor.
        total = gradient.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


def all_reduce_mean(value: Tensor) -> Tensor:
    """Float[*S]: mean over processes, with gradient."""
    return value if world_size() == 1 else _AllReduceMean.apply(value)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:  # noqa: ANN001
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # noqa: ANN001
        # Every process used these rows in its own loss: their gradients add up. DDP divides by world_size afterwards, which
        # makes the whole the gradient of the mean of the processes' losses.
        total = gradient.clone(memory_format=torch.contiguous_format)  # autograd may still need what it handed in
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_grad(value: Tensor) -> Tensor:
    """Rows of all processes in rank order, with gradient.

    Args:
        value: Float[B *S], the same B in every process.

    Returns:
        Float[world_size*B *S].
    """
    return value if world_size() == 1 else _Gather.apply(value)
