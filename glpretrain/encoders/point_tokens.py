"""From groups of points to one token each: the mini-PointNet of Point-BERT and Point-MAE, and the tokens of POS-BERT.

Both see every point of a group relative to the group's centre and keep the maximum over the group, so the order of the points within
a group changes nothing. The batch norms see the groups of all processes together, as the published runs had it (SyncBN).
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from glpretrain.core.clouds import farthest_points, nearest_points, take
from glpretrain.core.distributed import SyncedBatchNorm


class Groups(NamedTuple):
    """Neighbourhoods that cover a cloud."""

    centres: Tensor  # Float[B N 3]
    neighbours: Tensor  # Float[B N M 3]  relative to their centre, nearest first: the centre itself comes first
    centre_index: Tensor  # Int[B N]    position of each centre among the points
    neighbour_index: Tensor  # Int[B N M]  position of each neighbour among the points


def group_points(points: Tensor, *, num_groups: int, group_size: int) -> Groups:
    """Choose centres by farthest point sampling from the first point on, and the nearest points of each.

    Args:
        points: Float[B P 3].
        num_groups: number of groups N.
        group_size: number of points M in a group.
    """
    centre_index = farthest_points(points, count=num_groups)
    centres = take(points, centre_index)  # [B N 3]
    neighbour_index = nearest_points(centres, points, count=group_size)
    neighbours = take(points, neighbour_index) - centres.unsqueeze(2)  # [B N M 3]
    return Groups(centres, neighbours, centre_index, neighbour_index)


class MiniPointNet(nn.Module):
    """Point-MAE's token (models/Point_MAE.py, class Encoder): two layers per point, the maximum beside each point, two more layers.

    Args:
        dim: width of a token.
        hidden_dim: width h of the first layer; the others have 2h and 4h.
    """

    def __init__(self, dim: int, *, hidden_dim: int = 128) -> None:
        super().__init__()
        wide, wider = 2 * hidden_dim, 4 * hidden_dim
        self.first = nn.Sequential(nn.Linear(3, hidden_dim), SyncedBatchNorm(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, wide))
        self.second = nn.Sequential(nn.Linear(wider, wider), SyncedBatchNorm(wider), nn.ReLU(), nn.Linear(wider, dim))

    def forward(self, points: Tensor, groups: Groups) -> Tensor:
        """Points Float[B P 3] and their groups to Float[B N dim]."""
        local = self.first(groups.neighbours)  # [B N M 2h]
        # As in the official code. The backward pass of `amax` shares a gradient among equal values, which takes more memory and time.
        overall = local.max(dim=2, keepdim=True).values  # [B N 1 2h]
        # The layer on both side by side, without a copy of the maximum for every point.
        mix, norm, activation, last = self.second
        assert isinstance(mix, nn.Linear)
        of_overall, of_local = mix.weight.split(local.shape[-1], dim=1)
        mixed = functional.linear(local, of_local, mix.bias) + functional.linear(overall, of_overall)
        return last(activation(norm(mixed))).max(dim=2).values


class RelativeFeatures(nn.Module):
    """POS-BERT's token (point_transformer.py, class PCT): features per point, relative to the centre's and beside it, two layers.

    Args:
        dim: width of a token.
        hidden_dim: width h of the features of a point.
    """

    def __init__(self, dim: int, *, hidden_dim: int = 64) -> None:
        super().__init__()
        self.first = _layers(3, hidden_dim, hidden_dim)
        self.second = _layers(2 * hidden_dim, dim, dim)

    def forward(self, points: Tensor, groups: Groups) -> Tensor:
        """Points Float[B P 3] and their groups to Float[B N dim]."""
        features = self.first(points)  # [B P h]
        centre = take(features, groups.centre_index).unsqueeze(2)  # [B N 1 h]
        neighbours = take(features, groups.neighbour_index)  # [B N M h]
        both = torch.cat([neighbours - centre, centre.expand_as(neighbours)], dim=-1)  # [B N M 2h]
        return self.second(both).max(dim=2).values


def _layers(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        layers += [nn.Linear(inner, outer, bias=False), SyncedBatchNorm(outer), nn.ReLU()]
    return nn.Sequential(*layers)
