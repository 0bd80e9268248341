"""The ring of features: nothing lost, nothing twice, the same whatever the batch."""

import pytest
import torch
import torch.nn.functional as F

from glpretrain.training.memory import FeatureQueue


def rows(first: int, count: int, *, views: int = 1, dim: int = 3) -> torch.Tensor:
    """Float[V B D]: row v of item i holds 1000 v + i."""
    number = torch.arange(first, first + count).float()
    return torch.stack([number + 1000 * v for v in range(views)]).unsqueeze(-1).expand(-1, -1, dim).contiguous()


@pytest.mark.parametrize("size", [1, 3, 7, 11, 12, 30])
def test_after_any_batches_the_queue_holds_the_last_rows(size: int) -> None:
    queue = FeatureQueue(11, 3)
    for step in range(9):
        queue.update(rows(step * size, size))
        queue.advance()
    total = 9 * size
    held = sorted(queue.rows[:, 0].tolist())
    if total >= 11:
        assert held == [float(number) for number in range(total - 11, total)]
    assert queue.place == total % 11
    # Age follows place: the row at `place` is the oldest.
    newest = queue.rows[(queue.place - 1) % 11, 0]
    assert newest == total - 1


def test_only_chosen_items_enter_and_in_order() -> None:
    queue = FeatureQueue(5, 3)
    before = queue.rows.clone()
    queue.update(rows(0, 4, views=2), chosen=torch.tensor([False, True, False, True]))
    queue.advance()
    assert queue.rows[:4, 0].tolist() == [1.0, 3.0, 1001.0, 1003.0] and queue.place == 4
    assert torch.equal(queue.rows[4], before[4])
    queue.update(rows(0, 4), chosen=torch.zeros(4, dtype=torch.bool))
    queue.advance()
    assert queue.place == 4


def test_more_chosen_rows_than_places_leave_the_last_ones() -> None:
    queue = FeatureQueue(4, 3)
    chosen = torch.tensor([number % 2 == 0 for number in range(20)])
    queue.update(rows(0, 20), chosen=chosen)
    queue.advance()
    assert sorted(queue.rows[:, 0].tolist()) == [12.0, 14.0, 16.0, 18.0] and queue.place == 10 % 4


def test_micro_batches_enter_as_one_batch() -> None:
    one, two = FeatureQueue(13, 3), FeatureQueue(13, 3)
    two.rows.copy_(one.rows)
    one.update(rows(0, 6, views=2))
    two.update(rows(0, 3, views=2)), two.update(rows(3, 3, views=2))
    one.advance(), two.advance()
    assert torch.equal(one.rows, two.rows) and one.place == two.place == 12
    one.advance()
    assert one.place == 12  # nothing came in


def test_the_official_pointer_skips_half_of_the_rows_and_ours_none() -> None:
    """Writes of a power of two into a ring of a power of two: the official pointer never comes to every second slice."""
    skipping, ours = FeatureQueue(64, 3, advance_twice=True), FeatureQueue(64, 3)
    untouched = skipping.rows.clone(), ours.rows.clone()
    for step in range(200):
        for queue in (skipping, ours):
            queue.update(rows(4 * step, 4))
            queue.advance()
    kept = [int((queue.rows == start).all(dim=1).sum()) for queue, start in zip((skipping, ours), untouched, strict=True)]
    assert kept == [32, 0]


def test_neighbours_are_the_nearest_by_cosine_as_stored() -> None:
    queue = FeatureQueue(200, 8)
    queue.rows.mul_(torch.linspace(0.1, 9.0, 200).unsqueeze(1))  # lengths must not matter for who is near
    queries = torch.sin(torch.arange(5 * 8.0)).reshape(5, 8)
    found = queue.neighbours(queries, count=3)
    cosine = F.normalize(queries, dim=-1) @ F.normalize(queue.rows, dim=-1).T
    expected = queue.rows[cosine.argsort(dim=-1, descending=True)[:, :3]]
    assert torch.equal(found, expected)


def test_a_queue_of_negatives_starts_on_the_sphere() -> None:
    torch.testing.assert_close(FeatureQueue(50, 4, unit=True).rows.norm(dim=-1), torch.ones(50))
    with pytest.raises(ValueError, match="at least 1 row, not 0"):
        FeatureQueue(0, 4)


def test_a_checkpoint_holds_rows_and_place() -> None:
    queue, other = FeatureQueue(5, 3), FeatureQueue(5, 3)
    queue.update(rows(0, 3))
    queue.advance()
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.rows, queue.rows) and other.place == 3
