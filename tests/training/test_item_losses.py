"""The last losses of items: which terms they are made of, when they are written, and that large indices stay exact."""

import math
from types import SimpleNamespace

import pytest
import torch
from golden import load
from processes import free_port, together

from glpretrain.data.infobatch import InfoBatch
from glpretrain.training.item_losses import ItemLosses, losses_for


def test_a_loss_is_the_weighted_sum_of_the_terms_that_have_a_number_per_item() -> None:
    losses = ItemLosses(5)
    terms = {
        "own": torch.tensor([1.0, 2.0]),
        "other": torch.tensor([10.0, 20.0]),
        "off": torch.tensor([7.0, 7.0]),
        "joint": torch.tensor(99.0),
    }
    losses.update(torch.tensor([3, 1]), terms=terms, weights={"own": 1.0, "other": 0.5, "off": 0.0, "joint": 1.0})
    assert losses.last.isnan().all(), "a micro-batch moves nothing"
    losses.advance()
    assert losses.last[[1, 3]].tolist() == [12.0, 6.0] and int(losses.last.isnan().sum()) == 3


def test_a_later_loss_replaces_the_earlier_one_and_a_refused_step_writes_nothing() -> None:
    losses = ItemLosses(3)
    for value in (1.0, 2.0):
        losses.update(torch.tensor([0]), terms={"a": torch.tensor([value])}, weights={"a": 1.0})
        losses.advance()
    losses.update(torch.tensor([0]), terms={"a": torch.tensor([math.nan])}, weights={"a": 1.0})
    losses.discard()
    losses.advance()
    assert losses.last[0] == 2.0


def test_micro_batches_of_a_step_are_written_together() -> None:
    losses = ItemLosses(4)
    for index in range(4):
        losses.update(torch.tensor([index]), terms={"a": torch.tensor([index + 0.1])}, weights={"a": 1.0})
    losses.advance()
    assert losses.last.tolist() == pytest.approx([0.1, 1.1, 2.1, 3.1])


def test_numbers_of_half_precision_are_kept_in_float32() -> None:
    losses = ItemLosses(2)
    losses.update(torch.tensor([1]), terms={"a": torch.tensor([0.3], dtype=torch.bfloat16)}, weights={"a": 0.1})
    losses.advance()
    assert losses.last[1].item() == pytest.approx(0.1 * float(torch.tensor(0.3, dtype=torch.bfloat16)), rel=1e-6)


def in_process(rank: int, port: int) -> list[float]:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    official = load("infobatch")["gathered"]
    losses = ItemLosses(2**24 + 8)
    own = slice(0, 2) if rank == 0 else slice(3, 5)
    index, values = (torch.tensor(official[name])[own] for name in ("items", "losses"))
    losses.update(index, terms={"a": values}, weights={"a": 1.0})
    losses.advance()
    torch.distributed.destroy_process_group()
    return [float(losses.last[one]) for one in official["items"]] + [float((~losses.last.isnan()).sum())]


def test_two_processes_hold_the_losses_of_both_under_exact_indices() -> None:
    """The official code sends an index as a number of the losses' kind: in float32, odd ones above 2^24 become their neighbours."""
    official = load("infobatch")["gathered"]
    assert torch.tensor(official["items"]).float().long().tolist() == official["written"] != official["items"]
    port = free_port()
    first, second = (ended.value for ended in together(lambda rank: in_process(rank, port), count=2))
    assert isinstance(first, list) and first == pytest.approx(second, nan_ok=True)
    assert first == pytest.approx([*official["losses"][:2], math.nan, *official["losses"][3:], 4.0], nan_ok=True)


def test_only_an_order_that_looks_at_losses_gets_them() -> None:
    order = InfoBatch()
    data = SimpleNamespace(source=range(7), order=order)
    losses = losses_for(data, method="M", weights={"a": 1.0, "b": 0.0})
    assert losses is not None and len(losses.last) == 7
    losses.last.fill_(3.0)
    assert order._losses is not None and (order._losses() == 3.0).all()
    assert losses_for(SimpleNamespace(source=range(7), order=object()), method="M", weights={}) is None
    assert losses_for(None, method="M", weights={}) is None


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}])
def test_a_method_without_losses_of_items_is_refused_by_name(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"data.order: InfoBatch needs losses of items, but no term of Barlow has one per item; leave"):
        losses_for(SimpleNamespace(source=range(7), order=InfoBatch()), method="Barlow", weights=weights)
