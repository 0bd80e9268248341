"""Which kernel computes attention, where torch's own choice is not the fastest.

On a CPU in half precision, torch's fused kernel takes 3 to 7 times as long as explicit products with a softmax between them
(docs/measurements.md#bench). In float32, and on a GPU, it is the fastest.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def fastest_attention(module: nn.Module, items: Tensor) -> Iterator[None]:
    """Inside this context, the attention of timm's blocks in `module` is computed by explicit products where these are faster.

    Args:
        module: module with blocks of timm, or without.
        items: Float[B ...], what it is given; device and precision are those of the computation.
    """
    parts = [part for part in module.modules() if vars(part).get("fused_attn")] if _is_half_on_cpu(items) else []
    for part in parts:
        vars(part)["fused_attn"] = False
    try:
        yield
    finally:
        for part in parts:
            vars(part)["fused_attn"] = True


def attend(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """`scaled_dot_product_attention` by the fastest kernel: Float[B heads T d], Float[B heads S d] twice, to Float[B heads T d]."""
    if not _is_half_on_cpu(query):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
    return F.dropout(weights, dropout) @ value


def _is_half_on_cpu(items: Tensor) -> bool:
    if items.device.type != "cpu" or isinstance(items, FakeTensor):  # fake ones stand for those of a GPU (`glpretrain.bench.plan`)
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else items.dtype
    return dtype in (torch.bfloat16, torch.float16)
