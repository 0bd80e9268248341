"""Small encoders whose weights come from a formula, for every file of tests about exports."""

from typing import TypeVar

import torch
from golden import wave
from torch import Tensor, nn

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import FeatureMap, ViT, build_from

_Module = TypeVar("_Module", bound=nn.Module)


def small(name: str, **changes: object) -> ViT:
    """A ViT of timm in small, filled by `fill`."""
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
    encoder = build_from("ViT", {"name": name, **sizes, **changes})
    assert isinstance(encoder, ViT)
    return fill(encoder)


def fill(encoder: _Module) -> _Module:
    """Parameter i, in the order of names, becomes wave(shape, phase=i, scale=0.2); one more for weights of norms and layer scales."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(encoder.named_parameters())):
            parameter.copy_(wave(*parameter.shape, phase=index, scale=0.2))
            if ("norm" in name and name.endswith("weight")) or "gamma" in name:
                parameter.add_(1.0)
    return encoder.eval()


def images(*shape: int) -> Tensor:
    """Float[*shape]."""
    return wave(*shape, phase=0.5)


def difference(output: EncoderOutput, *, expected: EncoderOutput) -> float:
    """Maximum absolute difference over cls and patches."""
    assert output.cls.shape == expected.cls.shape and output.patches.shape == expected.patches.shape
    return max((output.cls - expected.cls).abs().max().item(), (output.patches - expected.patches).abs().max().item())


ENCODERS = {
    "vit": lambda: small("vit_tiny_patch16_224"),
    "registers and layer scale": lambda: small("vit_small_patch14_reg4_dinov2"),
    "rotary": lambda: small("vit_small_patch16_dinov3"),
    "relative": lambda: small("beit_base_patch16_224"),
    "no class token, five channels": lambda: small("vit_medium_patch16_gap_240", in_chans=5),
    "windows": lambda: FeatureMap("swin_tiny_patch4_window7_224", img_size=64).eval(),
    "convolutions": lambda: FeatureMap("resnet18", img_size=64).eval(),
}


# Every layout of transformers with the MLPs that it can have.
HUGGINGFACE = {
    "vit": lambda **changes: small("vit_tiny_patch16_224", **changes),
    "dinov2": lambda **changes: small("vit_small_patch14_dinov2", **changes),
    "dinov2, gated": lambda **changes: small("vit_giant_patch14_dinov2", **changes),
    "dinov2_with_registers": lambda **changes: small("vit_small_patch14_reg4_dinov2", **changes),
    "dinov3_vit": lambda **changes: small("vit_small_patch16_dinov3", **changes),
    "dinov3_vit, biases": lambda **changes: small("vit_small_patch16_dinov3_qkvb", **changes),
    "dinov3_vit, gated": lambda **changes: small("vit_small_plus_patch16_dinov3", **changes),
}
GOLDEN_SIZES = {"img_size": 24, "embed_dim": 24, "num_heads": 2}
