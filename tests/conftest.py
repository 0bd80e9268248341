"""Being here, this file lets tests in any folder import the helpers of this one (`golden`). What every test is kept from is here too."""

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Features that a test keeps on disk lie in a folder of its own, not in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """A test that asks for another machine fails, also where the code under test swallows the refusal."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes that a test starts
    asked: list[object] = []

    def is_here(host: object) -> bool:
        if host is None or host in ("", b"", "localhost", b"localhost", socket.gethostname()):
            return True
        try:
            return ipaddress.ip_address(host if isinstance(host, str) else bytes(host).decode()).is_loopback
        except (TypeError, ValueError):  # a name
            return False

    def guarded(name: str, own: object) -> None:
        real = getattr(own, name)

        def refuse_others(*arguments: object, **options: object) -> object:
            host = arguments[0]
            if isinstance(host, socket.socket):
                address = arguments[1]
                host = address[0] if host.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple) else None
            if not is_here(host):
                asked.append(host)
                raise ConnectionRefusedError(f"a test asked for {host}; tests run without a network")
            return real(*arguments, **options)

        monkeypatch.setattr(own, name, refuse_others)

    guarded("getaddrinfo", socket)
    for name in ("connect", "connect_ex"):
        guarded(name, socket.socket)
    yield asked
    assert not asked, f"asked for {asked}; tests run without a network"
