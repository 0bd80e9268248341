"""Processes that end together: one that fails says so, one that is killed is missed, and each of the others learns of it within seconds.

A collective waits for all processes, for half an hour or for ever, so a process must not learn of the end of another from a collective.
Left out: how the processes of a training run leave (`glpretrain.callbacks.together`).
"""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from subprocess import Popen

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  its public home

_FAILURE, _BEATS, _LEFT, _FOLLOWED = "failure", "beats", "left", "followed"  # keys of the store
_PERIOD = 1.0  # seconds between two signs of life
_UNTIL_LEFT, _UNTIL_FOLLOWED = 20.0, 4.0  # seconds that the others wait for the first process, and it for them
_ANSWER = timedelta(seconds=10)  # after which a store that does not answer is gone


def serve(host: str) -> TCPStore:
    """A store for all processes, served by this one under a free port."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def connect(host: str, port: int) -> TCPStore:
    """The store that the first process serves."""
    return TCPStore(host, port, is_master=False)


class Watch:
    """A thread of each process that gives signs of life, and learns why another process has ended.

    Args:
        store: a client of a store that the first process serves.
        rank: number of this process.
        world_size: number of processes.
        on_failure: called in the thread, once, with a line that says why another process has ended.
        patience: seconds without a sign of life after which a process counts as lost.
        children: the processes 1, 2, ... where this process has started them; their ends are seen at once.
    """

    def __init__(
        self,
        store: TCPStore,
        *,
        rank: int,
        world_size: int,
        on_failure: Callable[[str], None],
        patience: float,
        children: Sequence[Popen] = (),
    ) -> None:
        self.rank, self.world_size, self.patience = rank, world_size, patience
        self.failure = ""  # why a process has ended, the same line in all of them; empty as long as none has
        self._store, self._children, self._on_failure = store, children, on_failure
        self._known = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(store.clone(),), daemon=True, name="watch")
        self._thread.start()

    def tell(self, line: str) -> str:
        """Say why this process ends.

        Returns:
            Why the first one of the processes has ended; `line` itself if that is this one.
        """
        if not self.failure:
            try:
                self._store.set_timeout(_ANSWER)
                self.failure = self._store.compare_set(_FAILURE, "", line).decode()
            except RuntimeError:
                self.failure = self._without_store()
        self._known.set()
        return self.failure

    def wait(self, *, seconds: float) -> str:
        """Why another process has ended, as soon as it is known; empty if it is not known after so many seconds."""
        self._known.wait(seconds)
        return self.failure

    def leave(self) -> None:
        """Called last by a process that ends.

        The others stay until the first process has put everything in order, and it stays until they know.
        """
        self.close()
        until = time.monotonic() + (_UNTIL_FOLLOWED if self.rank == 0 else _UNTIL_LEFT)
        try:
            self._store.set_timeout(_ANSWER)
            if self.rank == 0:
                self._store.set(_LEFT, "")
                while self._store.add(_FOLLOWED, 0) < self.world_size - 1 and time.monotonic() < until:
                    time.sleep(0.05)
                return
            while not self._store.check([_LEFT]) and time.monotonic() < until:
                time.sleep(0.05)
            self._store.add(_FOLLOWED, 1)
        except RuntimeError:  # the first process is gone
            return

    def close(self) -> None:
        """Stop watching: from here on nobody is missed."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(2 * _PERIOD)

    def _run(self, store: TCPStore) -> None:
        store.set_timeout(_ANSWER)
        seen = {rank: (0, time.monotonic()) for rank in range(1, self.world_size)}
        while not self._closed.wait(_PERIOD):
            try:
                store.add(f"{_BEATS}/{self.rank}", 1)
                if self.rank == 0 and (lost := self._lost(store, seen)):
                    store.compare_set(_FAILURE, "", lost)
                if store.check([_FAILURE]):
                    self.failure = self.failure or store.get(_FAILURE).decode()
            except RuntimeError:
                self.failure = self.failure or self._without_store()
            if self.failure:
                is_own = self._known.is_set()
                self._known.set()
                if not is_own and not self._closed.is_set():
                    self._on_failure(self.failure)
                return

    def _lost(self, store: TCPStore, seen: dict[int, tuple[int, float]]) -> str:
        """Which process is gone; empty if none is."""
        for rank, child in enumerate(self._children, 1):
            if (code := child.poll()) is not None and code != 0:
                return f"process {rank} {f'was killed by {signal.Signals(-code).name}' if code < 0 else f'has ended with status {code}'}"
        now = time.monotonic()
        for rank, (beats, since) in seen.items():
            if (current := store.add(f"{_BEATS}/{rank}", 0)) != beats:
                seen[rank] = current, now
            elif now - since > self.patience:
                silence = f"process {rank} has given no sign of life for {self.patience:.0f} seconds"
                return f"{silence}: it was killed, or it hangs, or its machine has failed"
        return ""

    def _without_store(self) -> str:
        return "process 0 has ended, or cannot be reached"
