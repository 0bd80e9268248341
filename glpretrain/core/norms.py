"""Batch norm over the items of all processes, for encoders and for heads. torch's SyncBatchNorm refuses CPU tensors, so that losses
could not be tested with two processes on a machine without a GPU.
"""

import torch
from torch import Tensor, nn

from glpretrain.core.distributed import all_reduce_mean, world_size


class SyncedBatchNorm(nn.BatchNorm1d):
    """Batch norm over all axes but the last one, and over all processes.

    Parameters, buffers and constructor are those of torch's batch norm. With running statistics, evaluation mode uses them, the result
    has the input's dtype, and a single process runs torch's own kernel. Without (`track_running_stats=False`), both modes normalise with
    the statistics of the batch at hand, and the result is float32: what a head needs whose teacher normalises its own batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Float[*S C] to Float[*S C]."""
        rows = input.flatten(0, -2)  # [R C]
        if self.track_running_stats and (not self.training or world_size() == 1):
            return super().forward(rows).reshape(input.shape)
        rows = rows.float()
        mean = all_reduce_mean(rows.mean(dim=0))  # [C]
        centred = rows - mean
        variance = all_reduce_mean(centred.square().mean(dim=0))  # [C]
        normed = centred * torch.rsqrt(variance + self.eps)
        if self.affine:
            normed = normed * self.weight + self.bias
        if self.track_running_stats:
            self._track(mean, variance, count=len(rows) * world_size())
            normed = normed.to(input.dtype)
        return normed.reshape(input.shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, *, count: int) -> None:
        """Move the running statistics by the mean and the biased variance of `count` rows."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None, "the plain average of all batches is not implemented"
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        self.num_batches_tracked.add_(1)
