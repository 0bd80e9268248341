"""The Gram distance against DINOv3's code with every option, by hand, and the resizing of its targets."""

import pytest
import torch
from golden import assert_matches, load, noise, wave

from glpretrain.core.patches import resize_tokens
from glpretrain.objectives.gram import NEGATIVES, GramDistance

GOLDEN = load("dinov3_gram")
MASK = torch.tensor(GOLDEN["mask"], dtype=torch.bool)
STUDENT, TARGET = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, -2.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]])


def negatives_of(case: dict) -> str:
    return "remove" if case["remove_neg"] else "remove_in_targets" if case["remove_only_teacher_neg"] else "keep"


@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_the_distance_is_dinov3s(number: int) -> None:
    case = GOLDEN["cases"][number]
    tokens, targets = noise(3, 5, 4, name="student"), noise(3, 5, 4, name="target")
    if case["zero_tokens"]:
        tokens[1, 2], targets[0, 3] = 0.0, 0.0
    tokens.requires_grad_()
    own, given = tokens, targets
    if case["level"] == "batch":
        chosen = {"all": torch.ones_like(MASK), "masked": MASK, "unmasked": ~MASK}[case["tokens"]]
        own, given = tokens[chosen].unsqueeze(0), targets[chosen].unsqueeze(0)
    loss = GramDistance(normalise=case["normalized"], negatives=negatives_of(case))(tokens=own, targets=given).mean()
    loss.backward()
    assert_matches(loss.detach(), case["loss"])
    # Both sides compute in float32; the gradient of a token of zeros is divided by 1e-12, so that only its digits count.
    for row, expected in zip(tokens.grad.flatten(0, 1), torch.tensor(case["gradient"]).flatten(0, 1), strict=True):
        assert_matches(row, expected.tolist(), atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_every_option_of_the_official_code_was_run() -> None:
    cases = GOLDEN["cases"]
    assert {(case["zero_tokens"], case["normalized"], negatives_of(case), case["level"], case["tokens"]) for case in cases} == {
        (zero, normalised, negatives, level, tokens)
        for zero in (False, True)
        for normalised in (False, True)
        for negatives in NEGATIVES[:3]
        for level, tokens in (("image", "all"), ("batch", "all"), ("batch", "masked"), ("batch", "unmasked"))
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.69586019),
        ({"negatives": "remove"}, 0.19111111),
        ({"negatives": "remove_in_targets"}, 0.58474908),
        # By hand: pairs 12, 13, 23 differ by 0.6, 0 and -1.5071; only pair 13 has a negative target, and the student's is 0.
        ({"negatives": "remove_common"}, 0.58474908),
        ({"normalise": False}, 86.333333),
    ],
)
def test_three_tokens_by_hand(options: dict, expected: float) -> None:
    assert GramDistance(**options)(tokens=STUDENT, targets=TARGET).tolist() == pytest.approx([expected], rel=1e-6)


def test_the_gradient_by_hand_turns_tokens_and_does_not_stretch_them() -> None:
    tokens = STUDENT.clone().requires_grad_()
    GramDistance()(tokens=tokens, targets=TARGET).sum().backward()
    expected = [[[0.0, -0.10093635], [-0.03016989, 0.02262742], [-0.04381273, 0.0]]]
    assert_matches(tokens.grad, expected)
    assert (tokens.grad * STUDENT).sum(dim=-1).abs().max() < 1e-6


@pytest.mark.parametrize(("negatives", "expected"), [("keep", 0.02), ("remove", 0.0), ("remove_in_targets", 0.125), ("remove_common", 0.0)])
def test_two_negative_pairs_tell_the_ways_to_remove_them_apart(negatives: str, expected: float) -> None:
    tokens, targets = (torch.tensor([[[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]]]) for cosine in (-0.5, -0.3))
    assert GramDistance(negatives=negatives)(tokens=tokens, targets=targets).tolist() == pytest.approx([expected], abs=1e-6)


def test_images_are_compared_one_by_one_or_as_one_set() -> None:
    first, second = torch.cat([STUDENT, TARGET]), torch.cat([TARGET, STUDENT])
    distance = GramDistance()
    assert distance(tokens=first, targets=second).tolist() == pytest.approx([0.69586019] * 2, rel=1e-6)
    whole = distance(tokens=first.flatten(0, 1).unsqueeze(0), targets=second.flatten(0, 1).unsqueeze(0))
    assert whole.tolist() == pytest.approx([0.58824595], rel=1e-6)


def test_a_rotation_of_all_tokens_and_their_lengths_cost_nothing() -> None:
    tokens = wave(2, 5, 3, scale=0.8)
    rotation = torch.linalg.qr(noise(3, 3, name="rotation")).Q
    assert GramDistance()(tokens=3.0 * tokens @ rotation, targets=tokens).max() < 1e-12
    assert GramDistance()(tokens=noise(2, 5, 3, name="other"), targets=tokens).min() > 0.01


def test_targets_of_another_width_are_compared_and_get_no_gradient() -> None:
    tokens, targets = wave(2, 5, 3).requires_grad_(), wave(2, 5, 7, phase=1.0).requires_grad_()
    GramDistance()(tokens=tokens, targets=targets).sum().backward()
    assert targets.grad is None and tokens.grad.abs().sum() > 0


def test_an_unknown_way_to_remove_negatives_is_refused() -> None:
    with pytest.raises(ValueError, match="negatives='both' given; accepted: keep, remove"):
        GramDistance(negatives="both")


INNER_HALF, EDGE_HALF = [-0.09375, 0.59375, 0.59375, -0.09375], [0.5, 0.59375, -0.09375]
THIRDS = [-0.03515625, 0.26171875, 0.87890625, -0.10546875]


@pytest.mark.parametrize(
    ("length", "new_length", "row", "first", "weights"),
    [(8, 4, 1, 1, INNER_HALF), (8, 4, 0, 0, EDGE_HALF), (12, 8, 3, 3, THIRDS), (12, 8, 4, 5, THIRDS[::-1])],
)
def test_resized_targets_are_these_averages(length: int, new_length: int, row: int, first: int, weights: list[float]) -> None:
    """Bicubic with a = -0.75: each token of the smaller grid takes up to four along each axis."""
    grid, new_grid = (length, 1), (new_length, 1)
    found = resize_tokens(torch.eye(length).unsqueeze(0), grid=grid, new_grid=new_grid)[0, row]
    expected = torch.zeros(length)
    expected[first : first + len(weights)] = torch.tensor(weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_sixteen_tokens_become_four() -> None:
    ramp = torch.arange(16.0).view(1, 16, 1)
    found = resize_tokens(ramp, grid=(4, 4), new_grid=(2, 2)).flatten()
    assert found.tolist() == pytest.approx([2.03125, 4.21875, 10.78125, 12.96875], abs=1e-5)


def test_antialiasing_averages_over_twice_as_many() -> None:
    found = resize_tokens(torch.eye(16).unsqueeze(0), grid=(16, 1), new_grid=(8, 1), antialias=True)[0, 4]
    half = [-0.0117, -0.0352, 0.1133, 0.4336]
    expected = torch.zeros(16)
    expected[5:13] = torch.tensor([*half, *half[::-1]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
