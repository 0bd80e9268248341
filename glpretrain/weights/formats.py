"""Published checkpoint files: the format of an encoder's tensors, and the arguments of `ViT` that fit them.

Left out: finding the encoder in a file (`halves`), the names of each format (`names`), and folders whose configuration says all this
(`published`).
"""

import math
import re
from pathlib import Path

from torch import Tensor

from glpretrain.encoders.timm_model import ratio_of
from glpretrain.weights.files import State, listed
from glpretrain.weights.halves import Unwrapped
from glpretrain.weights.names import FILES
from glpretrain.weights.report import Arguments

# By class token, number of registers, layer scale and gated MLP: the timm model that has just these, in any size.
_MODELS = {
    (True, 0, False, False): "vit_{size}_patch16_224",
    (True, 0, True, False): "vit_{size}_patch14_dinov2",
    (True, 4, True, False): "vit_{size}_patch14_reg4_dinov2",
    (True, 0, True, True): "vit_giant_patch14_dinov2",
    (True, 4, True, True): "vit_giant_patch14_reg4_dinov2",
    (False, 0, False, False): "vit_base_patch16_gap_224",
    (False, 4, True, False): "vit_medium_patch16_reg4_gap_256",
}
_JOINT_BIAS = "blocks.0.attn.qkv.bias"  # of a model with rotary positions: keys have a bias too
_SIZES = {384: "small", 768: "base", 1024: "large"}

# Names that occur in the files of one format only, in the order in which they decide.
_MARKS = (
    ("dinov3", {"storage_tokens", "rope_embed.periods"}),
    ("fsfm", {"rep_decoder_embed.weight"}),  # also in the file of its target network, which has no pixel decoder
    ("mae", {"decoder_embed.weight"}),
    ("mugs", {"relation_blocks.0.norm1.weight"}),
    ("ibot", {"masked_embed"}),
    ("timm", {"reg_token", "fc_norm.weight", "norm_pre.weight", "blocks.0.attn.q_bias", "blocks.0.attn.q_norm.weight"}),
    ("dinov2", {"register_tokens", "mask_token", "blocks.0.0.norm1.weight"}),
    ("ibot", {"blocks.0.gamma_1"}),
)


def recognise(found: Unwrapped, *, path: Path) -> str:
    """The format of an encoder's tensors, a key of `names.FILES`, by the names that only this format has.

    A plain ViT without any mark is taken for DINO's, whose published files are pickles of just that, and for timm's in a safetensors file.

    Raises:
        ValueError: there is no patch embedding under the name that all of these formats share.
    """
    names = found.state.keys()
    if "patch_embed.proj.weight" not in names or not any(re.match(r"blocks\.\d+\.", name) for name in names):
        advice = "; give the folder with its config.json" if any("embeddings.cls_token" in name for name in names) else ""
        raise ValueError(f"load_backbone: {path} is of no known format; it holds {listed(sorted(names))}{advice}")
    if found.hint in FILES:
        return found.hint
    if found.state["patch_embed.proj.weight"].shape[1:2] == (1,):  # one channel: the only published ones are of spectrograms
        if "dist_token" in names:
            return "ast"
        if "head_recons.convTrans.weight" in found.left_out:
            return "asit"
    if marked := next((format for format, marks in _MARKS if marks & names), None):
        return marked
    if found.hint == "model":
        return "deit" if "head.weight" in names else "mae"
    plain = "head.weight" not in names and "blocks.0.ls1.gamma" not in names
    return "dino" if plain and path.suffix != ".safetensors" else "timm"


def infer(
    state: State,
    *,
    name: str | None,
    num_heads: int | None,
    heads: dict[int, int],
    periods: Tensor | None,
    path: Path,
    img_size: tuple[int, int] | None = None,
) -> tuple[Arguments, State, list[str]]:
    """The arguments of `ViT` that fit these tensors, at the image size that they were trained on.

    Args:
        state: tensors under timm's names.
        name: name of the timm model; None reads it off the tensors.
        num_heads: number of attention heads; None takes it from `periods` or else from `heads`.
        heads: number of attention heads of the published models by width.
        periods: Float[P] of DINOv3's rotary positions; None where positions are learned.
        path: file or folder, for messages.
        img_size: height and width that learned positions were made for; None takes a square.

    Returns:
        The arguments, the tensors (with zeros for the biases of queries, keys and values where a file does without them), and what had
        to be assumed.

    Raises:
        ValueError: the tensors belong to no known architecture, or the number of heads is not known.
    """
    weight = state["patch_embed.proj.weight"]
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"load_backbone: {path}: patch_embed.proj.weight has shape {tuple(weight.shape)}; accepted: square patches")
    embed_dim, in_chans, patch_size, _ = weight.shape
    if num_heads is None and periods is not None:
        num_heads = embed_dim // (4 * periods.numel())
    num_heads, assumed = heads_of(embed_dim, num_heads=num_heads, published=heads, path=path)
    depth = num_blocks(state)
    if name is None:
        name = _name(state, embed_dim=embed_dim, path=path)
        if "dinov3" not in name and not any(key.endswith(".attn.qkv.bias") for key in state):
            state = state | {f"blocks.{block}.attn.qkv.bias": weight.new_zeros(3 * embed_dim) for block in range(depth)}
            assumed.append("zeros for the biases of queries, keys and values, which the file does without")
    arguments: Arguments = {
        "name": name,
        "img_size": _img_size(state, patch_size=patch_size, path=path, known=img_size),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": _mlp_ratio(state, embed_dim=embed_dim),
        "rope_periods": None if periods is None else periods.tolist(),
        **({"key_bias": True} if periods is not None and _JOINT_BIAS in state else {}),
    }
    return arguments, state, assumed


def heads_of(embed_dim: int, *, num_heads: int | None, published: dict[int, int], path: Path) -> tuple[int, list[str]]:
    """The number of attention heads, which leaves no trace in any shape, and what had to be assumed.

    Args:
        embed_dim: width of the encoder.
        num_heads: number that is known; None takes the published one.
        published: number of heads of the published models by width.
        path: file or folder, for messages.

    Raises:
        ValueError: the number is not known and no model of this width was published.
    """
    if num_heads is not None:
        return num_heads, []
    if embed_dim not in published:
        raise ValueError(f"load_backbone: {path} is {embed_dim} wide, none of the published {sorted(published)}; give num_heads")
    return published[embed_dim], [f"{published[embed_dim]} heads, as published at width {embed_dim}"]


def num_blocks(state: State) -> int:
    """Number of blocks whose tensors there are."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)


def _name(state: State, *, embed_dim: int, path: Path) -> str:
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    if "blocks.0.gamma_1" in state and registers == 4 and "pos_embed" not in state:
        bias = "" if state.keys().isdisjoint(("blocks.0.attn.q_bias", _JOINT_BIAS)) else "_qkvb"
        gated = "blocks.0.mlp.fc1_g.weight" in state
        return f"vit_small_plus_patch16_dinov3{bias}" if gated else f"vit_{_SIZES.get(embed_dim, 'base')}_patch16_dinov3{bias}"
    traits = ("cls_token" in state, registers, "blocks.0.ls1.gamma" in state, is_gated(state))
    if traits not in _MODELS or "blocks.0.gamma_1" in state:
        raise ValueError(
            f"load_backbone: {path}: no timm model is known with class token {traits[0]}, {registers} registers, layer scale {traits[2]}, "
            f"gated MLP {traits[3]}; give name, the name of a ViT of timm"
        )
    return _MODELS[traits].format(size=_SIZES.get(embed_dim, "base"))


def is_gated(state: State) -> bool:
    """Whether both halves of a gated MLP (SwiGLU) lie in one tensor, judged by the first block."""
    inner, outer = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    return inner is not None and outer is not None and inner.shape[0] == 2 * outer.shape[1]


def _mlp_ratio(state: State, *, embed_dim: int) -> float | None:
    for key in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1_g.weight"):
        if key in state:
            return ratio_of(state[key].shape[0], embed_dim=embed_dim)
    return None


def _img_size(state: State, *, patch_size: int, path: Path, known: tuple[int, int] | None) -> list[int]:
    """Height and width for the grid of learned positions, a square where they are not known; DINOv3's 14 x 14 patches without positions.

    Learned positions may or may not include the class token and the registers.
    """
    if "pos_embed" not in state:
        return [14 * patch_size] * 2 if known is None else list(known)
    count = state["pos_embed"].shape[1]
    prefix = int("cls_token" in state) + int("dist_token" in state)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    # Models with registers usually give positions to patches only; the others give one to the class token too.
    for tokens in (count, count - prefix - registers) if registers else (count - prefix, count):
        if known is not None and tokens == (known[0] // patch_size) * (known[1] // patch_size):
            return list(known)
        if known is None and tokens > 0 and math.isqrt(tokens) ** 2 == tokens:
            return [math.isqrt(tokens) * patch_size] * 2
    grid = "a square grid" if known is None else f"those of {known[0]} x {known[1]} pixels"
    raise ValueError(f"load_backbone: {path}: {count} positions in pos_embed; accepted: {grid}, with or without class token")
