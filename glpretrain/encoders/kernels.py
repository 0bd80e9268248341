"""Which kernel computes attention, where torch's own choice is not the fastest.

On a CPU in half precision, torch's fused kernel takes 3 to 7 times as long as explicit products with a softmax between them
(docs/measurements.md#bench). In float32, and on a GPU, it is the fastest.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
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


def _is_half_on_cpu(items: Tensor) -> bool:
    if items.device.type != "cpu" or isinstance(items, FakeTensor):  # fake ones stand for those of a GPU (`glpretrain.bench.plan`)
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else items.dtype
    return dtype in (torch.bfloat16, torch.float16)
