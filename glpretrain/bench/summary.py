"""The numbers of a benchmark, from the steps that were measured: medians, shares, speed, and whether the run waits for its data.

Left out: how steps are measured (`callbacks.cost`), and tables and pictures (`cli`, `bench.figures`).
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_STARVES = 0.1  # share of the time that a run waits for data from which on it is told what to do


class Part(NamedTuple):
    """A part of the steps."""

    name: str
    milliseconds: float  # median over the steps
    share: float  # of the time of all steps


class Costs(NamedTuple):
    """What the steps of a recipe cost on a machine."""

    recipe: str
    machine: str
    precision: str
    items: int  # of a step, over all processes
    num_workers: int  # processes that prepare data
    parts: list[Part]
    step_milliseconds: float  # median; the medians of the parts need not add up to it
    items_per_second: float  # over all measured steps
    peak_bytes: int
    peak_of: str  # what `peak_bytes` counts
    flops: int  # of a step
    machine_flops: float  # per second, of one large product of matrices in the precision of the run
    wait: float  # share of the time in which the step waits for data
    read_milliseconds: float  # in which one worker reads and decodes the items of a batch; median
    cut_milliseconds: float  # in which it cuts their views
    start_seconds: float  # from the construction of the run, whose source lists its files, until the first batch

    @property
    def flops_share(self) -> float:
        """The FLOPs of a step per second, over the machine's."""
        return self.flops / (self.step_milliseconds / 1e3) / self.machine_flops

    @property
    def starvation(self) -> str:
        """Whether the run waits for its data, in a line."""
        line = f"waits for data: {self.wait:.0%} of the time"
        if self.num_workers == 0:
            return f"{line} (no worker: this process prepares the data itself)"
        workers = f"{self.num_workers} worker{'s' if self.num_workers > 1 else ''}"
        if self.wait < _STARVES:
            return f"{line} (with {workers})"
        return f"{line}: it starves with {workers}; give more (data.num_workers), smaller files, or data.cache"

    @property
    def preparation(self) -> str:
        """What a batch costs before it comes to the step, in a line."""
        return (
            f"a batch takes a worker {self.read_milliseconds:.1f} ms to read and decode and {self.cut_milliseconds:.1f} ms to cut"
            f" views and draw masks; the first one came after {self.start_seconds:.1f} s"
        )

    def to_json(self) -> dict[str, object]:
        """Everything, for scripts."""
        own = {name: value for name, value in self._asdict().items() if name != "parts"}
        parts = {part.name: {"milliseconds": part.milliseconds, "share": part.share} for part in self.parts}
        return {**own, "flops_share": self.flops_share, "parts": parts}


def parts_of(steps: Sequence[Mapping[str, float]]) -> list[Part]:
    """The parts that took any time.

    Args:
        steps: milliseconds of every part, of every step.
    """
    total = sum(sum(step.values()) for step in steps)
    found = [Part(name, statistics.median(step[name] for step in steps), sum(step[name] for step in steps) / total) for name in steps[0]]
    return [part for part in found if part.share > 0.0]
