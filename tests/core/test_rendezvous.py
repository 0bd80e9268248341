"""Processes of torchrun find one another, and not those that were there before them."""

import threading

import pytest
from torch.distributed import TCPStore

from glpretrain.core.rendezvous import meet_anew, new_store


def meet(agent: TCPStore, *, ranks: tuple[int, ...], world_size: int) -> dict[int, TCPStore]:
    found: dict[int, TCPStore] = {}

    def one(rank: int) -> None:
        client = TCPStore("127.0.0.1", agent.port, is_master=False)
        found[rank] = new_store(client, host="127.0.0.1", rank=rank, world_size=world_size)

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    return found


def test_processes_that_are_started_again_meet_in_a_new_store() -> None:
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ports = []
    for _ in range(2):
        found = meet(agent, ranks=(1, 2, 0), world_size=3)
        assert len({store.port for store in found.values()}) == 1
        found[0].set("key", "value")
        assert found[2].get("key") == b"value"
        assert not found[1].check(["asks/1"])
        ports.append(found[0].port)
    assert ports[0] != ports[1]


def test_without_torchrun_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert meet_anew(rank=0, world_size=2) is None
