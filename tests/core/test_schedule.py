"""Schedules against DINO's tables and MAE's rule."""

import pytest
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st

from glpretrain.core.schedule import Schedule

DINO, MAE, DINOV3 = load("dino_schedules"), load("mae_schedule"), load("dinov3_views")["schedules"]
STEPS = 70
WARMUP_STEPS = 14


def test_learning_rate_after_the_warmup_is_dinos() -> None:
    schedule = Schedule(5e-4, 1e-6, warmup=WARMUP_STEPS / STEPS)
    values = [schedule(step / STEPS) for step in range(WARMUP_STEPS, STEPS)]
    assert values == pytest.approx(DINO["lr"]["values"][WARMUP_STEPS:], rel=1e-9)  # 12 digits are stored


def test_warmup_stays_within_one_of_dinos_increments() -> None:
    """DINO reaches the base one step earlier (its linspace includes both ends), the only difference."""
    schedule = Schedule(5e-4, 1e-6, warmup=WARMUP_STEPS / STEPS)
    increment = 5e-4 / (WARMUP_STEPS - 1)
    for step, reference in enumerate(DINO["lr"]["values"][:WARMUP_STEPS]):
        assert reference - increment < schedule(step / STEPS) <= reference


@pytest.mark.parametrize(("name", "schedule"), [("weight_decay", Schedule(0.04, 0.4)), ("momentum", Schedule(0.996, 1.0))])
def test_schedules_without_warmup_are_dinos(name: str, schedule: Schedule) -> None:
    assert [schedule(step / STEPS) for step in range(STEPS)] == pytest.approx(DINO[name]["values"], rel=1e-9)


def test_learning_rate_with_its_warmup_is_maes() -> None:
    schedule = Schedule(1e-3, 1e-6, warmup=3 / 11)
    assert [schedule(i / 23) for i in range(23)] == pytest.approx(MAE["values"], rel=1e-9, abs=1e-15)


def test_teacher_temperature_stays_within_one_step_of_dinos_table() -> None:
    """DINO's table has one value per epoch and reaches the last in its sixth; ours moves with every step and reaches it after six."""
    schedule = Schedule(0.07, warmup=0.6, warmup_start=0.04, shape="constant")
    increment = 0.03 / 5
    for epoch, reference in enumerate(DINO["teacher_temp"]):
        for progress in (epoch / 10, (epoch + 0.999) / 10):
            assert abs(schedule(progress) - reference) <= increment


@pytest.mark.parametrize("table", DINOV3)
def test_a_curve_that_ends_before_the_run_is_dinov3s_whose_cosine_is_a_step_shorter(table: dict) -> None:
    """Their cosine of n iterations has both ends among its values; ours reaches the end after n steps."""
    steps, warmup, length = (table[f"{name}_iterations"] for name in ("total", "warmup", "cosine"))
    length = length or steps - warmup
    shares = {"warmup": warmup / steps, "warmup_start": table["start"], "length": (length - 1) / steps}
    schedule = Schedule(float(table["peak"]), table["end"], **shares)
    assert [schedule(step / steps) for step in range(steps)] == pytest.approx(table["values"], rel=1e-9)


def test_ends_are_the_ends() -> None:
    schedule = Schedule(1.0, 0.25, warmup=0.2, warmup_start=0.5, shape="linear")
    assert (schedule(0.0), schedule(0.2), schedule(1.0)) == pytest.approx((0.5, 1.0, 0.25))
    assert schedule(0.6) == pytest.approx(0.625)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"warmup": 1.0}, {"warmup": -0.1}, {"end": 0.5, "shape": "constant"}, {"per": 0}, {"scaling": "sqrt"}),
        *({"length": 0.5}, {"end": 0.5, "length": 0.0}, {"end": 0.5, "warmup": 0.6, "length": 0.5}),
    ],
)
def test_what_would_be_ignored_or_never_end_is_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="Schedule"):
        Schedule(1.0, **arguments)


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 2e-3), ("sqrt", 1e-3)])
def test_a_rule_scales_the_base_and_nothing_else(scaling: str, expected: float) -> None:
    schedule = Schedule(5e-4, 1e-6, warmup=0.2, warmup_start=1e-7, per=256, scaling=scaling)
    assert schedule.for_batch(1024) == Schedule(expected, 1e-6, warmup=0.2, warmup_start=1e-7)


def test_a_schedule_without_a_rule_does_not_depend_on_the_batch() -> None:
    schedule = Schedule(5e-4, 1e-6)
    assert schedule.for_batch(1024) is schedule


def test_only_the_learning_rate_may_have_a_rule() -> None:
    with pytest.raises(ValueError, match=r"momentum: per=256 given; only optimization\.lr"):
        Schedule(0.996, 1.0, per=256).require("momentum")


few = settings(deadline=None, max_examples=50, derandomize=True)
values = st.floats(-10.0, 10.0)
schedules = st.builds(
    Schedule, values, values, warmup=st.floats(0.05, 0.9), warmup_start=values, shape=st.sampled_from(["cosine", "linear"])
) | st.builds(Schedule, values, warmup=st.floats(0.05, 0.9), warmup_start=values, shape=st.sampled_from(["constant", "step"]))


@few
@given(schedule=schedules, progress=st.floats(0.0, 1.0))
def test_a_schedule_stays_between_its_values(schedule: Schedule, progress: float) -> None:
    ends = (schedule.warmup_start, schedule.base, schedule.base if schedule.end is None else schedule.end)
    assert min(ends) - 1e-12 <= schedule(progress) <= max(ends) + 1e-12  # a few roundings of numbers up to 10


@few
@given(schedule=schedules)
def test_a_schedule_has_its_base_where_the_warmup_ends_and_does_not_jump_there(schedule: Schedule) -> None:
    assert schedule(schedule.warmup) == pytest.approx(schedule.base, abs=1e-12)
    if schedule.shape != "step":
        # A step of 1e-6 moves a line between values up to 20 apart, over at least 0.05 of the run, by at most 4e-4.
        assert schedule(schedule.warmup - 1e-6) == pytest.approx(schedule.base, abs=5e-4)
        assert schedule(schedule.warmup + 1e-6) == pytest.approx(schedule.base, abs=5e-4)
    else:
        assert schedule(schedule.warmup - 1e-6) == schedule.warmup_start


@few
@given(schedule=schedules)
def test_a_schedule_ends_at_its_end(schedule: Schedule) -> None:
    assert schedule(1.0) == pytest.approx(schedule.base if schedule.end is None else schedule.end, abs=1e-12)
