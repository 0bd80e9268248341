"""Chamfer distance between sets of points: from each point to the nearest point of the other set, in both directions.

Gradients flow through the nearest points and not through the choice of them, as in Point-MAE's compiled extension
(Pang-Yatian/Point-MAE at 7445a68, extensions/chamfer_dist). Left out: the earth mover's distance.
"""

import torch
from torch import Tensor

from glpretrain.core.clouds import squared_distances, take
from glpretrain.core.distributed import all_reduce_mean
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


class CorruptedPoints(Objective):
    """`ChamferL2` of the groups in which a point was replaced: `CorruptedPixels` for inputs that have no order."""

    def forward(self, *, predictions: Tensor, targets: Tensor, corruption: Tensor) -> Tensor:
        """Float[B], whose mean is the distance of a replaced group: an item with more of them weighs more.

        Args:
            predictions: Float[B 3 N M], the points of every group.
            targets: Float[B 3 N M], those of the clean cloud.
            corruption: Bool[B N M], True: replaced.
        """
        _, _, *inputs = predictions.shape
        assert predictions.shape == targets.shape and list(corruption.shape[1:]) == inputs, f"{predictions.shape}, {corruption.shape}"
        sets = (values.permute(0, 2, 3, 1).flatten(0, 1) for values in (predictions, targets))  # [(B N) M 3]
        there, back = nearest_distances(*sets)
        replaced = corruption.any(dim=-1).flatten()  # [(B N)]
        distance = ((there.mean(dim=1) + back.mean(dim=1)) * replaced).unflatten(0, (len(predictions), -1)).sum(dim=1)  # [B]
        # As `CorruptedPixels`: the mean of the processes' losses is the loss of the joined batch, and 0 / 1 where nothing was replaced.
        return distance * (len(predictions) / all_reduce_mean(replaced.sum().float()).clamp(min=1.0))
