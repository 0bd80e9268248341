"""Sampling and neighbours of clouds: against the official code, against plain NumPy, and against ties."""

import numpy as np
import pytest
import torch
from golden import load, noise
from torch.utils._python_dispatch import TorchDispatchMode

from glpretrain.core.clouds import farthest_points, in_unit_sphere, interpolation, nearest_points, squared_distances, take

GOLDEN = load("point_groups")


def numpy_groups(clouds: np.ndarray, *, count: int, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """The same, cloud by cloud as data loaders of this field do it."""
    centres, groups = [], []
    for cloud in clouds:
        distance, farthest, taken = np.full(len(cloud), np.inf, dtype=np.float32), 0, []
        for _ in range(count):
            taken.append(farthest)
            distance = np.minimum(distance, ((cloud - cloud[farthest]) ** 2).sum(axis=1))
            farthest = int(distance.argmax())
        centres.append(taken)
        groups.append([((cloud - cloud[centre]) ** 2).sum(axis=1).argsort(kind="stable")[:neighbours] for centre in taken])
    return np.array(centres), np.array(groups)


def test_centres_and_neighbours_are_the_official_ones() -> None:
    cloud = noise(2, 60, 3, name="cloud")
    centres = farthest_points(cloud, count=9)
    assert centres.tolist() == GOLDEN["centres"]
    assert nearest_points(take(cloud, centres), cloud, count=6).sort(dim=-1).values.tolist() == GOLDEN["neighbours"]


def test_numpy_agrees_on_larger_clouds() -> None:
    clouds = noise(3, 200, 3, name="large")
    centres = farthest_points(clouds, count=17)
    found = nearest_points(take(clouds, centres), clouds, count=11)
    expected_centres, expected = numpy_groups(clouds.numpy(), count=17, neighbours=11)
    assert np.array_equal(centres.numpy(), expected_centres) and np.array_equal(found.numpy(), expected)


def test_equal_distances_are_decided_by_the_lower_index() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).unsqueeze(0)  # [1 8 3]
    twice = torch.cat([corners, corners], dim=1)
    assert farthest_points(twice, count=8)[0].tolist() == [0, 7, 1, 2, 3, 4, 5, 6]
    assert nearest_points(twice[:, :1], twice, count=8)[0, 0].tolist() == [0, 8, 1, 2, 4, 9, 10, 12]
    assert farthest_points(torch.zeros(1, 4, 3), count=3)[0].tolist() == [0, 0, 0]  # nothing is left to choose


def test_shorter_samples_are_the_start_of_longer_ones() -> None:
    cloud = noise(2, 60, 3, name="prefix")
    assert torch.equal(farthest_points(cloud, count=20)[:, :7], farthest_points(cloud, count=7))


def test_points_that_fall_onto_a_centre_leave_the_centres_where_they_are() -> None:
    cloud = noise(2, 60, 3, name="collapse")
    centres = take(cloud, farthest_points(cloud, count=9))
    nearest = nearest_points(cloud, centres, count=1)[..., 0]  # [B P]
    fallen = torch.where((nearest % 2 == 0).unsqueeze(-1), take(centres, nearest), cloud)
    assert torch.equal(take(fallen, farthest_points(fallen, count=9)), centres)


def test_distances_are_exact_where_points_coincide() -> None:
    cloud = noise(2, 30, 3, name="exact") + 100.0  # where |a|^2 + |b|^2 - 2ab would leave rounding
    assert (squared_distances(cloud, cloud).diagonal(dim1=1, dim2=2) == 0).all()


def test_unit_sphere() -> None:
    cloud = in_unit_sphere(3.0 * noise(2, 50, 3, name="sphere") + 5.0)
    torch.testing.assert_close(cloud.mean(dim=1), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(cloud.norm(dim=-1).amax(dim=1), torch.ones(2))
    assert torch.equal(in_unit_sphere(torch.ones(1, 4, 3)), torch.zeros(1, 4, 3))


def test_interpolation_returns_the_value_of_a_point_at_that_point_and_means_between() -> None:
    points = torch.tensor([[[0.0, 0, 0], [2, 0, 0], [50, 0, 0], [90, 0, 0]]])
    index, weight = interpolation(torch.tensor([[[2.0, 0, 0], [1, 0, 0]]]), points, neighbours=3)
    values = (take(torch.tensor([[[1.0], [3], [100], [7]]]), index) * weight.unsqueeze(-1)).sum(dim=2)[0, :, 0]
    torch.testing.assert_close(values, torch.tensor([3.0, 2.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(weight.sum(dim=-1), torch.ones(1, 2))


@pytest.mark.parametrize("function", [farthest_points, lambda cloud, count: nearest_points(cloud, cloud, count=count)])
def test_more_than_there_are_is_refused(function) -> None:
    with pytest.raises(ValueError, match="count=8; accepted: 1 to 7"):
        function(torch.zeros(2, 7, 3), count=8)


class CountOperations(TorchDispatchMode):
    """Counts the operations of torch within it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_one_loop_serves_a_whole_batch() -> None:
    """Cloud by cloud, as data loaders of this field do it, would need 8 times the operations."""

    def operations(num_clouds: int) -> int:
        clouds = torch.sin(1.7 * torch.arange(num_clouds * 64 * 3)).reshape(num_clouds, 64, 3)
        with CountOperations() as counted:
            nearest_points(take(clouds, farthest_points(clouds, count=16)), clouds, count=8)
        return counted.count

    assert operations(8) == operations(1)
