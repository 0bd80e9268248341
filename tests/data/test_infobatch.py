"""InfoBatch: what is left out and how the others weigh, beside the official package; that nothing is biased; the edge of annealing."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from golden import load, noise
from test_module import Ramp
from torch import Tensor

from glpretrain.data.infobatch import InfoBatch
from glpretrain.data.orders import ByShard, Epoch, EpochBatches, Order, Shuffled

NUM_ITEMS = 23


class Losses:
    """Losses that a test sets."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __call__(self) -> Tensor:
        return self.values


def following(losses: Losses, **settings) -> InfoBatch:
    order = InfoBatch(**settings)
    order.begin(Ramp(len(losses.values)))
    order.follow(losses)
    return order


def made(order: InfoBatch, number: int, *, progress: float = 0.0, seed: int = 0) -> Epoch:
    return order.epoch(number, length=len(order.weights), seed=seed, progress=progress)


def official_draws(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Draw as the official code does, and cut off what is left of an item: it takes numpy's `choice`, which is its permutation."""
    generator = np.random.RandomState(seed)
    monkeypatch.setattr("glpretrain.data.infobatch.keys.permutation", lambda key, count: torch.from_numpy(generator.permutation(count)))
    monkeypatch.setattr("glpretrain.data.infobatch.keys.uniform", lambda key, count: torch.ones(count))


def official_epochs(run: dict) -> Iterator[tuple[int, dict, bool]]:
    """Number of an epoch, what the official code made of it, and whether it leaves items out."""
    for number, epoch in enumerate(run["of_epochs"]):
        yield number, epoch, number + 1 <= run["delta"] * run["epochs"]


@pytest.mark.parametrize(
    "run", load("infobatch")["runs"], ids=lambda run: f"{run['epochs']} epochs, r {run['ratio']}, delta {run['delta']}"
)
def test_items_and_weights_are_the_official_ones_for_the_same_draws(run: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its stale weights switched on: after the last epoch that leaves items out, it forgets to reset them unless delta C is whole."""
    losses, stale = Losses(torch.full((NUM_ITEMS,), math.nan)), torch.ones(NUM_ITEMS)
    order = following(losses, ratio=run["ratio"], delta=run["delta"])
    num_stale = 0
    for number, official, prunes in official_epochs(run):
        losses.values = torch.tensor(official["scores"])
        official_draws(monkeypatch, seed=number + 1)
        epoch = made(order, number, progress=0.0 if prunes else 1.0)
        assert sorted(epoch.indices.tolist()) == official["items"]
        of_all = torch.where(order.weights > 0.0, order.weights, 1.0)  # the official weight of what is left out is 1
        if prunes:
            stale = of_all
        elif number == run["delta"] * run["epochs"]:
            stale = torch.ones(NUM_ITEMS)
        torch.testing.assert_close(stale, torch.tensor(official["weights"]), rtol=1e-6, atol=0.0)  # two roundings of 1 / (1 - r)
        num_stale += int((stale != of_all).any())
        if not prunes:
            assert (epoch.weights == 1.0).all()
        elif number > 0:
            assert (epoch.weights > 1.0).sum() > 0 and len(epoch.indices) < NUM_ITEMS
    whole = (run["delta"] * run["epochs"]).is_integer()
    assert num_stale == (0 if whole else sum(not prunes for _, _, prunes in official_epochs(run)))


def test_items_between_quantiles_are_the_official_ones_for_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    official = load("infobatch")["quantiles"]
    order = following(Losses(noise(40, name="quantile losses") + 1.5), quantiles=[(0.2, 0.75), (0.85, 0.5)])
    official_draws(monkeypatch, seed=official["seed"])
    assert sorted(made(order, 1).indices.tolist()) == official["items"]
    assert torch.where(order.weights > 0.0, order.weights, 1.0).tolist() == official["weights"]


def test_the_weighted_mean_of_a_batch_has_the_official_value_and_gradient() -> None:
    """As `Method.averaged` computes it: divided by the number of items, not by the sum of their weights."""
    for run in load("infobatch")["runs"]:
        for number, official, _ in official_epochs(run):
            batch = official["first_batch"]
            leaf = (noise(NUM_ITEMS, name=f"losses {number}") + 1.5)[batch["items"]].requires_grad_()
            mean = (torch.tensor(official["weights"])[batch["items"]] * leaf).mean()
            mean.backward()
            assert mean.item() == pytest.approx(batch["mean"], rel=1e-6)
            assert leaf.grad is not None and leaf.grad.tolist() == pytest.approx(batch["gradient"], rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"ratio": 0.3}, {"quantiles": [(0.2, 0.75), (0.85, 0.5)]}], ids=["half", "0.3", "quantiles"])
@pytest.mark.parametrize("num_items", [7, 41])
def test_the_mean_gradient_of_a_thousand_epochs_is_that_of_all_items(settings: dict, num_items: int) -> None:
    """Of a linear model: the gradient of an item is a vector. 7 items: the share that rounding cuts off would be seen."""
    gradients = noise(num_items, 5, name="gradients").double() + 0.3
    order = following(Losses(noise(num_items, name="losses")), **settings)
    sums = []
    for number in range(1, 1001):
        epoch = made(order, number)
        sums.append((epoch.weights.double().unsqueeze(1) * gradients[epoch.indices]).sum(dim=0))
    sums = torch.stack(sums)
    error = sums.std(dim=0) / math.sqrt(len(sums))
    assert (error > 0.0).all()
    assert ((sums.mean(dim=0) - gradients.sum(dim=0)).abs() < 4.0 * error).all()


@pytest.mark.parametrize("epochs", [7, 8, 100, 200, 1000])
@pytest.mark.parametrize("delta", [0.07, 0.5, 0.7, 0.875, 0.9, 1.0])
def test_annealing_begins_at_the_share_and_weighs_every_item_alike(epochs: int, delta: float) -> None:
    """0.07 of 100 epochs are 7, though 0.07 * 100 is more than 7 in floating point."""
    order = following(Losses(noise(NUM_ITEMS, name="losses")), delta=delta)
    first = math.ceil(round(delta * epochs, 6))
    for number in {0, 1, first - 2, first - 1, first, first + 1, epochs - 1} & set(range(epochs)):
        epoch = made(order, number, progress=number / epochs)
        if number < first:
            assert len(epoch.indices) < NUM_ITEMS and epoch.weights.max() == 2.0, number
        else:
            assert sorted(epoch.indices.tolist()) == list(range(NUM_ITEMS)) and (epoch.weights == 1.0).all(), number


def test_without_losses_an_epoch_is_that_of_the_order_within() -> None:
    losses = Losses(torch.full((NUM_ITEMS,), math.nan))
    order = following(losses)
    plain = Shuffled().epoch(0, length=NUM_ITEMS, seed=0, progress=0.0).indices
    assert torch.equal(made(order, 0).indices, plain)
    losses.values = noise(NUM_ITEMS, name="losses")
    later = made(order, 1)
    whole = Shuffled().epoch(1, length=NUM_ITEMS, seed=0, progress=0.0).indices.tolist()
    assert later.indices.tolist() == [index for index in whole if order.weights[index] > 0.0], "the same order, without some"


def test_items_that_were_never_seen_stay_and_do_not_move_the_mean() -> None:
    values = torch.tensor([1.0, 2.0, 2.55, 4.0, math.nan, math.nan])  # the mean is 2.39; with two losses of 3, 2.59
    order = following(Losses(values))
    for number in range(1, 20):
        kept = set(made(order, number).indices.tolist())
        assert {2, 3, 4, 5} <= kept and len(kept) == 5
    assert (order.weights[[2, 3, 4, 5]] == 1.0).all()


def test_losses_that_are_all_equal_leave_nothing_out() -> None:
    assert len(made(following(Losses(torch.full((NUM_ITEMS,), 0.1))), 1).indices) == NUM_ITEMS


def test_an_epoch_is_the_same_again_after_a_resume_whatever_the_losses_are_by_then() -> None:
    losses = Losses(noise(NUM_ITEMS, name="losses"))
    order = following(losses)
    before = made(order, 3)
    losses.values = noise(NUM_ITEMS, name="other losses")
    resumed = following(losses)
    resumed.restore(order.state_dict())
    again, later = made(resumed, 3), made(resumed, 4)
    assert torch.equal(again.indices, before.indices) and torch.equal(again.weights, before.weights)
    of_new = following(losses)
    assert torch.equal(later.indices, made(of_new, 4).indices), "the next epoch looks at the new losses"


def test_epochs_and_seeds_draw_by_themselves() -> None:
    order = following(Losses(noise(NUM_ITEMS, name="losses")))
    drawn = {tuple(made(order, number, seed=seed).indices.sort().values.tolist()) for number, seed in ((1, 0), (2, 0), (3, 0), (4, 1))}
    assert len(drawn) == 4


def test_a_number_is_rounded_up_as_often_as_its_fraction_says() -> None:
    """Three items of low loss and r = 0.5: one and a half stay."""
    order = following(Losses(torch.tensor([0.0, 0.1, 0.2, 9.0, 9.0])))
    counts = torch.tensor([float(len(made(order, number).indices) - 2) for number in range(1, 401)])
    assert set(counts.tolist()) == {1.0, 2.0} and counts.mean().item() == pytest.approx(1.5, abs=4 * 0.5 / 20)


class Shards(Ramp):
    """Items in shards of four."""

    @property
    def shard_starts(self) -> np.ndarray:
        return np.arange(0, len(self), 4)


def test_shards_stay_together() -> None:
    source = Shards(24)
    order = InfoBatch(order=ByShard(together=1))
    order.begin(source)
    order.follow(Losses(noise(24, name="losses")))
    shards = [index // 4 for index in made(order, 1).indices.tolist()]
    assert len(shards) < 24 and len([1 for one, other in itertools.pairwise(shards) if one != other]) == 5


class Half(Order):
    """Half of the items."""

    def epoch(self, number: int, *, length: int, seed: int, progress: float) -> Epoch:
        return Epoch(torch.arange(length // 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, r"ratio=0.0 given; accepted: shares above 0, up to 0.9"),
        ({"ratio": 0.95}, r"ratio=0.95 given; accepted"),
        ({"delta": 0.0}, r"delta=0.0 given; accepted: shares of the run above 0, up to 1"),
        ({"delta": 1.1}, r"delta=1.1 given"),
        ({"quantiles": [(0.85, 0.5), (0.2, 0.75)]}, r"quantiles=\[\(0.85, 0.5\), \(0.2, 0.75\)\] given; accepted: ascending"),
        ({"quantiles": [(0.2, 1.0)]}, r"ratio=1.0 given"),
        ({"quantiles": [(0.2, 0.75)], "ratio": 0.5}, r"ratio=0.5 would be ignored"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfoBatch(**settings)


def test_an_order_that_leaves_items_out_by_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="order Half does not hold every item once; give Shuffled or ByShard"):
        InfoBatch(order=Half()).begin(Ramp(11))


def test_an_epoch_that_may_be_shorter_than_a_step_is_refused_at_the_start() -> None:
    order = following(Losses(noise(NUM_ITEMS, name="losses")))
    with pytest.raises(ValueError, match="an epoch has 11 items, fewer than one batch of 12"):
        EpochBatches(order, length=NUM_ITEMS, batch_size=6, rank=0, world_size=2, seed=0)


def test_a_checkpoint_of_another_order_is_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match="remembered nothing, InfoBatch remembers held, number, weights; give the same"):
        following(Losses(noise(NUM_ITEMS, name="losses"))).restore({})


def test_the_line_of_an_epoch_says_which_share_stays() -> None:
    order = following(Losses(torch.tensor([0.0, 0.0, 0.0, 0.0, 4.0, 4.0, 4.0, 4.0])))
    order.follow(Losses(torch.full((8,), math.nan)))
    made(order, 0)
    assert order.said() == "epoch 1: 8 of 8 items (100.0%); 100.0% in all epochs so far (InfoBatch)"
    order.follow(Losses(torch.tensor([0.0, 0.0, 0.0, 0.0, 4.0, 4.0, 4.0, 4.0])))
    made(order, 1)
    assert order.said() == "epoch 2: 6 of 8 items (75.0%); 87.5% in all epochs so far (InfoBatch)"
