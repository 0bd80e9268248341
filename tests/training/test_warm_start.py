"""When the trunk of a run from trained weights is released, and how its rate rises; `tests/methods/test_init_from.py` has whole runs."""

import copy
import math

import pytest
import torch

from glpretrain.training.optim import TrunkRelease
from glpretrain.training.warm_start import Trunk

STEPS = 20


def rates(trunk: Trunk, losses: list[float], *, start: int = 0) -> list[float]:
    """Rate in every step, the loss of each step taken in after it."""
    found = []
    for step, loss in enumerate(losses, start=start):
        found.append(trunk.rate(step / STEPS, step=1 / STEPS))
        trunk.update(torch.tensor(loss))
        trunk.advance(step / STEPS)
    return found


def test_the_rate_is_zero_for_the_share_that_is_frozen_and_then_rises_over_the_ramp() -> None:
    trunk = Trunk(TrunkRelease(frozen=0.25, ramp=0.2))
    assert rates(trunk, [1.0] * 12) == pytest.approx([0.0] * 5 + [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0])
    assert trunk.released == 0.25


def test_nothing_is_frozen_without_a_share() -> None:
    assert rates(Trunk(TrunkRelease(frozen=0.0, ramp=0.0)), [1.0] * 3) == [1.0] * 3


def test_a_settled_loss_releases_the_trunk_before_its_share_is_over() -> None:
    settings = TrunkRelease(frozen=0.9, ramp=0.0, tolerance=0.1, window=0.1)  # windows of two steps
    falling = [8.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.95, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]  # means 7.5, 4.5, 2.5, 1.975, 2.0
    trunk = Trunk(settings)
    assert [rate > 0.0 for rate in rates(trunk, falling)] == [False] * 11 + [True] * 2
    assert trunk.released == 0.55
    assert not any(rates(Trunk(settings), [2.0**-step for step in range(18)]))  # never settles
    assert rates(Trunk(TrunkRelease(frozen=0.9)), [2.0] * 17) == [0.0] * 17  # without a tolerance nobody looks


def test_a_resumed_run_goes_on_where_it_was() -> None:
    settings = TrunkRelease(frozen=0.9, ramp=0.1, tolerance=0.1, window=0.1)
    losses = [8.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.95, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    whole = rates(Trunk(settings), losses)
    for cut in (3, 6, 10, 11):
        first, second = Trunk(settings), Trunk(settings)
        done = rates(first, losses[:cut])
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert done + rates(second, losses[cut:], start=cut) == whole, cut


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen": 1.0}, "trunk: frozen is a share of the run in [0, 1), not 1.0"),
        ({"ramp": -0.1}, "trunk: ramp is a share"),
        ({"tolerance": 0.0}, "trunk: tolerance 0.0 and window 0.05; both are shares above 0"),
    ],
)
def test_values_out_of_range_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        TrunkRelease(**settings)
    assert message in str(refusal.value)


def test_a_trunk_that_was_never_released_says_so() -> None:
    assert math.isinf(Trunk(TrunkRelease()).released)
