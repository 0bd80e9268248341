"""Chamfer distance between sets of points: from each point to the nearest point of the other set, in both directions.

Gradients flow through the nearest points and not through the choice of them, as in Point-MAE's compiled extension
(Pang-Yatian/Point-MAE at 7445a68, extensions/chamfer_dist). Left out: the earth mover's distance.
"""

import torch
from torch import Tensor

from glpretrain.core.clouds import squared_distances, take
from glpretrain.objectives.base import Objective


def nearest_distances(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Float[B M] and Float[B N]: squared distances from Float[B M 3] and Float[B N 3] to the nearest point of the other."""
    with torch.no_grad():
        between = squared_distances(first, second)  # [B M N]
        to_second, to_first = between.argmin(dim=2), between.argmin(dim=1)
    return (first - take(second, to_second)).square().sum(dim=-1), (second - take(first, to_first)).square().sum(dim=-1)


class ChamferL2(Objective):
    """Mean squared distance to the nearest point, prediction to target plus target to prediction; zero for equal sets."""

    def forward(self, *, predictions: Tensor, targets: Tensor) -> Tensor:
        """Float[B]: distance of the sets Float[B M 3] and Float[B N 3]."""
        there, back = nearest_distances(predictions, targets)
        return there.mean(dim=1) + back.mean(dim=1)


class ChamferL1(Objective):
    """Mean distance to the nearest point, averaged over both directions; zero for equal sets, where the gradient is not finite."""

    def forward(self, *, predictions: Tensor, targets: Tensor) -> Tensor:
        """Float[B]: distance of the sets Float[B M 3] and Float[B N 3]."""
        there, back = nearest_distances(predictions, targets)
        return (there.sqrt().mean(dim=1) + back.sqrt().mean(dim=1)) / 2
