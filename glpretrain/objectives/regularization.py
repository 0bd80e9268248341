"""Regularization of features: KoLeo keeps the features of different items apart, and tokens shall not share one direction."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core.distributed import all_reduce_mean, gather_with_grad, rank
from glpretrain.objectives.base import Objective

KoLeoAmong = Literal["joint", "process"] | int

_LEAST_DISTANCE = 1e-4


class KoLeo(Objective):
    """Spreads features over the sphere: the Kozachenko-Leonenko estimate of entropy (DINOv2's dinov2/loss/koleo_loss.py).

    mean over items i of -log |z_i - z_j(i)|, z of length one, j(i) the nearest other item. Smallest where all are equally far apart.

    Ours: items closer than 1e-4 (duplicates, which no weights can tell apart) count as that far and get no gradient: the derivative
    1 / distance would overflow half precision.

    Args:
        among: where the nearest item is searched: in the items of all processes (`joint`), so that the value is that of the joined batch;
            in those of one `process`, as the official code does; or in groups of so many successive items of the joined batch, as in
            DINOv3's stage of high resolution (`KoLeoLossDistributed`). Among fewer items the nearest is farther away, so the pull is
            weaker.

    Raises:
        ValueError: `among` is another word, or a number below 2.
    """

    def __init__(self, *, among: KoLeoAmong = "joint") -> None:
        super().__init__()
        is_size = isinstance(among, int) and not isinstance(among, bool) and among >= 2
        if among not in ("joint", "process") and not is_size:
            raise ValueError(f"koleo_among={among!r} given; accepted: joint, process, or the number of items of a group, at least 2")
        self.among: KoLeoAmong = among

    def require_items(self, count: int) -> None:
        """Refuse, with a ValueError, a number of items of all processes that cannot be cut into the groups."""
        if isinstance(self.among, int) and count % self.among:
            accepted = f"joint, process, or a divisor of the {count} items of a step"
            raise ValueError(f"koleo_among={self.among} given; accepted: {accepted}")

    def forward(self, *, features: Tensor) -> Tensor:
        """Float[]: spread of one view's items, Float[B D] of this process. The loss of an item also moves its nearest item, so items cannot
        be weighted one by one.

        Raises:
            ValueError: there is a single item to search in, or the items of all processes cannot be cut into such groups.
        """
        num_items, _ = features.shape
        rows = F.normalize(features, eps=1e-8, dim=-1)
        alone = self.among == "process"
        others = rows if alone else gather_with_grad(rows)  # [B D] or [world*B D]
        if len(others) < 2:
            raise ValueError("KoLeo: one item has no neighbour; give a batch_size of at least 2, or the weight 0")
        self.require_items(len(others))
        size = self.among if isinstance(self.among, int) else len(others)
        with torch.no_grad():
            places = torch.arange(len(others), device=rows.device)
            own = places[:num_items] + num_items * (0 if alone else rank())  # [B]
            is_left_out = (own.unsqueeze(1) // size != places // size) | (own.unsqueeze(1) == places)  # [B others]
            nearest = (rows @ others.T).masked_fill(is_left_out, -2.0).argmax(dim=1)
        distances = F.pairwise_distance(rows, others[nearest], eps=1e-8)  # [B]
        return -torch.log(distances.clamp(min=_LEAST_DISTANCE) + 1e-8).mean()


class MeanCosine(Objective):
    """Mean cosine of all pairs of tokens, which is the squared length of the mean of all tokens of length one.

    0 where no direction is common to all tokens. A common direction fills every cosine without telling tokens apart, so that no
    threshold on cosines fits all items. Ours.
    """

    def forward(self, *, tokens: Tensor) -> Tensor:
        """Float[], of the tokens Float[*S D] of all processes, each of which gives as many. It has no value per item."""
        mean = F.normalize(tokens, dim=-1).flatten(0, -2).mean(dim=0)  # [D]
        return all_reduce_mean(mean).square().sum()
