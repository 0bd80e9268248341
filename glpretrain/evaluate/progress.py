"""What a person sees of work that takes long: a bar on a terminal, a line now and then in a log file.

What the work is is left out, and so is how long it will take before it has begun (`estimates`).
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from glpretrain.core.distributed import rank

_PATIENCE = 2.0  # seconds without a progress bar
_LOG_SECONDS = 60.0  # between two lines

Element = TypeVar("Element")


def tracked(
    elements: Iterable[Element], *, total: int, description: str, items: Callable[[Element], int] | None = None
) -> Iterator[Element]:
    """Pass `elements` on, and say how far this has come where it takes long.

    On a terminal a bar is shown after two seconds and vanishes at the end; elsewhere a line is written every minute. Only the first
    process does so.

    Args:
        elements: what is passed on.
        total: number of elements.
        description: what the work is.
        items: function of an element to the number of items in it; how many are done per second is said too.
    """
    console = Console(stderr=True, force_jupyter=False)  # in a notebook a bar would need a package of its own
    progress = Progress(console=console, transient=True)
    task = progress.add_task(description, total=total)
    start = said = time.monotonic()
    shown, done, rate = False, 0, ""
    try:
        for number, element in enumerate(elements, start=1):
            yield element
            now = time.monotonic()
            if items is not None:
                done += items(element)
                rate = f", {done / max(now - start, 1e-9):.0f} per second"
            progress.update(task, advance=1, description=f"{description}{rate}")
            if not shown and console.is_terminal and rank() == 0 and now - start > _PATIENCE:
                progress.start()
                shown = True
            elif not console.is_terminal and rank() == 0 and now - said > _LOG_SECONDS:
                said = now
                left = timedelta(seconds=round((now - start) / number * (total - number)))
                print(f"{description}: {number} of {total}{rate}, {left} left", file=sys.stderr, flush=True)
    finally:
        if shown:
            progress.stop()
