"""A student's features against those of an expert: directions of `cls`, and maps of tokens on another grid."""

import torch.nn.functional as F
from torch import Tensor

from glpretrain.objectives.base import Objective


def resize_tokens(tokens: Tensor, *, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Tokens of one grid on another: bicubic, corners not aligned, not antialiased (GPFM's kl_loss.py).

    Args:
        tokens: Float[B M D].
        grid: rows and columns, M in all.
        new_grid: rows and columns, N in all.

    Returns:
        Float[B N D].
    """
    if grid == new_grid:
        return tokens
    maps = tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # [B D h w]
    return F.interpolate(maps, size=new_grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


class CosineDistance(Objective):
    """1 - mean over items of cos(student, expert) (GPFM's kl_loss.py, Cosine). Zero when all point the same way."""

    def forward(self, *, predictions: Tensor, targets: Tensor) -> Tensor:
        """Distance of directions.

        Args:
            predictions: Float[B D], of the student behind its head for this expert.
            targets: Float[B D], of the expert.

        Returns:
            Float[].
        """
        assert predictions.shape == targets.shape, f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        return 1.0 - F.cosine_similarity(predictions.float(), targets.detach().float(), dim=-1).mean()


class FeatureDistance(Objective):
    """Cosine and smooth L1 between maps of tokens, the expert's resized to the student's grid (GPFM's kl_loss.py, FeatureLoss).

    cosine_share * (1 - mean over items and tokens of cos) + (1 - cosine_share) * mean over all numbers of smooth L1 with a corner
    at 1. Zero when both maps are equal.
    """

    def __init__(self, *, cosine_share: float = 0.9) -> None:
        super().__init__()
        if not 0.0 <= cosine_share <= 1.0:
            raise ValueError(f"cosine_share: accepted are values in [0, 1], not {cosine_share}")
        self.cosine_share = cosine_share

    def forward(self, *, predictions: Tensor, targets: Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
        """Distance of maps.

        Args:
            predictions: Float[B N D], of the student behind its head for this expert.
            targets: Float[B M D], of the expert.
            grid: rows and columns of the student, N in all.
            target_grid: rows and columns of the expert, M in all.

        Returns:
            Float[].
        """
        targets = resize_tokens(targets.detach().float(), grid=target_grid, new_grid=grid)
        assert predictions.shape == targets.shape, f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        predictions = predictions.float()
        cosine = 1.0 - F.cosine_similarity(predictions, targets, dim=-1).mean()
        return self.cosine_share * cosine + (1.0 - self.cosine_share) * F.smooth_l1_loss(predictions, targets)


class WhitenedFeatures(Objective):
    """Smooth L1 to an expert's whitened map (feature distillation, Wei et al. 2022): every target token gets mean 0 and variance 1.

    mean over all numbers of smooth L1 with a corner at `corner`. Zero when the student gives the whitened map.
    """

    def __init__(self, *, corner: float = 2.0) -> None:
        super().__init__()
        if corner <= 0.0:
            raise ValueError(f"corner: accepted are values above 0, not {corner}")
        self.corner = corner

    def forward(self, *, predictions: Tensor, targets: Tensor) -> Tensor:
        """Distance of maps on one grid.

        Args:
            predictions: Float[B N D], of the student behind its head.
            targets: Float[B N D], of the expert.

        Returns:
            Float[].
        """
        assert predictions.shape == targets.shape, f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        targets = F.layer_norm(targets.detach().float(), targets.shape[-1:])
        return F.smooth_l1_loss(predictions.float(), targets, beta=self.corner)
