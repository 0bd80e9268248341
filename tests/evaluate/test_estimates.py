"""What is said before a long evaluation, by a clock of the test's own: what was tried, times how much there is."""

from collections.abc import Callable

import pytest
import torch
from evaluate_stubs import StubEncoder, labelled, output, truth

from glpretrain.evaluate import KNN, DecodedItems, FeatureCache, Features, Health, LinearSweep, Retrieval, Sources, estimates
from glpretrain.evaluate.cls import knn, retrieval
from glpretrain.evaluate.estimates import Estimate, announce, estimated
from glpretrain.evaluate.progress import tracked

COUNT = 3000


class Clock:
    """Time that passes when something is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (estimates, knn, retrieval):
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        self._costs(monkeypatch, estimates, "read", lambda source, indices, *others: 0.01 * len(indices))
        self._costs(monkeypatch, knn, "knn_predict", lambda train, queries, **others: 1e-6 * len(train.cls) * len(queries))
        self._costs(monkeypatch, retrieval, "rank", lambda queries, gallery, **others: 1e-5 * len(queries.cls) * len(gallery.cls))

    def _costs(self, monkeypatch: pytest.MonkeyPatch, module: object, name: str, seconds: Callable[..., float]) -> None:
        function = getattr(module, name)

        def slow(*args, **given):
            self.pass_by(seconds(*args, **given))
            return function(*args, **given)

        monkeypatch.setattr(module, name, slow)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds

    def encoder(self) -> StubEncoder:
        """One that takes 0.02 s for an item."""
        return StubEncoder(lambda items: (self.pass_by(0.02 * len(items)), truth(items))[1])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def sources(count: int = COUNT, *, num_workers: int = 0) -> Sources:
    source = labelled([position % 5 for position in range(count)], num_classes=5)
    return Sources({role: DecodedItems(source, num_workers=num_workers) for role in ("train", "test")})


def test_reading_encoding_and_comparing_are_added_up(clock: Clock) -> None:
    encoding = 2 * COUNT * (0.01 + 0.02)
    for evaluator, comparing, rows in ((KNN(), 1e-6, 1), (Retrieval(), 1e-5, 1), (LinearSweep(num_blocks=(1,)), 0.0, 2)):
        found = estimated(evaluator, clock.encoder(), sources(), None)
        assert found.seconds == pytest.approx(encoding + comparing * COUNT * COUNT, rel=1e-6)
        assert found.num_items == 2 * COUNT and found.num_bytes == rows * 2 * COUNT * 4 * 8
    assert estimated(Health(), clock.encoder(), sources(), None).num_bytes == 3 * COUNT * 4 * 8


def test_workers_read_while_the_encoder_works(clock: Clock) -> None:
    found = estimated(LinearSweep(num_blocks=(1,)), clock.encoder(), sources(num_workers=2), None)
    assert found.seconds == pytest.approx(2 * COUNT * 0.02)


def test_features_that_are_there_cost_nothing(clock: Clock) -> None:
    encoder, given = clock.encoder(), sources()
    cache = FeatureCache(encoder)
    Features().labelled(encoder, given["train"], cache)
    found = estimated(LinearSweep(num_blocks=(1,)), encoder, given, cache)
    assert found.seconds == pytest.approx(COUNT * 0.03)


def test_few_items_are_not_tried(clock: Clock) -> None:
    assert estimated(KNN(), clock.encoder(), sources(500), None) is None and clock.now == 0


def test_a_line_is_written_before_a_long_evaluation_and_none_before_a_short_one(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    announce("knn", KNN(), clock.encoder(), sources(), None)
    assert capfd.readouterr().err == "knn: about 3 min for 6,000 items, 0.0 GB\n"
    monkeypatch.setattr(estimates, "_LONG", 500.0)
    announce("knn", KNN(), clock.encoder(), sources(), None)
    announce("knn", KNN(features=Features(size=5)), clock.encoder(), sources(), None)  # which the evaluator refuses
    assert capfd.readouterr().err == ""


def test_lines_are_short() -> None:
    assert Estimate(720.0, 100_000, 4_000_000_000).line("knn") == "knn: about 12 min for 100,000 items, 4.0 GB"
    assert Estimate(9000.0, 1_281_167, 100).line("sweep") == "sweep: about 2.5 h for 1,281,167 items, 0.0 GB"


def test_where_there_is_no_terminal_a_line_is_written_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def later() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr("glpretrain.evaluate.progress.time.monotonic", later)
    monkeypatch.setattr("glpretrain.evaluate.progress._LOG_SECONDS", 3.5)
    assert list(tracked(range(10), total=10, description="encoding photos")) == list(range(10))
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["encoding photos: 4 of 10, 0:00:06 left", "encoding photos: 8 of 10, 0:00:02 left"]


def test_nothing_is_kept_of_what_was_tried(clock: Clock) -> None:
    encoder, given = StubEncoder(lambda items: output(torch.zeros(len(items), 8))), sources()
    cache = FeatureCache(encoder)
    estimated(KNN(), encoder, given, cache)
    assert cache.num_computed == 0 and len(given["train"].known.unseen(given["train"].indices)) == COUNT
