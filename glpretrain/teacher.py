"""The moving copy of the student."""

import copy

import torch
from torch import nn


class EMATeacher(nn.Module):
    """A copy of a branch without gradients, always in evaluation mode, that follows it.

    Args:
        branch: the student; copied, so what it has at this moment (mask token, heads) the teacher has too.
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = copy.deepcopy(branch).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in evaluation mode whatever the surrounding module does: the teacher drops no paths."""
        self.training = mode
        return self

    @torch.no_grad()
    def update(self, branch: nn.Module, *, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, parameters in float32; buffers are copied."""
        mine, theirs = dict(self.branch.named_parameters()), dict(branch.named_parameters())
        assert mine.keys() == theirs.keys(), f"teacher and student differ in {sorted(mine.keys() ^ theirs.keys())}"
        full = [name for name, value in mine.items() if value.dtype == torch.float32]
        if full:
            torch._foreach_lerp_([mine[n] for n in full], [theirs[n].detach() for n in full], 1.0 - momentum)
        for name in mine.keys() - set(full):  # half-precision weights: one step of 1 - momentum would round away
            mine[name].copy_(mine[name].float().lerp_(theirs[name].detach().float(), 1.0 - momentum))
        copies, buffers = dict(self.branch.named_buffers()), dict(branch.named_buffers())
        assert copies.keys() == buffers.keys(), f"teacher and student differ in {sorted(copies.keys() ^ buffers.keys())}"
        for name, value in copies.items():
            value.copy_(buffers[name])
