"""The few collectives that objectives need. With one process each is the identity, so no caller asks how many processes there are."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


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
    """Rows of all processes in the order of their ranks, with gradient.

    Args:
        value: Float[B *S]; B is the same in every process.

    Returns:
        Float[world_size*B *S].
    """
    return value if world_size() == 1 else _Gather.apply(value)
