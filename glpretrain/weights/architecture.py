"""The arguments of `ViT` that fit tensors under timm's names, read off their names and shapes.

Left out: attention heads, which leave no trace in any shape: they come from a table of published widths, or from the caller.
"""

import math
import re

from torch import Tensor

from glpretrain.weights.imported import Arguments, State

# (class token, registers, layer scale, gated hidden layer) to the timm model that has just these, in any size.
_PLAIN = {
    (True, 0, False, False): "vit_{size}_patch16_224",
    (True, 0, True, False): "vit_{size}_patch14_dinov2",
    (True, 4, True, False): "vit_{size}_patch14_reg4_dinov2",
    (True, 0, True, True): "vit_giant_patch14_dinov2",
    (True, 4, True, True): "vit_giant_patch14_reg4_dinov2",
    (False, 0, False, False): "vit_base_patch16_gap_224",
    (False, 4, True, False): "vit_medium_patch16_reg4_gap_256",
}
_SIZES = {384: "small", 768: "base", 1024: "large"}


def infer(
    state: State, *, name: str | None, num_heads: int | None, heads: dict[int, int], periods: Tensor | None, path: str
) -> tuple[Arguments, State, tuple[str, ...]]:
    """Arguments of `ViT` for these tensors at the size that they were trained on.

    Args:
        state: under timm's names.
        name: of the timm model; read off the tensors when None.
        num_heads: None takes it from the rotary periods, else from `heads`.
        heads: of the published widths.
        periods: Float[P] of DINOv3's rotary positions.
        path: for messages.

    Returns:
        The arguments, the tensors (with zeros for the biases of queries, keys and values where a file does without any), and what
        had to be assumed.

    Raises:
        ValueError: the tensors belong to no known architecture, or the heads are not known.
    """
    weight = state["patch_embed.proj.weight"]
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"load_backbone: {path}: patch_embed.proj.weight has shape {tuple(weight.shape)}; accepted: square patches")
    embed_dim, in_chans, patch_size, _ = weight.shape
    depth = 1 + max(int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key)))
    assumed: list[str] = []
    if num_heads is None and periods is not None:
        num_heads = embed_dim // (4 * periods.numel())
    if num_heads is None:
        if embed_dim not in heads:
            raise ValueError(f"load_backbone: {path} is {embed_dim} wide, none of the published {sorted(heads)}; give num_heads")
        num_heads = heads[embed_dim]
        assumed.append(f"{num_heads} heads, as published at width {embed_dim}")
    if name is None:
        name = _name(state, embed_dim=embed_dim, path=path)
        if "dinov3" not in name and not any(key.endswith(".attn.qkv.bias") for key in state):
            biases = {f"blocks.{block}.attn.qkv.bias": weight.new_zeros(3 * embed_dim) for block in range(depth)}
            state = {**state, **biases}
            assumed.append("zeros for the biases of queries, keys and values, which the file does without")
    arguments: Arguments = {
        "name": name,
        "img_size": _img_size(state, patch_size=patch_size, path=path),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": _mlp_ratio(state, embed_dim=embed_dim),
        "rope_periods": None if periods is None else periods.tolist(),
    }
    return arguments, state, tuple(assumed)


def _name(state: State, *, embed_dim: int, path: str) -> str:
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    if "blocks.0.gamma_1" in state and registers == 4 and "pos_embed" not in state:
        bias = "_qkvb" if "blocks.0.attn.q_bias" in state else ""
        gated = "blocks.0.mlp.fc1_g.weight" in state
        return f"vit_small_plus_patch16_dinov3{bias}" if gated else f"vit_{_SIZES.get(embed_dim, 'base')}_patch16_dinov3{bias}"
    traits = ("cls_token" in state, registers, "blocks.0.ls1.gamma" in state, _is_gated(state))
    if traits not in _PLAIN or "blocks.0.gamma_1" in state:
        raise ValueError(
            f"load_backbone: {path}: no timm model is known with class token {traits[0]}, {registers} registers, layer scale {traits[2]}, "
            f"gated hidden layer {traits[3]}; give name, a ViT of timm"
        )
    return _PLAIN[traits].format(size=_SIZES.get(embed_dim, "base"))


def _is_gated(state: State) -> bool:
    inner, outer = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    return inner is not None and outer is not None and inner.shape[0] == 2 * outer.shape[1]


def _mlp_ratio(state: State, *, embed_dim: int) -> float | None:
    for key in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1_g.weight"):
        if key in state:
            hidden = state[key].shape[0]
            ratio = hidden / embed_dim
            # timm rounds the product down.
            return ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf)
    return None


def _img_size(state: State, *, patch_size: int, path: str) -> list[int]:
    """Of the grid of learned positions, which may or may not count class token and registers; DINOv3's 224 where there are none."""
    if "pos_embed" not in state:
        return [14 * patch_size] * 2
    count = state["pos_embed"].shape[1]
    prefix = int("cls_token" in state)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    # Models with registers give positions to patches only, as a rule; the others count the class token.
    for tokens in (count, count - prefix - registers) if registers else (count - prefix, count):
        if tokens > 0 and math.isqrt(tokens) ** 2 == tokens:
            return [math.isqrt(tokens) * patch_size] * 2
    raise ValueError(f"load_backbone: {path}: {count} positions in pos_embed; accepted: a square grid, with or without class token")
