"""Random numbers without state: every draw is a pure function of a key.

A key is one int64 per item, made from (seed, epoch, dataset index) and folded with a number for each purpose. So an item gets the same
crop, colours and mask in the same epoch, in whatever batch, process or device it lands, and a resumed run needs only the epoch to go on
exactly. Integer arithmetic is exact, so CPU and GPU agree to the last bit.

The mixer is the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
"""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_ALL_BITS = (1 << 64) - 1
_TOGETHER = 1 << 16  # draws of a long permutation that are made at once


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _ALL_BITS
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical right shift; torch's own shift of int64 is arithmetic."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _signed(_MIX_1)
    bits = (bits ^ _shift(bits, 27)) * _signed(_MIX_2)
    return bits ^ _shift(bits, 31)


def _mixed_number(value: int) -> int:
    """What `_mix` makes of one int64, without a tensor."""
    bits = value & _ALL_BITS
    bits = (bits ^ (bits >> 30)) * _MIX_1 & _ALL_BITS
    bits = (bits ^ (bits >> 27)) * _MIX_2 & _ALL_BITS
    return _signed(bits ^ (bits >> 31))


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Int[*S]: new keys, independent of the old ones Int[*S] and of the keys for other purposes.

    `data`, the number of the purpose, is an int, or Int that is broadcast against the keys.
    """
    # A number is mixed on the host: on a GPU each operation on it would be a launch.
    purpose = _mixed_number(data * _GOLDEN + _MIX_1) if isinstance(data, int) else _mix(data * _signed(_GOLDEN) + _signed(_MIX_1))
    return _mix(_mix(key + _signed(_GOLDEN)) ^ purpose)


def item_keys(*, seed: int, epoch: int, index: Tensor) -> Tensor:
    """Int[B]: one key per item, from the seed of the run, the number of completed passes over the data, and the dataset index Int[B]."""
    start = torch.full_like(index, seed, dtype=torch.int64)
    return fold_in(fold_in(start, epoch), index)


def numbered(key: Tensor, *, count: int, first: int = 0) -> Tensor:
    """Int[V *S]: keys Int[*S] folded with each of the V = `count` numbers from `first` on."""
    numbers = torch.arange(first, first + count, dtype=torch.int64, device=key.device)
    return fold_in(key, numbers.view(-1, *[1] * key.dim()))


def per_view(key: Tensor, purpose: int, *, count: int) -> Tensor:
    """Int[V *S]: keys for each of `count` views of the items."""
    return numbered(fold_in(key, purpose), count=count)


def bits(key: Tensor, *shape: int, first: int = 0) -> Tensor:
    """Int[*S *shape]: 64 random bits for every element of `shape` under every key, after those of `first` other elements.

    So a large draw can be made a part at a time.
    """
    count = math.prod(shape)
    counter = torch.arange(first, first + count, dtype=torch.int64, device=key.device)
    return fold_in(key.unsqueeze(-1), counter).reshape(*key.shape, *shape)


def uniform(key: Tensor, *shape: int, first: int = 0) -> Tensor:
    """Float[*S *shape], uniform on [0, 1) with 24 bits, so that the next float above the largest possible draw is 1.

    `first` is as of `bits`.
    """
    return _shift(bits(key, *shape, first=first), 40).to(torch.float32) * 2.0**-24


def normal(key: Tensor, *shape: int) -> Tensor:
    """Float[*S *shape], standard normal (Box-Muller)."""
    pair = uniform(key, *shape, 2)
    radius = torch.sqrt(-2.0 * torch.log1p(-pair[..., 0]))  # 1 - u is in (0, 1], so the logarithm is finite
    return radius * torch.cos(2.0 * torch.pi * pair[..., 1])


def integers(key: Tensor, low: Tensor | int, high: Tensor | int, *shape: int, first: int = 0) -> Tensor:
    """Int[*S *shape], uniform on {low, ..., high - 1}; the bounds are broadcast against the result, `first` is as of `bits`.

    Only 24 random bits are used; the bias that results is below (high - low) / 2**24.
    """
    draw = uniform(key, *shape, first=first)
    return (low + torch.floor(draw * (high - low))).to(torch.int64)


def permutation(key: Tensor, count: int) -> Tensor:
    """Int[*S count]: a uniformly random order of 0, ..., count - 1 under every key."""
    if count <= _TOGETHER:
        return _shift(bits(key, count), 1).argsort(dim=-1)
    draws = torch.empty(*key.shape, count, dtype=torch.int64, device=key.device)
    for start in range(0, count, _TOGETHER):  # all at once, the draws of ten million items would take six times their own memory
        counter = torch.arange(start, min(start + _TOGETHER, count), device=key.device)
        draws[..., start : start + _TOGETHER] = _shift(fold_in(key.unsqueeze(-1), counter), 1)  # [*S counter]
    return draws.argsort(dim=-1)
