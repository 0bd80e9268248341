"""Which kernel computes attention: explicit products on a CPU in half precision, torch's fused one elsewhere, and equal features."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from glpretrain.encoders import ViT
from glpretrain.encoders.kernels import fastest_attention


class Watch(TorchFunctionMode):
    """Counts the calls of the fused kernel."""

    fused = 0

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.fused += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def small_vit() -> ViT:
    torch.manual_seed(0)
    return ViT("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3)


def wave() -> Tensor:
    return torch.sin(torch.arange(2 * 3 * 32 * 32) * 0.37).reshape(2, 3, 32, 32)


def test_half_precision_on_a_cpu_uses_explicit_products() -> None:
    encoder = small_vit()
    with Watch() as watch, torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(wave()).cls.sum().backward()
    assert watch.fused == 0
    with Watch() as watch:
        encoder(wave())
    assert watch.fused == 2  # one for each block


def test_both_kernels_give_the_same_features() -> None:
    encoder = small_vit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explicit, fused = encoder(wave()), encoder._encode(wave(), mask=None)
    # bfloat16 has 8 bits; the two round at different places.
    torch.testing.assert_close(explicit.patches, fused.patches, rtol=0.02, atol=0.02)
    assert not torch.equal(explicit.patches, fused.patches)


def test_the_blocks_are_as_before_after_an_error() -> None:
    encoder = small_vit()
    with pytest.raises(RuntimeError), fastest_attention(encoder, wave().bfloat16()):
        assert not any(vars(part).get("fused_attn") for part in encoder.modules())
        raise RuntimeError
    assert sum(vars(part).get("fused_attn", False) for part in encoder.modules()) == 2
    with fastest_attention(nn.Linear(2, 2), wave().bfloat16()):
        pass
