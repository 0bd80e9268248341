"""What runs the tasks: a worker that dies costs its tasks once more and nothing else, on this machine and on a Dask cluster."""

import os
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import dask
import distributed
import pytest
from PIL import Image
from skimage.data import astronaut
from tiles_processes import Job, contents, end_process, wait_until
from torch import Tensor

from glpretrain.cli import main
from glpretrain.prepare.faces import Preparation, TemplateParser
from glpretrain.prepare.faces.detection import FaceDetector
from glpretrain.prepare.faces.parsers import Box
from glpretrain.prepare.slides import Settings, cut_slides
from glpretrain.prepare.slides.synthetic import write_synthetic_slide
from glpretrain.prepare.workers import Cluster, Executor, Workers, executor

SMALL = Settings(size=64, format="png", per_shard=16)


@contextmanager
def dask_cluster() -> Iterator["distributed.LocalCluster"]:
    """A scheduler and two workers, each a process with one thread; one that is killed is started anew."""
    quiet = {"distributed.scheduler.allowed-failures": 1, "distributed.worker.memory.terminate": False}
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    with dask.config.set(quiet), distributed.LocalCluster(**options) as cluster:
        yield cluster


@contextmanager
def two_workers(kind: str) -> Iterator[Executor]:
    if kind == "local":
        with Workers(2) as workers:
            yield workers
    else:
        with dask_cluster() as cluster, Cluster(cluster.scheduler_address) as workers:
            yield workers


@pytest.mark.parametrize("kind", ["local", pytest.param("dask", marks=pytest.mark.slow)])
def test_a_worker_that_dies_costs_its_task_once_more_and_nothing_else(kind: str, tmp_path: Path) -> None:
    with two_workers(kind) as workers:
        for number in range(7):
            workers.submit(Job(number, tmp_path))
        found = {}
        for task, result in workers.outcomes():
            assert isinstance(task, Job) and task.number not in found
            found[task.number] = result
            if task.number == 0:
                workers.submit(Job(7, tmp_path))
    assert [found[number] for number in (0, 1, 4, 5, 6, 7)] == [0, 10, 40, 50, 60, 70]  # 4 killed its worker the first time
    assert isinstance(found[2], ValueError) and isinstance(found[3], ValueError) and str(found[3]) == "three"
    assert "worked on it ended" in str(found[2])
    ran = Counter(path.name.partition("-")[0] for path in tmp_path.iterdir())
    if kind == "local":
        assert [ran[str(number)] for number in range(8)] == [1, 1, 2, 1, 2, 1, 1, 1]
    else:  # Dask blames what a dying worker held, whether it had begun or not
        assert ran["2"] >= 2 and ran["4"] >= 2


def test_a_task_that_was_withdrawn_never_runs(tmp_path: Path) -> None:
    with Workers(1) as workers:
        tasks = [Job(number, tmp_path) for number in (0, 1)]
        for task in tasks:
            workers.submit(task)
        workers.withdraw([tasks[1]])
        assert [outcome.task.number for outcome in workers.outcomes()] == [0]


@pytest.mark.slow
def test_tiles_and_faces_of_a_cluster_are_those_of_one_machine_though_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = tmp_path / "slides" / "a.tif"
    slide.parent.mkdir()
    write_synthetic_slide(slide, width=1500, height=1200, seed=1)
    cut_slides([slide], out=tmp_path / "tiles_here", settings=SMALL)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(20):
        Image.fromarray(astronaut()[:300, 100:400]).save(pictures / f"{number:02}.png")
    (pictures / "bad.png").write_bytes(b"no picture")
    assert main(["faces", str(pictures), "--out", str(tmp_path / "faces_here"), "--size", "64", "--workers", "1"]) == 0

    monkeypatch.chdir(tmp_path)  # relative paths, which the workers could not read
    with dask_cluster() as cluster:
        at = ["--size", "64", "--cluster", cluster.scheduler_address]
        with killing_one(cluster, once=lambda: list(tmp_path.glob("tiles_there/shards/*.tar"))):
            assert main(["tiles", "slides", "--out", "tiles_there", "--format", "png", "--per_shard", "16", *at]) == 0
        with killing_one(cluster, once=lambda: list(tmp_path.glob("faces_there/images/*.png"))):
            assert main(["faces", "pictures", "--out", "faces_there", *at]) == 0
    for made in ("tiles", "faces"):
        assert relative(tmp_path / f"{made}_there") == relative(tmp_path / f"{made}_here")


class FatalDetector(FaceDetector):
    """Takes a picture as a whole for a face, and ends the process at one that is black."""

    def detect(self, image: Tensor) -> Box | None:
        if not image.any():
            end_process()
        return Box(0, 0, *image.shape[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "dask"])
def test_a_picture_that_ends_its_process_costs_no_other_picture(kind: str, tmp_path: Path) -> None:
    for number in range(5):
        Image.fromarray(astronaut()[:40, :40] * (number != 2)).save(tmp_path / f"{number}.png")
    with dask_cluster() if kind == "dask" else nullcontext() as cluster:
        where = {"workers": 2} if cluster is None else {"cluster": cluster.scheduler_address}
        run = Preparation(tmp_path, tmp_path / "out", parser=TemplateParser(), detector=FatalDetector(), size=32, **where).run()
        outcomes = list(run)
    assert [outcome.name.name for outcome in outcomes] == [f"{number}.png" for number in range(5)]
    assert [bool(outcome.reason) for outcome in outcomes] == [False, False, True, False, False]
    assert re.search(r"2\.png: the process(es)? that worked on it ended", outcomes[2].reason)
    assert len(list((tmp_path / "out/images").iterdir())) == 4


def relative(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; what was skipped is named as it was given."""
    found = contents(folder)
    return {name: data.replace(str(folder.parent).encode() + b"/", b"") for name, data in found.items()}


@contextmanager
def killing_one(cluster: "distributed.LocalCluster", *, once: Callable[[], object]) -> Iterator[None]:
    """Kill a worker of the cluster as soon as something is there, and see that it was one of those that work."""
    before = {nanny.pid for nanny in cluster.workers.values()}
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: bool(once()))
        killed.append(min(before))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield
    thread.join()
    wait_until(lambda: len(after := {nanny.pid for nanny in cluster.workers.values()} - {None}) == 2 and killed[0] not in after)


def test_a_run_that_is_refused_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for where, jobs, said in (
        ("slurm", None, "workers: None given with cluster slurm; accepted: 1 or more jobs with cluster slurm, none with a scheduler"),
        ("tcp://127.0.0.1:8786", 3, "workers: 3 given with cluster tcp"),
        (
            "nowhere.json",
            None,
            "cluster: nowhere.json given; accepted: tcp://HOST:PORT of a Dask scheduler, the file that it wrote, or slurm",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            executor(jobs, cluster=where, preload=[])
    monkeypatch.setattr("glpretrain.prepare.workers.cluster.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape("cluster: Dask is not installed (pip install 'glpretrain[cluster]')")):
        executor(None, cluster="tcp://127.0.0.1:8786", preload=[])
    with pytest.raises(ValueError, match="workers: 0; accepted: at least 1 process"):
        Workers(0)


def test_a_scheduler_that_does_not_answer_is_named() -> None:
    with dask.config.set({"distributed.comm.timeouts.connect": "200ms"}), closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        where = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"cluster: no Dask scheduler answers at {where}"):
            Cluster(where)
