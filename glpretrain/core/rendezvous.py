"""Where the processes of torchrun meet: in a store of their own, which holds nothing of processes that are gone.

torchrun keeps one store for all of its restarts, and torch no longer tells the restarts apart in it: torch/distributed/rendezvous.py says
in `_create_c10d_store` that a new store is created for every retry, but the agent keeps its store. So a process that is started again may
find the address of a process that has ended, and then all of them wait for half an hour. Left out: the group itself, which torch makes.
"""

import os
import threading
import time
import uuid

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  their public home

_PREFIX = "glpretrain"
_PERIOD = 0.05  # seconds between two looks for processes that ask


def meet_anew(*, rank: int, world_size: int) -> TCPStore | None:
    """Make torch form its group in a new store, where torchrun would hand it the store of its agent.

    Args:
        rank: number of this process.
        world_size: number of processes.

    Returns:
        The new store, which ends when the first process lets go of it; None where torchrun has not started the processes.

    Raises:
        RuntimeError: torchrun's store does not answer, or the first process does not.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or world_size == 1:
        return None
    host = os.environ["MASTER_ADDR"]
    store = new_store(TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False), host=host, rank=rank, world_size=world_size)
    os.environ |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return store


def new_store(old: TCPStore, *, host: str, rank: int, world_size: int) -> TCPStore:
    """A store that the first process serves, found by way of a store that may hold the keys of earlier processes.

    Each of the others asks under a name that was never used before, so it cannot take an old answer for its own.

    Args:
        old: a store that all processes reach.
        host: where the first process runs.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        RuntimeError: a store does not answer, or the first process does not.
    """
    known = PrefixStore(_PREFIX, old)
    if rank == 0:
        served = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)  # torch's own takes the same one
        threading.Thread(target=_answer, args=(known, served.clone(), served.port, world_size), daemon=True, name="rendezvous").start()
        return served
    name = uuid.uuid4().hex
    known.set(f"asks/{rank}", name)
    found = TCPStore(host, int(known.get(f"answers/{name}")), is_master=False)
    found.add("arrived", 1)
    return found


def _answer(known: PrefixStore, served: TCPStore, port: int, world_size: int) -> None:
    """Tell all processes that ask, also those that are gone, where the store is, until all others have arrived there."""
    answered: set[bytes] = set()
    try:
        while served.add("arrived", 0) < world_size - 1:
            for rank in range(1, world_size):
                if known.check([f"asks/{rank}"]) and (name := known.get(f"asks/{rank}")) not in answered:
                    answered.add(name)
                    known.set(f"answers/{name.decode()}", str(port))
            time.sleep(_PERIOD)
    except RuntimeError:  # a store has ended, and the run with it
        return
