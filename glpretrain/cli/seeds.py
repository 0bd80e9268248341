"""`glpretrain pretrain RECIPE --seeds 0,1,2`: a run per seed, one after the other, each in a process of its own, and their table.

The training of one seed is left out (`training`), and so is which run a seed goes on with or need not train again (`resume`).
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from glpretrain.cli.comparing import show
from glpretrain.cli.resume import AMONG_SEEDS
from glpretrain.cli.trust import read_yaml
from glpretrain.compare import headlines, read_record, rows_of

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_STOPPED = (75, 130)  # exit statuses of a run that a signal has ended and that goes on
_MISTAKE = 2
_SET_BY_SEEDS = ("--seed_everything", "--ckpt_path")
_ALREADY_SEVERAL = ("LOCAL_RANK", "SLURM_PROCID")  # environment of processes that a launcher has started


def seeds_of(text: str) -> list[int]:
    """The seeds in `0,1,2`.

    Raises:
        ValueError: it is something else, or names a seed twice.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise ValueError(f"seeds: {text!r}; accepted: different whole numbers with commas between, such as 0,1,2")
    return [int(word) for word in words]


def train_seeds(seeds: Sequence[int], arguments: Sequence[str]) -> int:
    """Train once per seed, and print the table of the runs.

    A signal ends the run at hand with a checkpoint, and all of it; the same command goes on. A mistake in the settings, which every seed
    would meet, ends all of it; after any other failure the next seed starts.

    Args:
        seeds: the seeds.
        arguments: of `glpretrain fit`.

    Returns:
        Exit status: 0, 1 where a seed has failed, 2 after a mistake, 75 or 130 after a signal.

    Raises:
        ValueError: a seed is set besides, or a launcher has started several processes.
    """
    for word in arguments:
        if word.partition("=")[0] in _SET_BY_SEEDS:
            raise ValueError(f"seeds: {word.partition('=')[0]} is given too; accepted: one of them, since every seed is a run of its own")
    if any(name in os.environ for name in _ALREADY_SEVERAL):
        raise ValueError("seeds: a launcher has started this process; accepted: --seed_everything and a job per seed, or no launcher")
    folders: list[Path] = []
    failed: list[int] = []
    with _forwarded() as running, tempfile.TemporaryDirectory(prefix="glpretrain-") as scratch:
        for place, seed in enumerate(seeds, start=1):
            print(f"seed {seed} ({place} of {len(seeds)})", flush=True)
            answer = Path(scratch) / str(seed)
            status = running.run([*arguments, "--seed_everything", str(seed)], answer=answer)
            if answer.is_file():
                folders.append(Path(answer.read_text()))
            elif status in _STOPPED:
                left = ", ".join(map(str, seeds[place - 1 :]))
                print(f"seeds: stopped in seed {seed}; the same command goes on, with {left} left", file=sys.stderr)
                return status
            elif status == _MISTAKE:
                return status
            else:
                failed.append(seed)
                print(f"seeds: seed {seed} has failed with exit status {status}; its lines are above", file=sys.stderr, flush=True)
    if folders:
        rows, _ = rows_of([read_record(folder, settings=read_yaml) for folder in folders])
        show(rows, headlines([record for row in rows for record in row.records]))
        print(f"as a page: glpretrain compare {' '.join(map(str, folders))} --out page.html")
    if failed:
        print(f"seeds: failed: {', '.join(map(str, failed))}; the same command trains them again", file=sys.stderr)
    return 1 if failed else 0


class _Running:
    """The run at hand, a process that gets no signals from a terminal: they come through this one, once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._stopped = 0  # number of a signal that came

    def run(self, arguments: Sequence[str], *, answer: Path) -> int:
        """Train, and wait.

        Args:
            arguments: of `glpretrain fit`.
            answer: path of a file that the process writes the folder of its finished run to.

        Returns:
            Its exit status.
        """
        if self._stopped:
            return 130 if self._stopped == signal.SIGINT else 75
        command = [sys.executable, "-m", "glpretrain.cli", "fit", *arguments]
        with subprocess.Popen(command, env=os.environ | {AMONG_SEEDS: str(answer)}, start_new_session=True) as self._process:
            if self._stopped:  # it came while the process was made
                self._process.send_signal(self._stopped)
            return self._process.wait()

    def note(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal on."""
        self._stopped = number
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


@contextmanager
def _forwarded() -> Iterator[_Running]:
    running = _Running()
    before = {number: signal.signal(number, running.note) for number in _SIGNALS}
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
