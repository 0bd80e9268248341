"""Triton kernels for assignments to prototypes: products, softmax and weighted sums in one pass, without the rows x K logits in memory.

Both kernels see logits[r, k] = scale[k] * <rows[r], directions[k]> - shift[r, k] for a block of rows and a block of prototypes at a time.
`attend` walks over the prototypes with an online softmax, as flash attention does (Dao et al. 2022), and `gather` walks over the rows.
Neither adds to memory that another program writes, so that results do not depend on the order in which programs run.

Importing this file needs Triton. With TRITON_INTERPRET=1, set before the import, the kernels run on a CPU, where they can be tested. Left
out: what is computed from their results (`fused_cross_entropy`).
"""

# ruff: noqa: ANN001, ANN202 - arguments of kernels are pointers and numbers of Triton, which have no types here

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

_CELLS = 1 << 13  # numbers of a block of rows or prototypes, which several blocks in fast memory are made of
_LEAST, _MOST = 16, 64  # rows or prototypes of a block: the least that a product of blocks takes, and the most
_PROGRAMS = 512  # at a time; a GPU has some 100 processors
# Three products of TF32 for one of float32, which are as exact; one of them is off by 1e-4 for a cosine, and by 0.0024 for a logit at 0.04.
_FULL = "tf32x3"
_STAGES = 1  # tiles in fast memory at a time: at two, those of 256 numbers take 144 kB, more than many GPUs have
_LOW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Side(NamedTuple):
    """What the logits of the student or the teacher are computed from."""

    rows: Tensor  # Float[R D]
    directions: Tensor  # Float[K D]
    scale: Tensor  # Float[K], in float32
    shift: Tensor | None  # Float[K] or Float[B K] in float32, where row r belongs to item r mod B; None where nothing is subtracted


@triton.jit
def _tile(start, numbers, count, width, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Float[BLOCK BLOCK_WIDTH] in float32: rows from `start` on, zero outside."""
    row, column = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)
    inside = (row < count)[:, None] & (column < width)[None, :]
    return tl.load(numbers + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _logits(
    rows,
    directions,
    row,
    prototype,
    scale,
    shift,
    num_items,
    shift_stride,
    num_prototypes,
    SHIFTED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Float[rows prototypes] of two tiles; minus infinity behind the last prototype."""
    inside = prototype < num_prototypes
    logits = tl.dot(rows, tl.trans(directions), input_precision=FULL)
    logits *= tl.load(scale + prototype, mask=inside, other=0.0)[None, :]
    if SHIFTED:
        start = shift + (row % num_items).to(tl.int64) * shift_stride
        logits -= tl.load(start[:, None] + prototype[None, :], mask=inside[None, :], other=0.0)
    return tl.where(inside[None, :], logits, float("-inf"))


@triton.jit
def _product(one, other, found, LOW: tl.constexpr, FULL: tl.constexpr, INTERPRETED: tl.constexpr):
    """found + one @ other, whose factors are rounded to the precision LOW."""
    one, other = one.to(LOW), other.to(LOW)
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16; products of rounded numbers in float32 are the same
        one, other = one.to(tl.float32), other.to(tl.float32)
    return tl.dot(one, other, found, input_precision=FULL)


@triton.jit
def _attend(
    rows,
    directions,
    scale,
    shift,
    values,
    factor,
    totals,
    means,
    num_rows,
    num_prototypes,
    width,
    num_items,
    shift_stride,
    per_part,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    FULL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One block of rows and one part of the prototypes: totals, Float[parts R], and means, Float[parts R D]."""
    first, part = tl.program_id(0) * BLOCK, tl.program_id(1)
    row, column = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)
    own = _tile(first, rows, num_rows, width, BLOCK, BLOCK_WIDTH)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK, BLOCK_WIDTH], tl.float32)
    for start in range(part * per_part, tl.minimum((part + 1) * per_part, num_prototypes), BLOCK):
        prototype = start + tl.arange(0, BLOCK)
        against = _tile(start, directions, num_prototypes, width, BLOCK, BLOCK_WIDTH)
        logits = _logits(own, against, row, prototype, scale, shift, num_items, shift_stride, num_prototypes, SHIFTED, FULL)
        now = tl.maximum(highest, tl.max(logits, 1))
        fading = tl.exp(highest - now)
        share = tl.exp(logits - now[:, None])
        total = total * fading + tl.sum(share, 1)
        share *= tl.load(factor + prototype, mask=prototype < num_prototypes, other=0.0)[None, :]
        read = _tile(start, values, num_prototypes, width, BLOCK, BLOCK_WIDTH)
        mean = _product(share, read, mean * fading[:, None], LOW, FULL, INTERPRETED)
        highest = now
    place = part.to(tl.int64) * num_rows + row
    tl.store(totals + place, highest + tl.log(total), mask=row < num_rows)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    tl.store(means + place[:, None] * width + column[None, :], mean / total[:, None], mask=inside)


@triton.jit
def _gather(
    rows,
    directions,
    scale,
    shift,
    totals,
    given,
    gathered,
    num_rows,
    num_prototypes,
    width,
    num_items,
    shift_stride,
    SHIFTED: tl.constexpr,
    SUBTRACT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    FULL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One block of prototypes and all rows: gathered, Float[K D]."""
    first = tl.program_id(0) * BLOCK
    prototype, column = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)
    against = _tile(first, directions, num_prototypes, width, BLOCK, BLOCK_WIDTH)
    found = tl.zeros([BLOCK, BLOCK_WIDTH], tl.float32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        own = _tile(start, rows, num_rows, width, BLOCK, BLOCK_WIDTH)
        logits = _logits(own, against, row, prototype, scale, shift, num_items, shift_stride, num_prototypes, SHIFTED, FULL)
        total = tl.load(totals + row, mask=row < num_rows, other=0.0)
        # Behind the last row, where the logits are those of a row of zeros, an infinite share times zero would be no number.
        share = tl.where((row < num_rows)[:, None], tl.exp(logits - total[:, None]), 0.0)
        found = _product(tl.trans(share), _tile(start, given, num_rows, width, BLOCK, BLOCK_WIDTH), found, LOW, FULL, INTERPRETED)
    inside = (prototype < num_prototypes)[:, None] & (column < width)[None, :]
    place = gathered + prototype.to(tl.int64)[:, None] * width + column[None, :]
    if SUBTRACT:
        found = tl.load(place, mask=inside, other=0.0) - found
    tl.store(place, found, mask=inside)


def attend(side: Side, *, values: Tensor, factor: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Assignments of rows to prototypes, and the means of vectors of the prototypes by these assignments.

    Args:
        side: rows and directions.
        values: Float[K D], a vector of each prototype.
        factor: Float[K], what it is multiplied by, in float32.
        precision: precision of the factors of the products with the vectors; sums are in float32.

    Returns:
        Float[R], logarithm of the sum of exp(logits), and Float[R D], sum over k of assignments[r, k] * factor[k] * values[k].
    """
    (num_rows, width), num_prototypes = side.rows.shape, len(side.directions)
    block, block_width = _blocks(width)
    per_part, parts, num_blocks = _parts(num_rows, num_prototypes, block=block)
    totals = side.scale.new_empty(parts, num_rows)
    means = side.scale.new_empty(parts, num_rows, width)
    if num_rows > 0:
        given = (side.rows.contiguous(), side.directions.contiguous(), side.scale, *_shift(side), values.contiguous(), factor)
        rows, directions, scale, shift, num_items, stride, values, factor = given
        sizes = (num_rows, num_prototypes, width, num_items, stride, per_part)
        kinds = (side.shift is not None, block, block_width, _LOW[precision], _FULL, knobs.runtime.interpret)
        pointers = (rows, directions, scale, shift, values, factor, totals, means)
        _attend[num_blocks, parts](*pointers, *sizes, *kinds, num_stages=_STAGES)  # pyright: ignore[reportCallIssue]  read by Triton itself
    total = totals.logsumexp(dim=0)
    return total, torch.einsum("pr,prd->rd", (totals - total).exp(), means)


def gather(side: Side, *, total: Tensor, given: Tensor, precision: torch.dtype, subtract_from: Tensor | None = None) -> Tensor:
    """Float[K D]: sum over r of assignments[r, k] * given[r].

    Args:
        side: rows and directions.
        total: Float[R], what `attend` returned.
        given: Float[R D], a vector of each row.
        precision: precision of the factors of the products with these vectors; sums are in float32.
        subtract_from: Float[K D] in float32, from which the result is subtracted in place; None stands for a new tensor.
    """
    (num_rows, width), num_prototypes = side.rows.shape, len(side.directions)
    block, block_width = _blocks(width)
    gathered = side.scale.new_empty(num_prototypes, width) if subtract_from is None else subtract_from
    rows, directions, (shift, num_items, stride) = side.rows.contiguous(), side.directions.contiguous(), _shift(side)
    sizes = (num_rows, num_prototypes, width, num_items, stride)
    kinds = (side.shift is not None, subtract_from is not None, block, block_width, _LOW[precision], _FULL, knobs.runtime.interpret)
    grid = (triton.cdiv(num_prototypes, block),)
    pointers = (rows, directions, side.scale, shift, total, given.contiguous(), gathered)
    _gather[grid](*pointers, *sizes, *kinds, num_stages=_STAGES)  # pyright: ignore[reportCallIssue]  read by Triton itself
    return gathered


def _blocks(width: int) -> tuple[int, int]:
    """Rows or prototypes of a block, and its width, a power of two."""
    block_width = max(_LEAST, triton.next_power_of_2(width))
    return max(_LEAST, min(_MOST, _CELLS // block_width)), block_width


def _parts(num_rows: int, num_prototypes: int, *, block: int) -> tuple[int, int, int]:
    """Prototypes of a part, number of parts, and number of blocks of rows: few rows would leave most of a GPU idle.

    There are at most `_PROGRAMS` programs more than blocks of rows, so the results of all parts grow with the rows, and not with K.
    """
    num_blocks, blocks_of_prototypes = triton.cdiv(num_rows, block), triton.cdiv(num_prototypes, block)
    parts = min(blocks_of_prototypes, max(1, _PROGRAMS // max(1, num_blocks)))
    per_part = triton.cdiv(blocks_of_prototypes, parts) * block
    return per_part, triton.cdiv(num_prototypes, per_part), num_blocks


def _shift(side: Side) -> tuple[Tensor, int, int]:
    """What is subtracted, after how many rows it begins again, and the distance of its rows."""
    if side.shift is None:
        return side.scale, 1, 0  # which is not read
    num_items, stride = (1, 0) if side.shift.dim() == 1 else side.shift.shape
    return side.shift.contiguous(), num_items, stride
