"""Sounds that a program holds (arrays, tensors, paths) as the tensors that sources give of files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glpretrain.core.fbank import RATE
from glpretrain.core.listing import expanded
from glpretrain.data.sources.audio.decoding import decode


def sounds(held: object) -> list[object]:
    """The single sounds in a list, or in an array or a tensor with an axis for them."""
    if isinstance(held, list | tuple):
        return list(held)
    return list(held) if isinstance(held, np.ndarray | Tensor) and held.ndim == 2 else [held]


def sound_values(held: object, *, channels: int) -> Tensor:
    """One sound as Float[1 S].

    Args:
        held: the path of a file, or an array or a tensor of samples at 16 kHz, Float[S] in [-1, 1].
        channels: number of channels, which is 1.

    Raises:
        ValueError: it is something else, empty, or some samples are not finite.
    """
    if isinstance(held, str | Path):
        return decode(expanded(held)).unsqueeze(0)
    if not isinstance(held, np.ndarray | Tensor):
        raise ValueError(f"transform: {type(held).__name__} given; accepted: path, array or tensor of samples at {RATE} Hz, or a list")
    samples = held.detach().cpu() if isinstance(held, Tensor) else torch.from_numpy(np.array(held, order="C"))
    if samples.dim() != 1 or samples.numel() == 0 or not samples.is_floating_point():
        given = f"{tuple(samples.shape)} of {samples.dtype}"
        raise ValueError(f"transform: {given} given; accepted: floating-point samples, one axis, or two for several sounds")
    if not bool(samples.isfinite().all()):
        raise ValueError("transform: some samples are not finite")
    return samples.float().unsqueeze(0)
