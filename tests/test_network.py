"""The guard in conftest.py: a test that asks for another machine fails, and one that talks to itself does not."""

import socket
import threading

import pytest


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid"])
def test_another_machine_is_refused_and_noted(no_network: list[object], host: str) -> None:
    with pytest.raises(OSError, match="tests run without a network"):
        socket.create_connection((host, 9), timeout=1)
    assert no_network == [host]
    no_network.clear()  # or this test would fail, as every other one should


def test_this_machine_can_be_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        with socket.create_connection(("localhost", server.getsockname()[1]), timeout=10) as connection:
            assert connection.recv(1) == b""
        thread.join()
