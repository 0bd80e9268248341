"""Which checkpoints were written to a folder: their digests and steps, in a text file that is read without torch.

Left out: how checkpoints are written and read (`callbacks.checkpoints`).
"""

from pathlib import Path

DIGESTS = "sha256.txt"


def digests(folder: Path) -> dict[str, int]:
    """Steps of the checkpoints that were written to a folder, by digest, in the order of writing."""
    path = folder / DIGESTS
    lines = path.read_text().splitlines() if path.is_file() else []
    return {digest: int(step) for digest, step in (line.split() for line in lines if line.count(" ") == 1)}


def last_step(folder: Path) -> int | None:
    """Step of the checkpoint that was written last to a folder, which is not read; None where there is none.

    Args:
        folder: folder of the checkpoints of a run.
    """
    return next(reversed(digests(folder).values()), None)
