"""Published checkpoint files: which format a file is, which of its tensors are the encoder, and what those are called in timm.

Left out: the architecture that the tensors imply (`architecture`), and folders with a configuration (`configured`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from glpretrain.encoders.timm_model import PositionResize
from glpretrain.weights.files import is_state, listed
from glpretrain.weights.imported import State

Which = Literal["teacher", "student"]
_HEADS = {192: 3, 384: 6, 512: 8, 640: 10, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}


Statistics = tuple[list[float], list[float]] | tuple[None, None]

# Mean and std of DINOv3's models of satellite images, whose files are named after their data.
SATELLITE: Statistics = ([0.430, 0.411, 0.296], [0.213, 0.156, 0.143])
# Of FSFM's main data; models of other data have theirs in a text file beside the checkpoint.
_VGGFACE2: Statistics = (
    [0.5482207536697388, 0.42340534925460815, 0.3654651641845703],
    [0.2789176106452942, 0.2438540756702423, 0.23493893444538116],
)


@dataclass(frozen=True)
class Format:
    """What cannot be read off the tensors.

    Args:
        title: as people write it.
        position_resize: how its code takes an image of another size.
        pretraining: start of the names of what only pretraining needs (heads, decoders, mask tokens).
        rename: to timm's names; also drops what no longer has a place.
        heads: attention heads of the published widths.
        statistics: mean and std of the data; None is ImageNet's.
    """

    title: str
    position_resize: PositionResize
    pretraining: str
    rename: Callable[[State], State] = dict
    heads: dict[int, int] = field(default_factory=lambda: _HEADS)
    statistics: Statistics = (None, None)


def _rename_ibot(state: State) -> State:
    return {re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", name): tensor for name, tensor in state.items()}


def _rename_dinov2(state: State) -> State:
    renamed: State = {}
    for name, tensor in state.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # training wraps blocks in chunks, and numbers them through
        name = re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", name)
        name = re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", name)
        renamed["reg_token" if name == "register_tokens" else name] = tensor
    return fold_class_position(renamed)


def fold_class_position(state: State) -> State:
    """With registers, timm adds positions to patches only: the class token's own is added to it for good."""
    if {"reg_token", "cls_token", "pos_embed"} <= state.keys():
        positions = state["pos_embed"]
        state = {**state, "cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return state


def _rename_dinov3(state: State) -> State:
    renamed: State = {}
    for name, tensor in state.items():
        if name.endswith(".attn.qkv.bias_mask"):
            continue
        if name.endswith(".attn.qkv.bias"):
            mask = state.get(f"{name}_mask")
            renamed |= split_bias(name.removesuffix("qkv.bias"), tensor if mask is None else tensor * mask.to(tensor.dtype))
            continue
        name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        for old, new in (("w1", "fc1_g"), ("w2", "fc1_x"), ("w3", "fc2")):
            name = name.replace(f".mlp.{old}.", f".mlp.{new}.")
        renamed["reg_token" if name == "storage_tokens" else name] = tensor
    return renamed


def split_bias(prefix: str, bias: Tensor) -> State:
    """Biases of queries and values as timm's Eva keeps them.

    Raises:
        ValueError: there is a bias of keys: with rotary positions it matters, and Eva has none.
    """
    queries, keys, values = bias.chunk(3)
    if not bias.isfinite().all() or keys.any():
        raise ValueError(f"load_backbone: {prefix}qkv.bias is not finite or has a part for keys; accepted: queries and values only")
    return {f"{prefix}q_bias": queries, f"{prefix}v_bias": values}


FORMATS = {
    "dino": Format("DINO", "dino", r"head\."),
    "ibot": Format("iBOT", "dino", r"head\.|masked_embed$", _rename_ibot),
    "mugs": Format("Mugs", "dino", r"(instance_|local_group_|group_)?head\.|relation_blocks\."),
    "mae": Format("MAE", "bicubic", r"decoder_|mask_token$"),
    "fsfm": Format(
        "FSFM",
        "bicubic",
        r"(rep_)?decoder_|mask_token$|projector\.|predictor\.",
        heads=_HEADS | {384: 12},
        statistics=_VGGFACE2,
    ),
    "deit": Format("DeiT", "bicubic", r"head\."),  # also fine-tuned MAE, and MoCo v3 converted (which needs num_heads=12)
    "dinov2": Format("DINOv2", "dino", r"mask_token$|dino_head\.|ibot_head\.", _rename_dinov2),
    "dinov3": Format(
        "DINOv3",
        "timm",
        r"mask_token$|dino_head\.|ibot_head\.|local_cls_norm\.|rope_embed\.",
        _rename_dinov3,
        {384: 6, 768: 12, 1024: 16, 1152: 18, 1280: 20, 1536: 24, 4096: 32},
    ),
    "mocov3": Format("MoCo v3", "bicubic", r"head\.", heads={384: 12, 768: 12}),
    "msn": Format("MSN", "bicubic", r"(fc|pred)\."),
    "timm": Format("timm", "timm", r"(head|head_dist|attn_pool|fc|classifier)\."),
}


@dataclass(frozen=True)
class Unwrapped:
    """The encoder's tensors under their own names, and what lay around them.

    Args:
        state: of the encoder.
        left_out: names of the other tensors.
        hint: the format, where the wrapping already tells it.
        side: teacher or student, where there were two or it says so.
    """

    state: State
    left_out: tuple[str, ...] = ()
    hint: str | None = None
    side: str = ""


def unwrap(content: object, *, which: Which, path: str) -> Unwrapped:
    """Find the encoder in what a file holds.

    Raises:
        ValueError: there is none that is known.
    """
    if is_state(content):
        return _strip(content, which=which)
    if not isinstance(content, dict):
        raise ValueError(f"load_backbone: {path} holds a {type(content).__name__}; accepted: a dictionary of tensors, also within one")
    for teacher, student, hint in (("teacher", "student", None), ("target_encoder", "encoder", "msn")):
        if is_state(content.get(teacher)) or is_state(content.get(student)):
            key = teacher if which == "teacher" and is_state(content.get(teacher)) else student
            if not is_state(content.get(key)):
                raise ValueError(f"load_backbone: which={which!r} given; {path} holds {_keys(content)}")
            around = {"dino_loss": "dino", "ibot_loss": "ibot", "student_mem": "mugs"}
            hint = hint or next((value for mark, value in around.items() if mark in content), None)
            found = _strip(content[key], which=which)
            return Unwrapped(found.state, found.left_out, hint or found.hint, "student" if key == student else "teacher")
    for key in ("model", "state_dict"):
        if is_state(content.get(key)):
            found = _strip(content[key], which=which)
            return Unwrapped(found.state, found.left_out, found.hint or ("model" if key == "model" else None), found.side)
    raise ValueError(f"load_backbone: {path} is of no known format; it holds {_keys(content)}")


def _strip(state: State, *, which: Which) -> Unwrapped:
    """Take off what wrappers put before every name, and keep the part that is the encoder."""
    for wrapper in ("module.", "_orig_mod."):
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    moco = {"teacher": "momentum_encoder.", "student": "base_encoder."}
    if any(name.startswith(moco[which]) for name in state):
        return _part(state, prefix=moco[which], hint="mocov3", side=which)
    for prefix in ("backbone.", "base_encoder.", "momentum_encoder."):
        if any(name.startswith(prefix) for name in state):
            return _part(state, prefix=prefix, hint=None if prefix == "backbone." else "mocov3", side="")
    return Unwrapped(state)


def _part(state: State, *, prefix: str, hint: str | None, side: str) -> Unwrapped:
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return Unwrapped(own, tuple(sorted(name for name in state if not name.startswith(prefix))), hint, side)


def recognise(found: Unwrapped, *, pickled: bool, path: str) -> str:
    """The format of an encoder's tensors, by what only that format has.

    A plain ViT without any mark is DINO's, whose published files are pickles of just that; as a safetensors file it is timm's.

    Raises:
        ValueError: there is no patch embedding as all of these have it.
    """
    names = found.state.keys()
    if "patch_embed.proj.weight" not in names or not any(re.match(r"blocks\.\d+\.", name) for name in names):
        advice = "; give the folder with its config.json" if any("embeddings.cls_token" in name for name in names) else ""
        raise ValueError(f"load_backbone: {path} is of no known format; it holds {listed(sorted(names))}{advice}")
    marks = (
        ("dinov3", {"storage_tokens", "rope_embed.periods"}),
        ("fsfm", {"rep_decoder_embed.weight"}),  # its target network too, which has no other decoder
        ("mae", {"decoder_embed.weight"}),
        ("mugs", {"relation_blocks.0.norm1.weight"}),
        ("ibot", {"masked_embed"}),
        ("timm", {"reg_token", "fc_norm.weight", "norm_pre.weight", "blocks.0.attn.q_bias", "blocks.0.attn.q_norm.weight"}),
        ("dinov2", {"register_tokens", "mask_token", "blocks.0.0.norm1.weight"}),
        ("ibot", {"blocks.0.gamma_1"}),
    )
    if found.hint in FORMATS:
        return found.hint
    for name, any_of in marks:
        if any_of & names:
            return name
    if found.hint == "model":
        return "deit" if "head.weight" in names else "mae"
    return "timm" if "head.weight" in names or "blocks.0.ls1.gamma" in names or not pickled else "dino"


def in_single_precision(state: State) -> State:
    """Half-precision files as float32; integers as they are."""
    return {name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _keys(content: dict) -> str:
    return listed(sorted(map(str, content)))
