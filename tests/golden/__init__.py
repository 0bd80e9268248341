"""Reference numbers made by running the authors' own code; README.md says what each file holds."""

import json
import math
import zlib
from pathlib import Path

import pytest
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


def noise(*shape: int, name: str) -> Tensor:
    """Uniform numbers in [-1, 1) that depend on a name and the row-major position i only, exact on every machine.

    In integers modulo 2^32: x = 2654435761 i + crc32(name); twice x ^= x >> 16, with x *= 73244475 between; then x / 2^31 - 1.
    """
    x = torch.arange(math.prod(shape), dtype=torch.int64) * 2654435761 + zlib.crc32(name.encode())
    x = x % 2**32
    x = (x ^ (x >> 16)) * 73244475 % 2**32
    x = x ^ (x >> 16)
    return (x.double() / 2**31 - 1.0).reshape(shape).float()


def official_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights for a model of others, from its names and shapes: large enough that every tensor changes the features.

    Biases 0.2 noise; other vectors (norms, layer scale) 1 + 0.3 noise; tokens and positions (a first axis of one) 0.5 noise;
    matrices and kernels noise * sqrt(3 / inputs), which keeps the scale of what goes through; scalars 0.
    DINOv3's fixed tensors: the mask of its biases is 1, 0, 1 over queries, keys, values, and its periods are
    100^(2i / (2P)), i < P, rounded to bfloat16 as in its published files.
    """
    weights = {}
    for name, shape in shapes.items():
        values = noise(*shape, name=name)
        if name.endswith("bias_mask"):
            weights[name] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(shape[0] // 3)
        elif name.endswith("periods"):
            weights[name] = (100.0 ** (torch.arange(shape[0]) / shape[0])).bfloat16().float()
        elif name.endswith("bias"):
            weights[name] = 0.2 * values
        elif len(shape) < 2:
            weights[name] = 1.0 + 0.3 * values if shape else torch.tensor(0)
        elif shape[0] == 1:
            weights[name] = 0.5 * values
        else:
            weights[name] = values * math.sqrt(3.0 / math.prod(shape[1:]))
    return weights


def assert_moments(values: Tensor, expected: list[float], *, name: str) -> None:
    """Mean, root mean square and mean absolute value of n fresh numbers, each within five standard deviations of the official sample's.

    Those of one sample are at most r / sqrt(n) times 1, 0.75 and 0.65, where r is the root mean square: of the three, a normal's are the
    largest, and its truncation makes them smaller.
    """
    values = values.detach().double()
    found = torch.stack([values.mean(), values.square().mean().sqrt(), values.abs().mean()])
    deviation = 0.0 if values.unique().numel() == 1 else 2**0.5 * expected[1] / values.numel() ** 0.5
    for moment, wanted, factor in zip(found.tolist(), expected, (1.0, 0.75, 0.65), strict=True):
        assert moment == pytest.approx(wanted, rel=1e-6, abs=5 * factor * deviation), name
