"""Reference numbers made by running the authors' own code; README.md says what each file holds."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor


def load(name: str) -> dict:
    """The reference numbers of `name`.json."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text())


def wave(*shape: int, phase: float = 0.0, scale: float = 1.0) -> Tensor:
    """The inputs behind the numbers: scale * sin(1.7 * i + phase) at row-major position i, in float64, rounded to float32."""
    ramp = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(1.7 * ramp + phase)).reshape(shape).float()


def assert_matches(actual: Tensor | float, expected: list | float, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Compare with a reference made in float64 from the float64 inputs.

    The defaults leave room for float32 rounding of inputs and sums: about 1e-7 relative, times up to 25 (a teacher's
    temperature of 0.04 in an exponent).
    """
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol
    )
