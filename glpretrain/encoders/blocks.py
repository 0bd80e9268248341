"""Blocks of a plain ViT that compute only what is asked for, and views of several sizes in one sequence.

`Packing` lets the tokens of all views pass through the norms, projections and MLPs of a block together, whatever their sizes; each item
attends to its own tokens. It works with every block of timm, because it is handed over as the block's attention mask.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from glpretrain.encoders.documents import PackedAttention, attend_in_documents, block_mask
from glpretrain.encoders.drop_path import Draws, KeyedDropPath, PackedSizes
from glpretrain.encoders.kernels import attend

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Blocks = nn.Sequential | nn.ModuleList
BlockArgs = Mapping[str, Tensor]
_MOST_NUMBERS_ON_CPU = 1 << 17


class Packing:
    """In place of an attention mask: the items whose tokens form one sequence, each of which attends to itself.

    torch hands a call of `scaled_dot_product_attention` to whatever stands for one of its tensors, so no block has to know about it.

    Args:
        sizes: number of items and tokens per item, of each group of items of one size, in the order of the sequence.
        attention: how items attend to themselves: a call for each group, or one for all.
    """

    def __init__(self, sizes: PackedSizes, *, attention: PackedAttention = "grouped") -> None:
        self.sizes = sizes
        self.attention: PackedAttention = attention
        self._documents: BlockMask | None = None  # made by the first block that needs it

    @staticmethod
    def pack(groups: Sequence[Tensor]) -> Tensor:
        """Float[B_g T_g D] each to Float[1 S D], where S is the sum of all B_g * T_g."""
        return torch.cat([tokens.flatten(0, 1) for tokens in groups]).unsqueeze(0)

    def unpack(self, tokens: Tensor) -> list[Tensor]:
        """Inverse of `pack`."""
        parts = tokens.squeeze(0).split([items * length for items, length in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]

    @classmethod
    def __torch_function__(cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping | None = None) -> object:
        given = dict(kwargs or {})
        packing = given.pop("attn_mask", None)
        if func is not F.scaled_dot_product_attention or not isinstance(packing, cls):
            return NotImplemented
        return packing._attention(*args, **given)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0, is_causal: bool = False) -> Tensor:
        """Float[1 heads S d] each to Float[1 heads S d]."""
        assert not is_causal
        # Tensors without numbers are those of `glpretrain.bench.plan`; there may be no token where no item keeps a path.
        if self.attention == "flex" and query.shape[2] > 0 and not isinstance(query, FakeTensor):
            assert dropout_p == 0.0, "no encoder of ours has dropout in its attention"
            self._documents = self._documents or block_mask(self.sizes, device=query.device)
            return attend_in_documents(query, key, value, documents=self._documents)
        lengths = [items * length for items, length in self.sizes]
        parts = []
        for size, *inputs in zip(self.sizes, *(one.squeeze(0).split(lengths, dim=1) for one in (query, key, value)), strict=True):
            separate = attend(*(one.unflatten(1, size).transpose(0, 1) for one in inputs), dropout=dropout_p)  # [B heads T d]
            parts.append(separate.transpose(1, 2).flatten(0, 1))  # [B*T heads d], the order in which timm reads it
        return torch.cat(parts).transpose(0, 1).unsqueeze(0)


class PlainBlock(Block):
    """timm's block with two ways to compute less; but for rounding, what is computed does not change.

    - A branch whose paths are drawn from keys is computed for the items that keep it, as in DINOv2 (dinov2/layers/block.py), where
      `KeyedDropPath.computes_kept` asks for it. There, a batch keeps an exact share of its items, and the factor on them is the inverse of
      that share; here, as in every block, each item is drawn by itself, and the factor is the inverse of the probability.
    - `num_queries` leaves out all tokens behind the first ones, which attend to all. A last block of which only the class token is read
      needs about a sixth of its products.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | Packing | None = None, is_causal: bool = False, num_queries: int | None = None
    ) -> Tensor:
        """Float[B T D] to Float[B T D], or to Float[B num_queries D]; the other arguments are those of timm's block."""
        kept_tokens = x[:, :num_queries]

        def attention(tokens: Tensor, mask: Tensor | Packing | None) -> Tensor:
            normed = self.norm1(tokens)
            if num_queries is not None:
                return self.ls1(_of_queries(self.attn, normed, num_queries))
            return self.ls1(self.attn(normed, attn_mask=mask, is_causal=is_causal))

        x = self._add(kept_tokens, x, self.drop_path1, attention, attn_mask)
        return self._add(x, x, self.drop_path2, lambda tokens, mask: self.ls2(self.mlp(self.norm2(tokens))), attn_mask)

    @staticmethod
    def _add(
        tokens: Tensor,
        seen: Tensor,
        path: nn.Module,
        branch: Callable[[Tensor, Tensor | Packing | None], Tensor],
        mask: Tensor | Packing | None,
    ) -> Tensor:
        """Tokens plus what a branch makes of those that are `seen`, of the kept items only where their rows are known."""
        if not isinstance(path, KeyedDropPath) or path.rows is None:
            return tokens + path(branch(seen, mask))
        axis = 0
        if path.sizes is not None:
            assert isinstance(mask, Packing)
            axis, mask = 1, Packing(path.sizes, attention=mask.attention)
        residual = branch(seen.index_select(axis, path.rows), mask).to(tokens.dtype)
        return tokens.index_add(axis, path.rows, residual / (1.0 - path.drop_prob))


def run(blocks: Blocks, tokens: Tensor, block_args: Sequence[BlockArgs], *, num_queries: int | None = None) -> Tensor:
    """Float[B T D] before the first block to Float[B T D] behind the last one.

    Args:
        blocks: blocks of a ViT.
        tokens: Float[B T D].
        block_args: what each block is told beside the tokens.
        num_queries: how many tokens of each item are wanted; there are T where the last block cannot leave any out.
    """
    wanted = {} if num_queries is None or not _leaves_out(blocks[-1]) else {"num_queries": num_queries}
    for number, (block, args) in enumerate(zip(blocks, block_args, strict=True), start=1):
        tokens = block(tokens, **args, **(wanted if number == len(blocks) else {}))
    return tokens


def run_packed(
    blocks: Blocks,
    groups: Sequence[Tensor],
    block_args: Sequence[Sequence[BlockArgs]],
    *,
    num_queries: Sequence[int | None],
    draws: Draws | None,
    attention: PackedAttention = "grouped",
) -> list[Tensor]:
    """`run` for groups of items of several sizes, in one sequence.

    Args:
        blocks: blocks for which `can_pack` is true.
        groups: Float[B_g T_g D] each.
        block_args: for each group, what each block is told beside the tokens.
        num_queries: for each group, see `run`.
        draws: of dropped paths, for the sequence; None where nothing is dropped.
        attention: see `Packing`.
    """
    sizes = tuple((len(group), group.shape[1]) for group in groups)
    packing, tokens = Packing(sizes, attention=attention), Packing.pack(groups)
    # The last block of a group that wants some tokens only sees this group by itself.
    num_joint = len(blocks) - any(count is not None for count in num_queries)
    with _rotating_all(blocks):
        for block, *args in zip(blocks[:num_joint], *block_args, strict=False):
            tokens = block(tokens, attn_mask=packing, **_joined(args, packing.sizes))
    groups = packing.unpack(tokens)
    if num_joint < len(blocks):
        last = blocks[num_joint:]
        for number, (args, count) in enumerate(zip(block_args, num_queries, strict=True)):
            if draws is not None:
                draws.show_group(number, module=last)
            groups[number] = run(last, groups[number], args[num_joint:], num_queries=count)
    return groups


def packing_pays(num_numbers: int, *, device: torch.device) -> bool:
    """Whether one sequence is faster than one pass for each size of views.

    It saves calls of operations, which is what small steps on a CPU and most steps on a GPU wait for; on a CPU, larger ones gain nothing
    from it and pay for the copies of queries, keys and values (docs/measurements.md#bench).

    Args:
        num_numbers: numbers in all tokens, S * D.
        device: where they are.
    """
    return device.type != "cpu" or num_numbers <= _MOST_NUMBERS_ON_CPU


def compile_blocks(encoder: nn.Module) -> None:
    """Let torch compile every block when it first runs; names and weights stay as they are.

    Raises:
        ValueError: the encoder is no transformer.
    """
    blocks = getattr(getattr(encoder, "model", None), "blocks", None)
    if not isinstance(blocks, Blocks):
        raise ValueError(f"optimization: compile=True given for {type(encoder).__name__}; accepted: encoders with blocks, such as ViT")
    for block in blocks:
        block.compile()


def can_pack(blocks: Blocks) -> bool:
    """Whether `run_packed` works with these blocks: they hand over an attention mask to torch's fused attention, and have no batch norm."""
    attentions = [vars(part)["fused_attn"] for part in blocks.modules() if "fused_attn" in vars(part)]
    takes_mask = all("attn_mask" in inspect.signature(type(block).forward).parameters for block in blocks)
    return takes_mask and len(attentions) > 0 and all(attentions)


def _joined(args: Sequence[BlockArgs], sizes: PackedSizes) -> BlockArgs:
    """What a block is told of all groups: rotations of all tokens, Float[S d] or Float[heads S d]."""
    if not args[0]:
        return {}
    tables = []
    for (items, length), given in zip(sizes, args, strict=True):
        (table,) = given.values()
        *heads, num_patches, width = table.shape
        # The rotation of a prefix token is none: a sine of zero and a cosine of one.
        still = torch.cat([table.new_zeros(width // 2), table.new_ones(width // 2)]).expand(*heads, length - num_patches, -1)
        tables.append(torch.cat([still, table], dim=-2).repeat(*[1] * len(heads), items, 1))
    return {"rope": torch.cat(tables, dim=-2)}


def gather_rope(rope: Tensor, keep: Tensor) -> Tensor:
    """Rotary table Float[N D] or Float[heads N D] to one per item, Float[B 1 M D] or Float[B heads M D]."""
    table = rope if rope.dim() == 3 else rope.unsqueeze(0)
    return table[:, keep].transpose(0, 1)


@contextmanager
def _rotating_all(blocks: Blocks) -> Iterator[None]:
    """Inside this context, timm's attention rotates all tokens, not only those behind the prefix of a single item."""
    parts = [(part, own) for part in blocks.modules() if (own := vars(part).get("num_prefix_tokens"))]
    for part, _ in parts:
        vars(part)["num_prefix_tokens"] = 0
    try:
        yield
    finally:
        for part, own in parts:
            vars(part)["num_prefix_tokens"] = own


def _leaves_out(block: nn.Module) -> bool:
    """Whether a block takes `num_queries`."""
    return isinstance(block, PlainBlock) and type(block.attn) is Attention


def _of_queries(attention: nn.Module, tokens: Tensor, count: int) -> Tensor:
    """timm's `Attention.forward` for the first tokens of each item: Float[B T D] to Float[B count D]."""
    assert isinstance(attention, Attention)
    width, qkv = attention.attn_dim, attention.qkv
    first = tokens[:, :count]
    bias = (None, None) if qkv.bias is None else (qkv.bias[:width], qkv.bias[width:])
    heads = (attention.num_heads, attention.head_dim)
    query = F.linear(first, qkv.weight[:width], bias[0]).unflatten(2, heads).transpose(1, 2)  # [B heads count d]
    key, value = F.linear(tokens, qkv.weight[width:], bias[1]).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)  # [B heads T d] each
    dropout = attention.attn_drop.p if attention.training else 0.0
    found = attend(attention.q_norm(query), attention.k_norm(key), value, dropout=dropout).transpose(1, 2).flatten(2)
    found = attention.norm(found)
    if attention.gate is not None:
        found = found * attention.gate(first).sigmoid()
    return attention.proj_drop(attention.proj(found))
