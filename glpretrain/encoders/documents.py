"""Attention inside the items of one packed sequence by one kernel: torch's `flex_attention` with a block mask made from the lengths.

Items are what language models call documents: a token attends to the tokens of its own item. The mask of blocks of 128 tokens is computed
from where items begin and end, so nothing of the size S x S is ever made, and the host does not wait for the device. Left out: blocks that
lie in one item and need no mask inside, which are rare at the usual sizes of views; and `torch.nn.attention.varlen`, which has no CPU form
that tests could run.
"""

from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from glpretrain.encoders.drop_path import PackedSizes

if TYPE_CHECKING:  # its import takes two seconds, which only those pay who ask for it
    from torch.nn.attention.flex_attention import BlockMask

PackedAttention = Literal["grouped", "flex"]  # see `Optimization.packed_attention`
_BLOCK = 128  # tokens, torch's own


class _Attention(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, block_mask: "BlockMask") -> Tensor: ...


def block_mask(sizes: PackedSizes, *, device: torch.device) -> "BlockMask":
    """Which blocks of tokens attend to which.

    Args:
        sizes: number of items and tokens per item, of each group of items of one size, in the order of the sequence.
        device: device of the tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    starts, lengths, count = [], [], 0
    for items, length in sizes:
        starts.append((count + length * torch.arange(items, device=device)).repeat_interleave(length))
        lengths.append(torch.full((items * length,), length, device=device))
        count += items * length
    start = torch.cat(starts)  # [S]: of each token, the first token of its item
    last = start + torch.cat(lengths) - 1  # [S]
    num_blocks = -(-count // _BLOCK)
    edges = _BLOCK * torch.arange(num_blocks, device=device)
    lowest = start[edges] // _BLOCK  # [blocks]: items are contiguous, so the blocks that one attends to are too
    highest = last[(edges + _BLOCK - 1).clamp(max=count - 1)] // _BLOCK
    columns = (lowest.unsqueeze(1) + torch.arange(num_blocks, device=device)).clamp(max=num_blocks - 1)
    counts = (highest - lowest + 1).int().view(1, 1, -1)

    def in_one_item(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return start[query] == start[key]

    return BlockMask.from_kv_blocks(
        counts, columns.int().view(1, 1, num_blocks, -1), BLOCK_SIZE=_BLOCK, mask_mod=in_one_item, seq_lengths=(count, count)
    )


def attend_in_documents(query: Tensor, key: Tensor, value: Tensor, *, documents: "BlockMask") -> Tensor:
    """Float[1 heads S d] each to Float[1 heads S d].

    On a GPU torch compiles the kernel once for all lengths; without that it would make all S x S weights, as it does on a CPU.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as torch's fused attention does: norms and rotations of queries and keys leave float32
        query, key, value = (one.to(torch.get_autocast_dtype(device)) for one in (query, key, value))
    return _kernel(compiled=device != "cpu")(query, key, value, block_mask=documents)


@cache
def _kernel(*, compiled: bool) -> _Attention:
    from torch.nn.attention.flex_attention import flex_attention

    # The whole graph: where torch gave up compiling, it would go on with all S x S weights and say so in a warning only.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True) if compiled else flex_attention
