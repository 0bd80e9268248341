"""What a person sees of work that takes long: a bar on a terminal.

What the work is is left out.
"""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

_PATIENCE = 2.0  # seconds without a progress bar

Element = TypeVar("Element")


def tracked(elements: Iterable[Element], *, total: int, description: str) -> Iterator[Element]:
    """Pass `elements` on; on a terminal, show a bar that vanishes at the end once this has taken more than two seconds."""
    console = Console(stderr=True, force_jupyter=False)  # in a notebook a bar would need a package of its own
    progress = Progress(console=console, transient=True)
    task = progress.add_task(description, total=total)
    start = time.monotonic()
    shown = False
    try:
        for element in elements:
            yield element
            progress.advance(task)
            if not shown and console.is_terminal and time.monotonic() - start > _PATIENCE:
                progress.start()
                shown = True
    finally:
        if shown:
            progress.stop()
