"""Sets as people have them: a class with one item, one class only, a single item, classes that one part lacks, masks without a label.

Whatever the set, an evaluator scores what can be scored and says in one line what it leaves out; and what knows nothing scores chance.
"""

import dataclasses
import json
import logging
import math

import pytest
import torch
from evaluate_stubs import StubEncoder, TableSource, labelled, masked, noise, output, position_of, truth, with_classes
from test_every_evaluator import EVALUATORS, name_of
from torch import Tensor

from glpretrain.core.types import EncoderOutput
from glpretrain.data.sources.base import Source
from glpretrain.evaluate import KNN, CrossValidatedProbe, Evaluator, FewShot, LinearProbe, LinearSVM, LinearSweep, Result, Score, Sources
from glpretrain.evaluate.metrics.intervals import interval_score, mean_interval, mean_of_scores, rate_score
from glpretrain.evaluate.patches.similarity import PairSample, pair_scores
from glpretrain.evaluate.probes import dealt, stratified_split

SIZE = 8


def constant(items: Tensor) -> EncoderOutput:
    return output(torch.ones(len(items), 8))


def few(*labels: int, num_classes: int = 2) -> TableSource:
    return labelled(labels, num_classes=num_classes, size=SIZE)


def masks(count: int, *, shown: bool) -> TableSource:
    """Images whose left half is class 1, and with nothing that counts where it is not to be shown."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.long)
    mask[:, :4] = 1
    return with_classes([mask if shown else torch.full_like(mask, -1)] * count, num_classes=2)


SETS: dict[str, tuple[TableSource, TableSource]] = {
    "class of one": (few(*[0] * 24, 1), few(*[0] * 6)),
    "class of one in both": (few(*[0] * 24, 1), few(*[0] * 6, 1)),
    "one class only": (few(*[0] * 9), few(*[0] * 5)),
    "a single item": (few(0), few(0)),
    "one item of each class": (few(0, 1), few(0, 1)),
    "two items of each class": (few(0, 1, 0, 1), few(1, 0, 1, 0)),
    "nothing in common": (few(0, 1, 0, 1, num_classes=4), few(2, 3, num_classes=4)),
    "no labels": (few(-1, -1, -1), few(-1, -1, -1)),
}
MASKS = {"no mask of a class": masks(3, shown=False), "one image": masks(1, shown=True), "two images": masks(2, shown=True)}


def patchy(items: Tensor) -> EncoderOutput:
    """Patches of 2 pixels that differ from place to place."""
    patches = noise(position_of(items), 16, 8, seed=5) + items[:, 0, ::2, ::2].flatten(1)[..., None]
    return EncoderOutput(patches.mean(dim=1), patches)


def quick(owner: type[Evaluator]) -> Evaluator:
    """With its defaults, but for the number of steps."""
    return dataclasses.replace(owner(), **({"num_steps": 5} if hasattr(owner, "num_steps") else {}))


def accounted(evaluator: Evaluator, encoder: StubEncoder, sources: Sources) -> Result:
    """Everything that a table shows is scored, or left out with one line."""
    result = evaluator.attempt(encoder, sources)
    assert result.scores or result.left_out
    assert set(evaluator.headlines) <= {*result.scores, *result.left_out}
    assert set(result.scores).isdisjoint(result.left_out)
    assert all(reason and "\n" not in reason and "Traceback" not in reason for reason in result.left_out.values())
    json.dumps([result.scores, dict(result.left_out), result.chosen], allow_nan=False)
    for score in result.scores.values():
        assert score.low is None or (score.high is not None and score.low <= score.value <= score.high)
    return result


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("owner", [owner for owner in EVALUATORS if owner.modality is None or owner.needs == ("test",)], ids=name_of)
def test_a_small_set_costs_the_scores_that_it_cannot_give(owner: type[Evaluator], name: str) -> None:
    train, test = SETS[name]
    for features in (patchy, constant):
        accounted(quick(owner), StubEncoder(features, size=SIZE), Sources({"train": train, "test": test}))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("owner", [owner for owner in EVALUATORS if "masked" in owner.needs and owner.modality == "image"], ids=name_of)
def test_a_small_set_of_masks_costs_the_scores_that_it_cannot_give(owner: type[Evaluator], name: str) -> None:
    for scored in (MASKS[name], MASKS["two images"]):
        accounted(quick(owner), StubEncoder(patchy, size=SIZE), Sources({"masked_train": MASKS[name], "masked": scored}))


@pytest.mark.parametrize("owner", EVALUATORS, ids=name_of)
def test_a_missing_source_is_left_out_with_the_reason(owner: type[Evaluator]) -> None:
    missing = Sources({}, missing=dict.fromkeys(owner().roles, "pictures have 5 channels and scenes have 3; give labelled"))
    found = accounted(quick(owner), StubEncoder(truth), missing)
    assert not found.scores and "pictures have 5 channels and scenes have 3; give labelled" in next(iter(found.left_out.values()))


def test_an_error_of_torch_costs_only_the_evaluator() -> None:
    def failing(items: Tensor) -> EncoderOutput:
        raise RuntimeError("out of memory\non the device")

    assert KNN().attempt(StubEncoder(failing), Sources({"train": few(0, 1), "test": few(0, 1)})).left_out == {
        "accuracy": "out of memory on the device"
    }


def test_a_score_that_is_no_number_is_left_out() -> None:
    class Empty(KNN):
        def compute(self, *given: object) -> Result:
            return Result({"accuracy": Score(math.nan, None, None, 0), "k1": Score(1.0, None, None, 1)}, {})

    found = Empty().attempt(StubEncoder(truth), Sources({"train": few(0, 1), "test": few(0, 1)}))
    assert list(found.scores) == ["k1"] and found.left_out == {"accuracy": "its value is nan"}


@pytest.mark.parametrize("count", [4, 11, 25, 26])
def test_cross_validation_of_what_knows_nothing_scores_chance(count: int) -> None:
    """Folds that are dealt without regard to classes leave the rarer class of a fold as the commoner of the others: 38 instead of 50."""
    source = few(*[0, 1] * count)
    assert CrossValidatedProbe().run(StubEncoder(constant, size=SIZE), {"test": source}).scores["accuracy"].value == 50
    unequal = few(*[0] * 3 * count, *[1] * count)
    assert CrossValidatedProbe().run(StubEncoder(constant, size=SIZE), {"test": unequal}).scores["accuracy"].value == 75


def test_cross_validation_of_noise_scores_chance_on_average() -> None:
    rates: list[float] = []
    for seed in range(24):
        encoder = StubEncoder(lambda items, seed=seed: output(noise(position_of(items), 8, seed=200 + seed)), size=SIZE)
        rates.append(CrossValidatedProbe(inverse_l2=[0.1]).run(encoder, {"test": few(*[0, 1] * 20)}).scores["accuracy"].value)
    assert abs(sum(rates) / 24 - 50) < 3 * 100 * 0.5 / math.sqrt(24 * 40)  # 3 standard deviations, 4.8 points


@pytest.mark.parametrize(
    "evaluator", [KNN(k=(3,)), LinearProbe(), LinearSVM(), FewShot(shots=(1,)), LinearSweep(num_blocks=(1,), num_steps=5)]
)
def test_constant_features_score_chance(evaluator: Evaluator) -> None:
    found = evaluator.run(StubEncoder(constant, size=SIZE), {"train": few(*[0] * 13, *[1] * 13), "test": few(*[0] * 8, *[1] * 8)})
    assert found.scores["accuracy"].value == 50


def test_ties_between_neighbours_follow_no_order_of_classes() -> None:
    """Of 90 equal neighbours in the order of their classes, the first ten are all of the first class."""
    source = few(*[0] * 10, *[1] * 80)
    assert KNN(k=(10,)).run(StubEncoder(constant, size=SIZE), {"train": source, "test": source}).scores["accuracy"].value > 80


def test_held_out_parts_have_every_class_in_its_share() -> None:
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 2 + [3])
    held_out, fitted = stratified_split(labels, None, ratio=0.2)
    assert labels[held_out].bincount().tolist() == [8, 2, 1] and labels[fitted].bincount().tolist() == [32, 8, 1, 1]
    groups = torch.arange(53) // 2
    held_out, fitted = stratified_split(labels, groups, ratio=0.2)
    assert not set(groups[held_out].tolist()) & set(groups[fitted].tolist())
    place, count = dealt(labels, groups, seed=0)
    assert sorted(set(place[labels == 0].tolist())) == list(range(20)) and count[:40].tolist() == [20] * 40


class Frames(TableSource):
    """Four items to a video."""

    @property
    def groups(self) -> list[str]:
        return [f"video {index // 4}" for index in range(len(self))]


def test_frames_of_one_video_share_a_fold_and_widen_the_interval() -> None:
    """Features that know the video, and nothing of the class, would score 100 where frames of one video were on both sides."""
    plain = few(*[index // 4 % 2 for index in range(96)])

    def of_video(items: Tensor) -> EncoderOutput:
        return output(noise(position_of(items) // 4, 32, seed=301))

    encoder = StubEncoder(of_video, size=SIZE)
    apart = CrossValidatedProbe(inverse_l2=[10.0]).run(encoder, {"test": plain}).scores["accuracy"]
    together = CrossValidatedProbe(inverse_l2=[10.0]).run(encoder, {"test": Frames(plain.items, classes=plain.classes)}).scores["accuracy"]
    assert apart.value > 80 and together.value < 75
    assert together.low is not None and together.high is not None and together.high - together.low > 30 and together.n == 96


def test_classes_are_matched_by_name_and_what_train_lacks_is_counted() -> None:
    """The same names in another order, one class that `train` lacks and one that `test` lacks."""
    train, test = few(0, 1, 2, 0, 1, 2, num_classes=3), few(2, 0, 0, 1, num_classes=3)
    train._classes, test._classes = ["ant", "bat", "cat"], ["bat", "cow", "ant"]  # items of `test`: ant, bat, bat, cow

    def by_name(items: Tensor) -> EncoderOutput:
        """One-hot of ant, bat, cat and cow; the third channel of `test` would say so too, but labels differ."""
        return output(torch.eye(8)[position_of(items)])

    train.items = [item._replace(values=torch.full_like(item.values, 0)) for item in train.items]
    places = (0, 1, 2, 0, 1, 2), (0, 1, 1, 3)
    for source, own in zip((train, test), places, strict=True):
        for position, place in enumerate(own):
            image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
            image[2] = place
            source.items[position] = source.items[position]._replace(values=image)
    sources = Sources({"train": train, "test": test})
    for evaluator in (KNN(k=(1,)), LinearProbe(inverse_l2=(1.0,)), LinearSVM(), LinearSweep(num_blocks=(1,), learning_rates=(100.0,))):
        found = evaluator.run(StubEncoder(by_name, size=SIZE), sources)
        assert (found.scores["accuracy"].value, found.scores["accuracy"].n) == (100, 3)
        assert found.left_out == {
            "class cow": "train shows no item of it, so 1 of 4 items of test are not scored",
            "class cat": "test shows no item of it, so the scores say nothing of it",
        }
    assert train.num_reads == 6 and test.num_reads == 4  # decoded once for all


def test_items_in_both_parts_are_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    train, test = few(0, 1, 0, 1), few(0, 1, 1, 1)  # the first, second and fourth are the same
    sources = Sources({"train": train, "test": test})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            KNN(k=(1,)).run(StubEncoder(truth, size=SIZE), sources)
    assert [record.getMessage() for record in caplog.records] == [
        "source 'table': test: 3 of 4 items are in train as well; scores on them say little"
    ]


def test_features_that_are_no_numbers_name_the_item_or_the_backbone() -> None:
    def some(items: Tensor) -> EncoderOutput:
        return output(torch.where(position_of(items)[:, None] == 2, torch.nan, 1.0).expand(-1, 8))

    source: Source = few(0, 1, 0, 1)
    with pytest.raises(ValueError, match="the features are not finite for item 2, of 4 items"):
        KNN(k=(1,)).run(StubEncoder(some, size=SIZE), {"train": source, "test": source})
    with pytest.raises(ValueError, match="not finite for any of 4 items; give a backbone whose weights are finite"):
        KNN(k=(1,)).run(StubEncoder(lambda items: output(torch.full((len(items), 8), torch.inf))), {"train": source, "test": source})


def test_intervals_stay_where_values_can_be() -> None:
    score = rate_score(torch.ones(38))
    assert (round(score.value, 1), round(score.low or 0, 1), score.high) == (100.0, 90.8, 100.0)
    assert interval_score(98.0, 5.0, count=3) == (98.0, 93.0, 100.0, 3) and interval_score(1.0, 5.0, count=3) == (1.0, 0.0, 6.0, 3)
    assert interval_score(98.0, math.inf, count=1) == (98.0, None, None, 1)
    assert mean_of_scores([Score(90, 80, 95, 3), Score(70, 66, 80, 4)], count=7) == (
        80,
        80 - math.hypot(10, 4) / 2,
        80 + math.hypot(5, 10) / 2,
        7,
    )
    assert mean_of_scores([Score(90, None, None, 1), Score(70, 66, 80, 4)], count=5) == (80, None, None, 5)
    alike = pair_scores([PairSample(torch.ones(3), torch.ones(3) - 0.01 * image) for image in range(3)])
    assert all(score.high is not None and score.high <= (1 if name in ("intra", "inter") else 100) for name, score in alike.items())


def test_the_interval_of_things_in_groups_is_that_of_the_groups() -> None:
    values = torch.tensor([0.2, 0.2, 0.6, 0.6, 0.7, 0.7])
    groups = torch.tensor([3, 3, 5, 5, 9, 9])
    assert mean_interval(values, groups) == pytest.approx(mean_interval(values[::2]))
    assert mean_interval(values, torch.arange(6)) == pytest.approx(mean_interval(values))
    assert mean_interval(values, torch.zeros(6, dtype=torch.long)) == math.inf
    hits = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0] * 5)
    each = torch.arange(40)
    doubled = rate_score(hits.repeat_interleave(2), each.repeat_interleave(2))
    alone = rate_score(hits)
    assert doubled.n == 80 and doubled.low == pytest.approx(alone.low, abs=0.3) and doubled.high == pytest.approx(alone.high, abs=0.3)
    assert rate_score(torch.ones(80), each.repeat_interleave(2))[:3] == rate_score(torch.ones(40))[:3]


def test_masks_without_objects_are_left_out() -> None:
    nothing = masked([torch.zeros(SIZE, SIZE, dtype=torch.long)] * 3)
    for owner in EVALUATORS:
        if owner.modality == "image" and owner.needs == ("masked",) and owner.truth == "masks":
            found = accounted(quick(owner), StubEncoder(patchy, size=SIZE), Sources({"masked": nothing}))
            assert not found.scores
