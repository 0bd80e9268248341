"""Reconstruction of the pixels of hidden patches (MAE), of replaced pixels (GMML), and of features of masked views (MaskEmbed)."""

from typing import Literal

import torch
from torch import Tensor

from glpretrain.core.distributed import all_reduce_mean, all_reduce_sum, world_size
from glpretrain.objectives.base import Objective


class PatchPixels(Objective):
    """Squared error on hidden patches (MAE models_mae.py, forward_loss).

    sum over hidden patches of mean over numbers of (prediction - target)^2, divided by the number of hidden patches (its mean
    over processes); with `normalise` each target patch is first given mean 0 and variance 1. Zero when every hidden patch is predicted.
    """

    def __init__(self, *, normalise: bool = True) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, *, predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Float[B], whose mean is the error of a hidden patch: an item with more hidden patches weighs more.

        Args:
            predictions: Float[B N P].
            targets: Float[B N P].
            mask: Bool[B N], True: hidden.
        """
        assert predictions.shape == targets.shape and predictions.shape[:2] == mask.shape, f"{predictions.shape}, {mask.shape}"
        if self.normalise:
            variance, mean = torch.var_mean(targets, dim=-1, keepdim=True)
            targets = (targets - mean) * torch.rsqrt(variance + 1e-6)
        error = (predictions - targets).square().mean(dim=-1)  # [B N]
        # The mean over processes, as in `CorruptedPixels`. Without a hidden patch in any of them the loss is 0, not 0 / 0.
        count = all_reduce_sum(mask.sum().float()) / world_size()
        return (error * mask).sum(dim=1) * (len(mask) / count.clamp(min=1.0 / world_size()))


class CorruptedPixels(Objective):
    """Absolute error on replaced pixels (SiT main.py): mean over replaced pixels and channels of |prediction - target|."""

    def forward(self, *, predictions: Tensor, targets: Tensor, corruption: Tensor) -> Tensor:
        """Float[B], whose mean is the error of a replaced pixel: an item with more replaced pixels weighs more.

        Args:
            predictions: Float[B C H W].
            targets: Float[B C H W], the clean views.
            corruption: Bool[B H W], True: replaced.
        """
        _, num_channels, *size = predictions.shape
        assert predictions.shape == targets.shape and list(corruption.shape[1:]) == size, f"{predictions.shape}, {corruption.shape}"
        error = (predictions - targets).abs() * corruption.unsqueeze(1)
        # The count is averaged over processes, so that the mean of their losses is the loss of the joined batch.
        count = all_reduce_mean(corruption.sum().float()) * num_channels
        # Without a replaced pixel in the batch the loss is 0 / 1, not 0 / 0.
        return error.flatten(1).sum(dim=1) * (len(error) / count.clamp(min=1.0))


CountedTokens = Literal["all", "hidden", "visible"]


class MaskedFeatures(Objective):
    """Squared error of features of masked views (locality alignment at 092ed8e, scripts/train.py, train_one_epoch).

    mean over masks, all tokens and channels of counted * (prediction - target)^2. With `all` every token counts (the official `mse`);
    with `hidden` patches that the mask hides (`masked_mse`), with `visible` those that it leaves (`unmasked_mse`). The tokens before the
    patches always count, and the mean is over all tokens, so fewer counted ones give a smaller loss. Zero when every counted token is
    predicted.

    Args:
        counted: tokens whose errors are added up.

    Raises:
        ValueError: `counted` is another word.
    """

    def __init__(self, *, counted: CountedTokens = "all") -> None:
        super().__init__()
        if counted not in ("all", "hidden", "visible"):
            raise ValueError(f"MaskedFeatures: counted={counted!r} given; accepted: all, hidden, visible")
        self.counted: CountedTokens = counted

    def forward(self, *, predictions: Tensor, targets: Tensor, visible: Tensor) -> Tensor:
        """Float[B].

        Args:
            predictions: Float[B M T D], for M masks; T counts the patches and the tokens before them.
            targets: Float[B M T D].
            visible: Bool[B M N], True: the patch was visible.
        """
        num_items, num_masks, num_tokens, _ = predictions.shape
        num_patches = visible.shape[-1]
        assert predictions.shape == targets.shape and visible.shape[:2] == (num_items, num_masks), f"{predictions.shape}, {visible.shape}"
        error = (predictions - targets).square().mean(dim=-1)  # [B M T]
        if self.counted != "all":
            patches = visible if self.counted == "visible" else ~visible
            prefix = patches.new_ones(num_items, num_masks, num_tokens - num_patches)
            error = error * torch.cat([prefix, patches], dim=-1)
        return error.mean(dim=(1, 2))
