"""`glpretrain bench`: every part has the time that was spent in it, nothing stays behind, and what would be ignored is refused."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from shrinking import ROOT, shrunk

from glpretrain.bench.machine import peak_flops
from glpretrain.bench.summary import Costs, Part
from glpretrain.callbacks import Throughput
from glpretrain.callbacks.cost import BACKWARD, HEADS, MEAN, OPTIMIZER, REST, STUDENT, TEACHER, VIEWS, WAIT, Clock
from glpretrain.cli import main
from glpretrain.data.items import RawItems
from glpretrain.data.views import MultiCrop
from glpretrain.encoders import Encoder
from glpretrain.methods import MMC
from glpretrain.methods.base import Method
from glpretrain.training.step import Step
from glpretrain.training.teacher import EMATeacher

# Seconds that a function takes on the clock of these tests, where nothing else takes any; powers of two, so that a sum names its parts.
SECONDS: dict[tuple[type, str], tuple[str, float]] = {
    (RawItems, "__getitem__"): (WAIT, 1.0),
    (MultiCrop, "make"): (VIEWS, 2.0),
    (Encoder, "forward"): (STUDENT, 4.0),  # one call of the student's, for two sizes of views, and one of the teacher's
    (MMC, "losses"): (HEADS, 16.0),
    (pl.LightningModule, "backward"): (BACKWARD, 32.0),
    (Method, "configure_gradient_clipping"): (OPTIMIZER, 64.0),
    (torch.optim.AdamW, "step"): (OPTIMIZER, 128.0),
    (EMATeacher, "update"): (MEAN, 256.0),
    (Step, "end"): (MEAN, 1024.0),
    (Throughput, "on_train_batch_end"): (REST, 512.0),
}


class Seconds:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def taken(self, function: Callable, seconds: float) -> Callable:
        def taking(*args: object, **kwargs: object) -> object:
            self.now += seconds
            return function(*args, **kwargs)

        return taking


def fail(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["bench", *arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_every_part_has_the_time_that_was_spent_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seconds = Seconds()
    for (owner, name), (_, taken) in SECONDS.items():
        monkeypatch.setattr(owner, name, seconds.taken(getattr(owner, name), taken))
    monkeypatch.setattr(time, "perf_counter", lambda: seconds.now)
    monkeypatch.setattr("glpretrain.cli.benched.peak_flops", lambda device, dtype: 1e6)
    accumulated = 2
    recipe = str(shrunk(ROOT / "mmc.yaml", tmp_path))
    options = ["--trainer.accumulate_grad_batches", str(accumulated), "--steps", "2", "--json", "costs.json", "--picture", "costs.png"]
    assert main(["bench", recipe, *options]) == 0
    costs = json.loads(Path("costs.json").read_text())
    parts = {name: part["milliseconds"] / 1e3 for name, part in costs["parts"].items()}
    # The student sees the global views, and the whole view besides.
    of_batch = {WAIT: 1.0, VIEWS: 2.0, TEACHER: 4.0, STUDENT: 2 * 4.0, HEADS: 16.0, BACKWARD: 32.0, REST: 512.0}
    assert parts == {**{name: accumulated * taken for name, taken in of_batch.items()}, OPTIMIZER: 192.0, MEAN: 1280.0}
    step = sum(parts.values())
    assert costs["step_milliseconds"] == pytest.approx(1e3 * step) and costs["wait"] == pytest.approx(accumulated / step)
    assert costs["items"] == 4 * accumulated and costs["items_per_second"] == pytest.approx(4 * accumulated / step)
    assert costs["flops_share"] == pytest.approx(costs["flops"] / step / 1e6) and costs["flops"] > 0
    assert costs["peak_bytes"] > 1e8
    assert Path("costs.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json", "costs.png", "mmc.yaml"]


def test_a_part_inside_another_one_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    clock.end_step()  # 0
    with clock.part(HEADS), clock.part(TEACHER):  # 1 and 3, until 6 and 10
        pass
    clock.end_step()  # 15
    (step,) = clock.steps()
    assert {name: taken for name, taken in step.items() if taken} == {REST: 6e3, HEADS: 6e3, TEACHER: 3e3}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mmcc"], "there is no 'mmcc'"),
        (["eval/images"], "eval/images says how a backbone is scored, not trained"),
        (["mmc", "--trainer.max_steps", "3"], "bench: --trainer.max_steps would be ignored; the benchmark sets it itself"),
        (["mmc", "--runs=here"], "bench: --runs would be ignored"),
        (["mmc", "--steps", "0"], "steps: 3 to warm up and 0 to measure; accepted: at least 1 each"),
        (["mmc", "--views", "--picture", "a.png"], "bench: --picture would be ignored beside --views"),
        (["mmc", "--gpus", "2"], "bench: --gpus and --gpu_memory would be ignored without --plan"),
        (["mmc", "--plan", "--picture", "a.png"], "bench: --picture would be ignored beside --plan"),
        (["mmc", "--plan", "--gpus", "0"], "bench: gpus is 0; accepted: numbers above 0"),
        (["mmc", "--plan", "--trainer.strategy", "fsdp"], "trainer.strategy=fsdp; accepted: fsdp2, which shards all parameters, ddp, auto"),
        (["mae", "--scaling", "locals"], "--scaling locals: the recipe has no local views; accepted: batch, files, prototypes"),
        (["mmc_points", "--scaling", "files"], "PointCrops makes views of no pictures; accepted: batch"),
        (["mae", "--scaling", "prototypes"], "--scaling prototypes: glpretrain.methods.MAE has none; accepted: batch, files, locals"),
        (["mmc", "--data.batch_sise", "3"], "data: nothing reads 'batch_sise'; did you mean batch_size?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_be_ignored_is_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in fail(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_the_views_of_a_recipe_are_timed_beside_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, written = torch.get_num_threads(), tmp_path / "views.json"
    small = ["--data.batch_size", "2", "--width", "32", "--height", "24", "--json", str(written)]
    assert main(["bench", "mmc", "--views", *small]) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(written.read_text())
    for ways in found["threads"].values():
        assert ways["ours"] == ways["ours, in a worker"] + ways["ours, on the device"] > 0 and ways["kornia"] > 0
    said = capsys.readouterr().out
    assert "2 items of 32x24 px, 3 views each, on cpu" in said and "torchvision v2, PIL" in said and "blend" in said


def test_the_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 4.0, 5.0, 7.0, 8.0, 12.0, 13.0, 17.0, 18.0, 22.0, 23.0, 27.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    monkeypatch.setattr("glpretrain.bench.machine._SIDES", {"cpu": 8})
    assert peak_flops(torch.device("cpu"), torch.float32) == 2 * 8**3 / 2.0


@pytest.mark.parametrize(
    ("recipe", "number", "values"),
    [
        ("mmc", "batch", {"8 items": 8, "16 items": 16, "32 items": 32, "64 items": 64}),
        ("dino", "locals", {"0 local views": 0, "1 local views": 1, "2 local views": 2, "4 local views": 4}),
        ("mmc", "prototypes", {"16 prototypes": 16, "64 prototypes": 64, "256 prototypes": 256}),
    ],
)
def test_scaling_measures_several_values_of_a_number(
    recipe: str, number: str, values: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def counted(arguments: list[str], *, steps: int) -> Costs:
        *_, name, value = arguments
        count = sum(view["count"] for view in json.loads(value)) if name.endswith("local_views") else int(value)
        assert name.removeprefix("--") in ("data.batch_size", "data.views.init_args.local_views", "model.init_args.num_prototypes")
        return Costs("mmc", "here", "32-true", count, 0, [Part(WAIT, 1.0, 1.0)], float(steps), 1.0, 1, "here", 1, 1.0, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr("glpretrain.cli.scaled.measured_costs", counted)
    assert main(["bench", recipe, "--scaling", number, "--steps", "7", "--json", "costs.json"]) == 0
    costs = json.loads(Path("costs.json").read_text())
    assert {name: one["items"] for name, one in costs.items()} == values
    assert all(one["step_milliseconds"] == 7.0 for one in costs.values())


def test_scaling_by_files_runs_on_listings_of_files_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("glpretrain.cli.benched.peak_flops", lambda device, dtype: 1e6)
    monkeypatch.setattr("glpretrain.cli.scaled._FILES", (40, 1_500))
    lengths: list[int] = []
    made = RawItems.__init__
    monkeypatch.setattr(RawItems, "__init__", lambda self, items, **given: lengths.append(len(items)) or made(self, items, **given))
    recipe = str(shrunk(ROOT / "mmc.yaml", tmp_path))
    options = ["--steps", "1", "--json", "costs.json", "--picture", "costs.png", "--data.num_workers", "0"]
    assert main(["bench", recipe, "--scaling", "files", *options]) == 0
    costs = json.loads(Path("costs.json").read_text())
    assert list(costs) == ["40 files", "1,500 files"] and lengths == [40, 1_500]
    for one in costs.values():
        assert one["start_seconds"] > 0.0 and one["read_milliseconds"] > 0.0 and one["cut_milliseconds"] > 0.0
        # Without a worker, the step waits while a batch is read and cut.
        assert one["read_milliseconds"] + one["cut_milliseconds"] < 3 * one["parts"][WAIT]["milliseconds"] + 50
    assert Path("costs.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json", "costs.png", "mmc.yaml"]


def test_on_a_gpu_the_time_is_that_of_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events stand for marks; nothing waits for the device before all steps are done."""
    log: list[str] = []

    class Event:
        def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
            assert device.type == "cuda" and enable_timing

        def record(self) -> None:
            self.when = 5.0 * len(log)
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            assert log[-1] == "wait"
            return end.when - self.when

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: log.append("wait"))
    clock = Clock(torch.device("cuda"))
    clock.end_step()
    with clock.part(HEADS):
        pass
    clock.end_step()
    (step,) = clock.steps()
    assert (step[HEADS], step[REST]) == (5.0, 10.0) and log.count("wait") == 1


@pytest.mark.parametrize(
    ("num_workers", "wait", "said"),
    [(0, 0.5, "50% of the time (no worker: this process prepares"), (1, 0.05, "(with 1 worker)"), (2, 0.2, "it starves with 2 workers;")],
)
def test_a_run_that_waits_for_its_data_is_told_what_to_do(num_workers: int, wait: float, said: str) -> None:
    assert said in Costs("mmc", "here", "32-true", 4, num_workers, [], 1.0, 1.0, 1, "here", 1, 1.0, wait, 1.0, 1.0, 1.0).starvation


@pytest.mark.slow
def test_the_named_parts_fill_the_steps_of_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for batch_size in ("16", "32"):
        assert main(["bench", "mmc", "--steps", "5", "--data.batch_size", batch_size, "--json", "costs.json"]) == 0
        found.append(json.loads(Path("costs.json").read_text()))
    for costs in found:
        shares = {name: part["share"] for name, part in costs["parts"].items()}
        assert sum(shares.values()) == pytest.approx(1.0) and shares[REST] < 0.2
        # Medians need not add up, and on a machine with other jobs a step may take twice the time of the next one.
        assert sum(part["milliseconds"] for part in costs["parts"].values()) == pytest.approx(costs["step_milliseconds"], rel=0.3)
        assert 0.05 < costs["flops_share"] < 1.0
    assert found[1]["flops"] == pytest.approx(2 * found[0]["flops"], rel=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]
