"""Where the ViTs of Hugging Face transformers keep their weights, and what they compute from them at the size they are made for.

Left out: conversion (`huggingface`), and position resampling, which an export at the wanted size does not need.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core.types import EncoderOutput


@dataclass(frozen=True)
class Layout:
    """One class of transformers, by the names under which its weights are published.

    Args:
        architecture: name of the class.
        model_type: its key in config.json.
        block: what stands before the names of a block.
        qkv: query, key and value within a block.
        names: timm's name of a module (or of a bare parameter) to theirs, within a block or outside.
        position_resize: how it resamples learned positions to another size; timm's is bicubic with antialiasing.
    """

    architecture: str
    model_type: str
    block: str
    qkv: tuple[str, str, str]
    names: dict[str, str]
    position_resize: Literal["timm", "bicubic"]


_OLDER = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "attn.proj": "attention.output.dense",
}
_OLDER_BLOCK = "encoder.layer.{}."
_OLDER_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_DINOV2_NAMES = _OLDER | {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
VIT = Layout(
    architecture="ViTModel",
    model_type="vit",
    block=_OLDER_BLOCK,
    qkv=_OLDER_QKV,
    names=_OLDER
    | {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    position_resize="bicubic",
)
DINOV2 = Layout(
    architecture="Dinov2Model",
    model_type="dinov2",
    block=_OLDER_BLOCK,
    qkv=_OLDER_QKV,
    names=_DINOV2_NAMES,
    position_resize="bicubic",
)
REGISTERS = Layout(
    architecture="Dinov2WithRegistersModel",
    model_type="dinov2_with_registers",
    block=_OLDER_BLOCK,
    qkv=_OLDER_QKV,
    names=_DINOV2_NAMES,
    position_resize="timm",
)
DINOV3 = Layout(
    architecture="DINOv3ViTModel",
    model_type="dinov3_vit",
    block="layer.{}.",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    names={
        "patch_embed.proj": "embeddings.patch_embeddings",
        "norm": "norm",
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "attention.o_proj",
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc1_x": "mlp.up_proj",
        "mlp.fc1_g": "mlp.gate_proj",
        "mlp.fc2": "mlp.down_proj",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
    },
    position_resize="timm",
)
LAYOUTS = {layout.model_type: layout for layout in (VIT, DINOV2, REGISTERS, DINOV3)}


class Features:
    """What a class of transformers computes from its config and weights.

    Args:
        config: config.json.
        weights: under the published names.
    """

    def __init__(self, config: dict, weights: dict[str, Tensor]) -> None:
        self._config, self._weights = config, weights
        self._layout = LAYOUTS[config["model_type"]]

    def __call__(self, images: Tensor) -> EncoderOutput:
        """Float[B C H W] at the size of the config."""
        names, patch = self._layout.names, self._config["patch_size"]
        stem = names["patch_embed.proj"]
        cells = F.conv2d(images, self._weights[f"{stem}.weight"], self._weights[f"{stem}.bias"], stride=patch)  # [B D h w]
        patches = cells.flatten(2).transpose(1, 2)  # [B N D]
        cls = self._weights["embeddings.cls_token"]  # [1 1 D]
        rope = None
        if self._layout is DINOV3:
            rope = self._rope(*cells.shape[2:])
        else:
            positions = self._weights["embeddings.position_embeddings"]  # [1 1+N D]
            cls, patches = cls + positions[:, :1], patches + positions[:, 1:]
        prefix = [cls]
        if "embeddings.register_tokens" in self._weights:
            prefix.append(self._weights["embeddings.register_tokens"])
        tokens = torch.cat([*(token.expand(len(images), -1, -1) for token in prefix), patches], dim=1)  # [B T D]
        for block in range(self._config["num_hidden_layers"]):
            tokens = self._block(tokens, before=self._layout.block.format(block), rope=rope)
        tokens = self._norm(tokens, names["norm"])
        return EncoderOutput(cls=tokens[:, 0], patches=tokens[:, -patches.shape[1] :])

    def _block(self, tokens: Tensor, *, before: str, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        names, heads = self._layout.names, self._config["num_attention_heads"]
        inner = self._norm(tokens, before + names["norm1"])
        query, key, value = (self._linear(inner, before + part).unflatten(-1, (heads, -1)).transpose(1, 2) for part in self._layout.qkv)
        if rope is not None:
            query, key = _rotate(query, *rope), _rotate(key, *rope)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # [B T D]
        scale = self._weights.get(before + "layer_scale1.lambda1", torch.ones(()))
        tokens = tokens + scale * self._linear(attended, before + names["attn.proj"])
        inner = self._norm(tokens, before + names["norm2"])
        scale = self._weights.get(before + "layer_scale2.lambda1", torch.ones(()))
        return tokens + scale * self._mlp(inner, before=before)

    def _mlp(self, inner: Tensor, *, before: str) -> Tensor:
        names = self._layout.names
        if before + "mlp.weights_in.weight" in self._weights:
            gate, inner = self._linear(inner, before + "mlp.weights_in").tensor_split(2, dim=-1)
            return self._linear(F.silu(gate) * inner, before + "mlp.weights_out")
        hidden = self._linear(inner, before + names["mlp.fc1"])
        if before + "mlp.gate_proj.weight" in self._weights:
            hidden = F.silu(self._linear(inner, before + "mlp.gate_proj")) * hidden
        else:
            hidden = F.gelu(hidden)
        return self._linear(hidden, before + names["mlp.fc2"])

    def _linear(self, inner: Tensor, name: str) -> Tensor:
        return F.linear(inner, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, inner: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(inner, weight.shape, weight, bias, self._config["layer_norm_eps"])

    def _rope(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, Float[N D/heads] each: centres of cells in [-1, 1], one period per quarter of the head's channels."""
        head_dim = self._config["hidden_size"] // self._config["num_attention_heads"]
        periods = self._config["rope_theta"] ** torch.arange(0, 1, 4 / head_dim)
        axes = [(torch.arange(length) + 0.5) / length * 2 - 1 for length in (rows, columns)]
        centres = torch.cartesian_prod(*axes)  # [N 2]
        angles = (2 * math.pi * centres.unsqueeze(-1) / periods).flatten(1).tile(2)  # [N D/heads]
        return angles.cos(), angles.sin()


def _rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the patches, Float[B heads T D/heads] whose last N tokens they are."""
    prefix, patches = tokens.split([tokens.shape[2] - len(cos), len(cos)], dim=2)
    first, second = patches.tensor_split(2, dim=-1)
    return torch.cat((prefix, patches * cos + torch.cat((-second, first), dim=-1) * sin), dim=2)
