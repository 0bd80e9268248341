"""What this machine can do at most: the measured speed of one large product of matrices, of which a step reaches a share; and
what its allocator gives to a step.

Left out: what a step takes (`callbacks.cost`).
"""

import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_SIDES = {"cpu": 2048}  # rows and columns of the matrices
_SIDE = 8192  # on any other device
_REPEATS = 6
_MEMORY, _AGAIN = "[memory]", "again"  # names of events in torch's profiler: of an allocator, and our own
_CPUINFO = Path("/proc/cpuinfo")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few products of square matrices, with the threads and the settings of the run.

    Args:
        device: device that computes.
        dtype: type of the numbers.
    """
    side = _SIDES.get(device.type, _SIDE)
    matrix = torch.sin(torch.arange(side * side, device=device).remainder_(1013)).view(side, side).to(dtype)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best


def taken_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator holds during an action, beyond what it held before; on a CPU, of the second one of two.

    Args:
        action: what is done, and can be done again.
        device: device that the allocator serves.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts what a CPU's allocator gives, says what it does
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()  # what it leaves to be freed by the next one would not be known otherwise
        with record_function(_AGAIN):
            action()
    results = None if profiler.profiler is None else profiler.profiler.kineto_results
    assert results is not None
    events = sorted(results.events(), key=lambda event: event.start_ns())
    names = [event.name() for event in events]
    now = peak = 0
    for event in events[names.index(_AGAIN) :]:
        if event.name() == _MEMORY:
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  its stub
            peak = max(peak, now)
    return peak


def machine_name(device: torch.device) -> str:
    """The device in words: its model, and of a CPU the threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", _CPUINFO.read_text()) if _CPUINFO.exists() else None
    model = found[1].strip() if found else platform.processor() or platform.machine()
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    return f"{model}, {threads} thread{'s' if threads > 1 else ''} of {cores} core{'s' if cores > 1 else ''}"
