"""When heads have learned enough for the trunk to join in: the monitor alone, on curves from formulas."""

import math

import pytest
import torch

from glpretrain.objectives.distillation import ViewDistillation
from glpretrain.training.warm_start import Continuation, Settling


def settles_at(curve, *, tolerance=0.05, block=1, limit=400) -> int | None:
    """How many steps of `curve(step)` pass before it has settled."""
    monitor = Settling(1, tolerance=tolerance)
    for step in range(limit):
        monitor.update(0, samples=torch.tensor([curve(step)]))
        monitor.advance(ends_block=(step + 1) % block == 0)
        if monitor.settled():
            return step + 1
    return None


def noise(step: int) -> float:
    return 0.2 * math.sin(5.0 * step)


def test_a_flat_curve_settles_as_soon_as_two_windows_were_seen() -> None:
    assert settles_at(lambda step: 3.0) == 2 * Settling.BLOCKS
    assert settles_at(lambda step: 3.0, block=5) == 5 * 2 * Settling.BLOCKS


def test_a_noisy_curve_settles_after_its_fall_and_not_on_it() -> None:
    def fall(step: int) -> float:
        return 1.0 + 4.0 * math.exp(-step / 40.0) + noise(step)

    at = settles_at(fall, block=4)
    assert at is not None
    assert 4.0 * math.exp(-at / 40.0) < 0.2  # what is still to fall is no more than the noise


def test_a_falling_curve_never_settles() -> None:
    assert settles_at(lambda step: 5.0 * math.exp(-step / 60.0)) is None  # a window is 8 steps: 12 percent


def test_a_curve_that_turns_around_has_not_settled() -> None:
    """First and last smooth value are equal around the turn, at step 60."""
    assert settles_at(lambda step: 1.0 + abs(step - 60) / 30.0, limit=120) is None


def test_every_curve_has_to_settle() -> None:
    monitor = Settling(2, tolerance=0.05)
    for step in range(40):
        monitor.update(0, samples=torch.tensor([2.0]))
        monitor.update(1, samples=torch.tensor([2.0 + step]))
        monitor.advance(ends_block=True)
    assert monitor.change()[0] == 0.0
    assert not monitor.settled()


def test_micro_batches_count_by_their_samples() -> None:
    monitor = Settling(1, tolerance=0.05)
    monitor.update(0, samples=torch.tensor([1.0, 2.0, 3.0]))
    monitor.update(0, samples=torch.tensor([10.0]))
    assert monitor.advance(ends_block=True).item() == 4.0
    assert monitor.means[0, -1] == 4.0


def test_a_step_without_samples_leaves_the_curve_where_it_is() -> None:
    monitor = Settling(1, tolerance=0.05)
    for samples in ([6.0], []):
        monitor.update(0, samples=torch.tensor(samples))
        monitor.advance(ends_block=True)
    assert monitor.means[0, -2:].tolist() == [6.0, 6.0]
    monitor.update(0, samples=torch.tensor([8.0]))
    monitor.advance(ends_block=False)
    monitor.advance(ends_block=True)  # of a block of two steps one had none
    assert monitor.means[0, -1] == 8.0


def test_what_a_checkpoint_holds_goes_on_to_the_last_bit() -> None:
    whole, rest = Settling(1, tolerance=0.05), Settling(1, tolerance=0.05)
    for step in range(40):
        if step == 17:
            rest.load_state_dict(whole.state_dict())
        for monitor in (whole, rest):
            monitor.update(0, samples=torch.tensor([noise(step)]))
            monitor.advance(ends_block=step % 3 == 2)
    assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())


def test_entropy_lies_between_one_prototype_and_all_alike() -> None:
    objective = ViewDistillation(num_prototypes=7)
    logits = torch.stack([torch.zeros(7), 100.0 * torch.eye(7)[2]])
    torch.testing.assert_close(objective.entropy(logits, teacher_temp=0.5), torch.tensor([math.log(7.0), 0.0]))


def test_entropy_is_that_of_the_targets() -> None:
    objective = ViewDistillation(num_prototypes=7)
    logits = torch.sin(0.37 * torch.arange(21.0)).reshape(3, 7)
    targets = objective.targets(logits, teacher_temp=0.1)
    expected = torch.distributions.Categorical(probs=targets).entropy()
    torch.testing.assert_close(objective.entropy(logits, teacher_temp=0.1), expected)


@pytest.mark.parametrize("wrong", [{"tolerance": 0.0}, {"window": 1.0}, {"shortest": -0.1}, {"longest": 1.5}, {"ramp": 1.0}])
def test_settings_out_of_range_are_named(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"continuation: {name} is a share"):
        Continuation(**wrong)
