"""Processes that run tasks, and the outcome of each task: on this machine, or on many.

Whatever runs them, a process that dies costs its task once more and nothing else: the task runs again, and fails only when its process dies
again. So a task writes files that are complete or absent, and may write them twice. Left out: the tasks (`slides`, `faces`).
"""

import os
from collections.abc import Sequence

from glpretrain.prepare.workers.base import Executor, Outcome, Task
from glpretrain.prepare.workers.cluster import Cluster
from glpretrain.prepare.workers.local import Workers

__all__ = ["Cluster", "Executor", "Outcome", "Task", "Workers", "executor"]

_MOST_WORKERS = 8  # more than a disk keeps busy, unless somebody says so


def executor(workers: int | None, *, cluster: str | None, preload: Sequence[str]) -> Executor:
    """What runs tasks as the command line asks for it: processes of this machine, or a cluster.

    Args:
        workers: number of processes, or of SLURM jobs; None for one per core, at most 8, or for what a cluster has.
        cluster: see `Cluster`; None for this machine.
        preload: modules that every process of this machine needs.

    Raises:
        ImportError, ValueError: see `Cluster`.
    """
    if cluster is not None:
        return Cluster(cluster, jobs=workers)
    return Workers(min(len(os.sched_getaffinity(0)), _MOST_WORKERS) if workers is None else workers, preload=preload)
