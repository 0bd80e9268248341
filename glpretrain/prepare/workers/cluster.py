"""The workers of a Dask cluster: one that runs already, or SLURM jobs that are started for the run.

Dask gives the tasks of a worker that died to others. When workers die again it blames all tasks that they held, so a task that is blamed
runs once more beside no other such task, and fails if it is blamed again. The folders that
tasks read and write lie on a file system that all machines share, under the same paths, and the same version of this package is installed
there. Left out: starting a cluster in other ways; Dask has launchers for Kubernetes, SSH and clouds, and each of them ends in an address.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from glpretrain.prepare.workers.base import Executor, Outcome, Task, result_of

if TYPE_CHECKING:
    from dask_jobqueue.slurm import SLURMCluster
    from distributed import Client, Future

SLURM = "slurm"
_LOG = logging.getLogger(__name__)
_AHEAD = 2  # tasks for each thread of the workers: while one runs, the next is there
_GLANCE = 5.0  # seconds after which the number of workers is asked for anew
_PATIENCE = 30.0  # seconds without a worker, after which it is said that there is none


class Cluster(Executor):
    """Workers on other machines. More may come and some may go while tasks run.

    Args:
        where: address of a Dask scheduler (`tcp://host:8786`), the file that it writes (`dask scheduler --scheduler-file F.json`), or
            `slurm`: jobs as `jobqueue.yaml` in ~/.config/dask describes them.
        jobs: number of SLURM jobs; None for a scheduler that runs already, which has workers of its own.

    Raises:
        ImportError: Dask is not installed.
        ValueError: no scheduler answers, there is no such file, SLURM jobs are not described, or `jobs` does not go with `where`.
    """

    def __init__(self, where: str, *, jobs: int | None = None) -> None:
        super().__init__()
        if (where == SLURM) != (jobs is not None) or (jobs is not None and jobs < 1):
            raise ValueError(
                f"workers: {jobs} given with cluster {where}; accepted: 1 or more jobs with cluster slurm, none with a scheduler that runs"
            )
        if find_spec("distributed") is None or (where == SLURM and find_spec("dask_jobqueue") is None):
            raise ImportError("cluster: Dask is not installed (pip install 'glpretrain[cluster]')")
        self.where = where
        self._slurm: SLURMCluster | None = None if jobs is None else _slurm_jobs(jobs)
        self._client = _client(where, self._slurm)
        self._busy: dict[Future, Task] = {}
        self._suspects: deque[Task] = deque()  # those that are to run once more
        self._blamed: list[Task] = []  # those that did, or will
        self._slots, self._asked = 0, -_GLANCE

    def __exit__(self, *raised: object) -> None:
        self._client.cancel(list(self._busy))
        self._client.close()
        if self._slurm is not None:
            self._slurm.close()

    def _capacity(self) -> int:
        """Tasks that may be under way at once."""
        if time.monotonic() - self._asked >= _GLANCE:
            threads = self._client.nthreads()
            self._slots, self._asked = sum(threads.values()), time.monotonic()  # pyright: ignore[reportAttributeAccessIssue]  no coroutine
        return _AHEAD * max(1, self._slots)

    @property
    def has_room(self) -> bool:
        """Whether another task would start soon."""
        return self._num_open() < self._capacity()

    def _num_open(self) -> int:
        return len(self._waiting) + len(self._suspects) + len(self._busy)

    def _is_blamed(self, task: Task) -> bool:
        return any(task is one for one in self._blamed)

    def _hand_over(self) -> None:
        """Give tasks to Dask: as many as it can take, and of those that are blamed one at a time."""
        if self._suspects and not any(map(self._is_blamed, self._busy.values())):
            self._begin(self._suspects.popleft())
        while self._waiting and len(self._busy) < self._capacity():
            self._begin(self._waiting.popleft())

    def _begin(self, task: Task) -> None:
        self._busy[self._client.submit(result_of, task, pure=False)] = task

    def withdraw(self, tasks: Sequence[Task]) -> None:
        """Drop those of these tasks that have not started."""
        super().withdraw(tasks)
        self._suspects = deque(task for task in self._suspects if not any(task is one for one in tasks))

    def outcomes(self) -> Iterator[Outcome]:
        """Outcomes of all tasks, until none is left. More tasks may be submitted meanwhile.

        Raises:
            ValueError: the scheduler is gone.
        """
        from distributed import KilledWorker, wait

        since = time.monotonic()  # when there was a worker, or an outcome
        while self._num_open() > 0:
            self._hand_over()
            try:
                ended = wait(list(self._busy), timeout=_GLANCE, return_when="FIRST_COMPLETED")
            except TimeoutError:
                self._capacity()
                since = time.monotonic() if self._slots else since
                if time.monotonic() - since > _PATIENCE:
                    _LOG.warning("cluster: %s has no worker yet; %d tasks wait", self.where, self._num_open())
                    since = time.monotonic()
                continue
            except CancelledError as error:
                raise ValueError(
                    f"cluster: the scheduler of {self.where} is gone; the same command goes on where this one stopped"
                ) from error
            since = time.monotonic()
            for future in ended.done:  # pyright: ignore[reportAttributeAccessIssue]  no coroutine
                task = self._busy.pop(future)
                try:
                    result = future.result()
                except KilledWorker as error:
                    if not self._is_blamed(task):
                        self._blamed.append(task)
                        self._suspects.append(task)
                        continue
                    result = ValueError(f"the processes that worked on it ended, the last of them {error.last_worker.address}")
                self._blamed = [one for one in self._blamed if one is not task]
                yield Outcome(task, result)


def _slurm_jobs(count: int) -> "SLURMCluster":
    import dask.config
    from dask_jobqueue.slurm import SLURMCluster

    dask.config.set({"distributed.scheduler.allowed-failures": 1})  # a task whose worker died runs once more, as on one machine
    try:
        jobs = SLURMCluster()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"cluster: slurm: {error}; describe a job in ~/.config/dask/jobqueue.yaml (jobqueue: {{slurm: {{cores: 8, processes: 8,"
            " memory: 32GB, walltime: '04:00:00'}})"
        ) from error
    jobs.scale(jobs=count)
    return jobs


def _client(where: str, slurm: "SLURMCluster | None") -> "Client":
    from distributed import Client

    if slurm is not None:
        return Client(slurm)
    if "://" not in where and not Path(where).is_file():
        raise ValueError(f"cluster: {where} given; accepted: tcp://HOST:PORT of a Dask scheduler, the file that it wrote, or slurm")
    try:
        return Client(where) if "://" in where else Client(scheduler_file=where)
    except (OSError, TimeoutError, ValueError) as error:
        raise ValueError(
            f"cluster: no Dask scheduler answers at {where} ({type(error).__name__}); start one with `dask scheduler`"
        ) from error
