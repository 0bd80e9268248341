"""Clouds of points in plain PyTorch: farthest point sampling, nearest points, the unit sphere, and interpolation between points.

Distances are sums of squared differences in one fixed order, and of equally distant points the one with the lower index comes first, so
every function gives the same indices on a CPU and on a GPU. Left out: compiled kernels, and the matrix product that is faster but rounds.
"""

from functools import reduce

import torch
from torch import Tensor


def squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """Squared distance of every query, Float[*S Q 3], to every point, Float[*S P 3]: Float[*S Q P]."""
    axes = zip(queries.unbind(-1), points.unbind(-1), strict=True)
    differences = (query.unsqueeze(-1) - point.unsqueeze(-2) for query, point in axes)  # [*S Q P] each
    return reduce(Tensor.add_, (difference.mul_(difference) for difference in differences))


@torch.no_grad()
def farthest_points(points: Tensor, *, count: int) -> Tensor:
    """Farthest point sampling: take the first point, then repeatedly the point that is farthest from all points taken so far.

    The first n points of a longer sample are the sample of n. One loop over the samples serves the whole batch at once.

    Args:
        points: Float[B P 3].
        count: number of samples N, at most P; more are a ValueError.

    Returns:
        Int[B N], indices in the order in which the points are taken.
    """
    num_items, num_points, _ = points.shape
    if not 1 <= count <= num_points:
        raise ValueError(f"farthest points: count={count}; accepted: 1 to {num_points}, the points of a cloud")
    planes = points.detach().float().permute(2, 0, 1).contiguous().unbind()  # 3 times [B P]
    taken = torch.zeros(num_items, count, dtype=torch.int64, device=points.device)
    distance = torch.full((num_items, num_points), torch.inf, device=points.device)
    square, total = torch.empty_like(distance), torch.empty_like(distance)
    order = torch.arange(num_points, dtype=torch.float32, device=points.device)  # exact up to 2**24 points
    last = taken[:, :1]  # [B 1]
    for number in range(1, count):
        total.zero_()
        for plane in planes:
            torch.sub(plane, plane.gather(1, last), out=square)
            total.add_(square.mul_(square))
        torch.minimum(distance, total, out=distance)
        # The lowest index of the maximum, as argmax but several times faster on a CPU: 0 + index at the maximum, P + index elsewhere.
        torch.sub(distance.amax(dim=1, keepdim=True), distance, out=total).sign_().mul_(num_points).add_(order)
        last = total.amin(dim=1, keepdim=True).to(torch.int64)
        taken[:, number : number + 1] = last
    return taken


@torch.no_grad()
def nearest_points(queries: Tensor, points: Tensor, *, count: int) -> Tensor:
    """Int[B Q count]: the nearest points of every query, nearest first; of equally near points the one with the lower index comes first.

    Args:
        queries: Float[B Q 3].
        points: Float[B P 3].
        count: number of points for each query, at most P; more are a ValueError.
    """
    num_points = points.shape[1]
    if not 1 <= count <= num_points:
        raise ValueError(f"nearest points: count={count}; accepted: 1 to {num_points}, the points of a cloud")
    distance = squared_distances(queries.detach().float(), points.detach().float())  # [B Q P]
    # The bits of non-negative floats, read as integers, have the order of the floats. With the index as lower bits, no two are equal.
    order = distance.view(torch.int32).to(torch.int64).bitwise_left_shift_(32).bitwise_or_(torch.arange(num_points, device=points.device))
    return order.topk(count, dim=-1, largest=False, sorted=True).values & 0xFFFFFFFF


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of Float[B P C] by their index Int[B *S] along the axis P: Float[B *S C]."""
    flat = index.flatten(1).unsqueeze(-1)  # [B S 1]
    return values.gather(1, flat.expand(-1, -1, values.shape[-1])).unflatten(1, index.shape[1:])


def in_unit_sphere(points: Tensor) -> Tensor:
    """Float[*S P 3], moved so that the mean is the origin and scaled so that the farthest point has distance one; a cloud whose points are
    all equal becomes zeros."""
    centred = points - points.mean(dim=-2, keepdim=True)
    radius = centred.square().sum(dim=-1).amax(dim=-1).sqrt()  # [*S]
    return centred / radius.clamp_min(1e-12)[..., None, None]


def interpolation(queries: Tensor, points: Tensor, *, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Weights for values at any place from values at some points: PointNet++'s inverse squared distances to the nearest points.

    Args:
        queries: Float[B Q 3], places where values are wanted.
        points: Float[B P 3], places where values are known.
        neighbours: number of nearest points n that count; all of them where there are fewer.

    Returns:
        Int[B Q n], indices of the points that count, and Float[B Q n], their weights; rows sum to one.
    """
    index = nearest_points(queries, points, count=min(neighbours, points.shape[1]))  # [B Q n]
    distance = (take(points, index) - queries.unsqueeze(2)).square().sum(dim=-1)  # [B Q n]
    weight = 1.0 / (distance + 1e-8)
    return index, weight / weight.sum(dim=-1, keepdim=True)
