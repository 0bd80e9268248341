"""The processes of a run that share one machine: which they are, what they tell one another, and how many cores each may take.

Left out: collectives (`distributed`), which give up where processes come at different times.
"""

import json
import os
import platform
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from glpretrain.core.distributed import rank, world_size
from glpretrain.core.mailbox import exchanged

_BOOT, _PIDS = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"


class Node(NamedTuple):
    """The processes of a run on this machine, or in this container."""

    ranks: tuple[int, ...]
    cores: int  # that are this process's own: cores that several processes may run on are divided among them
    name: str  # of the run and this moment

    @classmethod
    def alone(cls) -> "Node":
        """This process without the others."""
        return cls((rank(),), usable_cores(), "")

    @classmethod
    def of_run(cls, name: str) -> "Node":
        """The processes of the run that are here. All processes of the run have to call this.

        Args:
            name: name of this call, which no other call of the run has, and which is the same in all processes.
        """
        own = json.dumps([_machine(), sorted(os.sched_getaffinity(0))])
        found = [json.loads(told) for told in exchanged(f"{name} node", own, ranks=range(world_size()))]
        ranks = tuple(number for number, (machine, _) in enumerate(found) if machine == _machine())
        users = Counter(core for number in ranks for core in found[number][1])
        return cls(ranks, max(1, int(sum(1 / users[core] for core in found[rank()][1]) + 1e-6)), name)

    @property
    def place(self) -> int:
        """Place of this process among `ranks`."""
        return self.ranks.index(rank())

    def told(self, what: str, value: str) -> list[str]:
        """What each of these processes tells, in the order of their ranks. Waits for all of them, however long that takes.

        Args:
            what: name of what is told, once for every name.
            value: what this process tells.
        """
        return [value] if len(self.ranks) == 1 else exchanged(f"{self.name} {what}", value, ranks=self.ranks)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _machine() -> str:
    """What processes have in common that can open each other's memory: the kernel, and the names of processes."""
    try:
        return f"{_BOOT.read_text().strip()} {os.readlink(_PIDS)}"
    except OSError:  # some containers do not say; whether they can is found out when they try
        return platform.node()
