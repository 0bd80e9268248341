"""Two and four processes: what one of them suffers ends all of them within seconds, and the same command goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from shrinking import ROOT, shrunk

from glpretrain.core.watch import Watch, connect, serve

_LIMIT = 30.0  # seconds until all processes have ended
_PROJECT = Path(__file__).parents[2]
STEPS = 6
State = Callable[[int], dict[str, torch.Tensor]]


class Launch:
    """One recipe of several processes, started as often as needed.

    Args:
        folder: where it runs.
        count: number of processes.
        launcher: "own" is Lightning's, which starts the others from the first process.
        restarts: how often torchrun starts the processes again.
        strategy: what each process holds.
    """

    def __init__(self, folder: Path, *, count: int, launcher: str, restarts: int = 0, strategy: str = "ddp") -> None:
        self.folder, self.count, self.strategy = folder, count, strategy
        folder.mkdir(exist_ok=True)
        self.recipe, self.clock = shrunk(ROOT / "dino.yaml", folder), folder / "clock"
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", f"--max-restarts={restarts}", "-m"]
        self._start = [sys.executable, "-m", *(torchrun if launcher == "torchrun" else []), "glpretrain.cli", "pretrain", str(self.recipe)]

    def start(self, *, kind: str = "raise", rank: int = -2) -> subprocess.Popen[str]:
        """The command, with a fault that happens once."""
        fault = {"class_path": "faulty.Fault", "init_args": {"kind": kind, "rank": rank, "step": 3, "clock": str(self.clock)}}
        options = {
            **{
                "callbacks": json.dumps([fault]),
                "devices": self.count,
                "strategy": self.strategy,
                "accelerator": "cpu",
                "max_steps": STEPS,
            },
            **{"logger": "false", "enable_progress_bar": "false"},
        }
        words = [word for name, value in options.items() for word in (f"--trainer.{name}", str(value))]
        return subprocess.Popen(
            [*self._start, *words, "--evaluate", "false", "--report", "false", "--data.batch_size", "2", "--import", "faulty"],
            env=os.environ | {"PYTHONPATH": f"{_PROJECT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def said(self, process: subprocess.Popen[str]) -> str:
        """What the processes printed until all of them had ended, the ones that lost their parent too."""
        said, _ = process.communicate(timeout=900.0)
        until = time.monotonic() + 60.0
        while self._alive() and time.monotonic() < until:
            time.sleep(0.1)
        assert not self._alive(), f"processes are left over:\n{said}"
        return said

    def seconds(self) -> float:
        """Since the fault."""
        return time.time() - float(self.clock.read_text())

    def _alive(self) -> bool:
        return subprocess.run(["pgrep", "-f", str(self.recipe)], capture_output=True).returncode == 0

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, teacher and states of the newest run, which is complete."""
        run = self.folder / "runs" / "dino" / "latest"
        assert json.loads((run / "results.json").read_text())["steps"] == STEPS
        return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> State:
    """State after a run in which nothing happened, of so many processes."""

    @cache
    def state(count: int) -> dict[str, torch.Tensor]:
        launch = Launch(tmp_path_factory.mktemp("undisturbed"), count=count, launcher="own")
        process = launch.start()
        said = launch.said(process)
        assert process.returncode == 0, said
        return launch.state()

    return state


def require_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, count: int) -> None:
    """Two processes to the last bit. Of more, DDP adds up gradients in an order that follows from its buckets, which it makes anew after
    the first step of every start, so that they differ by rounding."""
    assert state.keys() == expected.keys()
    largest = max(float((value.double() - expected[name].double()).abs().max()) for name, value in state.items())
    print(f"{count} processes: the largest difference to the undisturbed run is {largest:.1g}")
    assert largest == 0.0 if count == 2 else largest < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank", "status", "line"),
    [
        ("raise", 1, 1, "glpretrain: process 1: the disk of this process is gone"),
        ("raise", 0, 2, "glpretrain: error: the disk of this process is gone"),
        ("unreadable", 1, 1, "glpretrain: process 1: scenes: "),
        ("kill", 1, 1, "glpretrain: process 1 was killed by SIGKILL"),
        ("kill", 0, -signal.SIGKILL, ""),
        ("stop", 1, 1, "glpretrain: process 1 has given no sign of life for 15 seconds"),
        ("term", 1, 75, "glpretrain: stopped by a signal to another process after step 5"),
        ("term", -1, 75, "glpretrain: stopped by SIGTERM after step 5"),
    ],
)
@pytest.mark.parametrize("count", [2, 4])
def test_what_one_process_suffers_ends_all_and_the_same_command_goes_on(
    count: int, kind: str, rank: int, status: int, line: str, tmp_path: Path, undisturbed: State
) -> None:
    launch = Launch(tmp_path, count=count, launcher="own")
    process = launch.start(kind=kind, rank=rank)
    said = launch.said(process)
    assert launch.clock.exists(), said
    seconds = launch.seconds()
    print(f"{count} processes, {kind} in {rank}: all ended after {seconds:.1f} s")
    assert seconds < _LIMIT and process.returncode == status and line in said and "Traceback" not in said, said
    again = launch.said(launch.start(kind=kind, rank=rank))  # the fault has happened
    if kind != "unreadable" and (kind, rank) != ("kill", 0):  # before the first step, and of the process that would have saved it
        assert "goes on after step" in again, again
    require_equal(launch.state(), undisturbed(count), count=count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "status", "line"),
    [
        ("raise", 1, "glpretrain: process 1: the disk of this process is gone"),
        ("kill", 1, "glpretrain: process 1 was killed by SIGKILL"),
        ("term", 75, "glpretrain: stopped by a signal to another process after step 5"),
    ],
)
def test_what_one_process_suffers_ends_all_where_parameters_are_sharded(kind: str, status: int, line: str, tmp_path: Path) -> None:
    launch = Launch(tmp_path, count=2, launcher="own", strategy="fsdp2")
    process = launch.start(kind=kind, rank=1)
    said = launch.said(process)
    assert launch.clock.exists(), said
    assert launch.seconds() < _LIMIT and process.returncode == status and line in said and "Traceback" not in said, said
    again = launch.said(launch.start(kind=kind, rank=1))  # the fault has happened
    # After a failure not all parts of the state are there any more: the run goes on from the checkpoint before, and here there was none.
    assert ("goes on after step 5" if kind == "term" else "was interrupted before its first checkpoint; a new run starts") in again, again
    assert launch.state()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [("raise", 1), ("kill", 1), ("kill", 0), ("term", 1)])
def test_torchrun_starts_the_processes_again_and_the_run_goes_on(kind: str, rank: int, tmp_path: Path, undisturbed: State) -> None:
    launch = Launch(tmp_path, count=2, launcher="torchrun", restarts=1)
    process = launch.start(kind=kind, rank=rank)
    said = launch.said(process)
    assert process.returncode == 0, said
    require_equal(launch.state(), undisturbed(2), count=2)


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_all_and_the_same_command_goes_on(tmp_path: Path, undisturbed: State) -> None:
    launch = Launch(tmp_path, count=2, launcher="torchrun")
    process = launch.start(kind="raise", rank=-2)
    checkpoints = tmp_path / "runs" / "dino"
    until = time.monotonic() + 600.0
    while not any(checkpoints.glob("*/views.png")) and time.monotonic() < until:  # made in the first step
        time.sleep(0.05)
    process.terminate()
    launch.clock.write_text(str(time.time()))
    said = launch.said(process)
    assert launch.seconds() < _LIMIT, said
    launch.said(launch.start())
    require_equal(launch.state(), undisturbed(2), count=2)


def test_a_process_learns_why_another_has_ended(tmp_path: Path) -> None:
    server, known = serve("127.0.0.1"), threading.Event()
    first = Watch(server, rank=0, world_size=2, on_failure=lambda line: known.set(), patience=60.0)
    other = Watch(connect("127.0.0.1", server.port), rank=1, world_size=2, on_failure=lambda line: None, patience=60.0)
    assert other.tell("process 1: no disk") == "process 1: no disk"
    assert known.wait(20.0) and first.failure == "process 1: no disk"
    assert first.tell("process 0: too late") == "process 1: no disk"  # the first one counts
    first.close()
    other.close()


def test_a_process_without_signs_of_life_is_missed(tmp_path: Path) -> None:
    server, known = serve("127.0.0.1"), threading.Event()
    first = Watch(server, rank=0, world_size=2, on_failure=lambda line: known.set(), patience=0.2)
    assert known.wait(20.0) and first.failure.startswith("process 1 has given no sign of life for 0 seconds")


def test_processes_that_leave_are_not_missed(tmp_path: Path) -> None:
    server = serve("127.0.0.1")
    watches = [Watch(server.clone(), rank=rank, world_size=2, on_failure=lambda line: None, patience=0.2) for rank in (1, 0)]
    leaving = [threading.Thread(target=watch.leave) for watch in watches]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join(20.0)
    assert not any(thread.is_alive() for thread in leaving) and not any(watch.failure for watch in watches)
