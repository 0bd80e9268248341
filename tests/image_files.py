"""Image files that tests write."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, value: int = 100, *, size: tuple[int, int] = (20, 30)) -> Path:
    """An RGB image of one value."""
    return write_map(path, np.full((*size, 3), value))


def write_map(path: Path, labels: np.ndarray) -> Path:
    """An image with these values, for labels of shape (H, W) or colours of shape (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(np.uint8)).save(path)
    return path
