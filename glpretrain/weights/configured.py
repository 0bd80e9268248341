"""Folders whose `config.json` says what the tensors are: timm's `local-dir:` layout and Hugging Face's ViTs.

Left out: models of Hugging Face that are no plain ViT, and configurations that no timm model can express (they are refused).
"""

import re
from pathlib import Path

import torch

from glpretrain.encoders import timm_adapter
from glpretrain.encoders.timm_model import PositionResize, pair
from glpretrain.weights.architecture import infer
from glpretrain.weights.files import read_json, read_weights
from glpretrain.weights.formats import FORMATS, fold_class_position, in_single_precision
from glpretrain.weights.imported import Arguments, LoadedWeights, State

_TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What a timm configuration may say besides, without consequence for an encoder.
_TIMM_IGNORED = {"num_classes", "global_pool", "dynamic_img_size", "strict_img_size", "pretrained_strict"}
_TIMM_TAKEN = {"img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "drop_path_rate"}

_LAYER = r"^(?:encoder\.)?layers?\.(\d+)\."
# Names of Hugging Face's ViTs to timm's. Two spellings of one thing are two versions of their library.
_HUGGINGFACE_NAMES = (
    (r"^(?:vit|dinov2|dinov2_with_registers|dinov3_vit|model)\.(?=embeddings|encoder|layer|norm|pooler|model)", ""),
    (r"^model\.(?=layer)", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?(?=weight|bias)", "patch_embed.proj."),
    (rf"{_LAYER}attention\.(?:attention\.query|q_proj)\.", r"blocks.\1.attn.q."),
    (rf"{_LAYER}attention\.(?:attention\.key|k_proj)\.", r"blocks.\1.attn.k."),
    (rf"{_LAYER}attention\.(?:attention\.value|v_proj)\.", r"blocks.\1.attn.v."),
    (rf"{_LAYER}attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (rf"{_LAYER}(?:layernorm_before|norm1)\.", r"blocks.\1.norm1."),
    (rf"{_LAYER}(?:layernorm_after|norm2)\.", r"blocks.\1.norm2."),
    (rf"{_LAYER}(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.", r"blocks.\1.mlp.fc1."),
    (rf"{_LAYER}(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.", r"blocks.\1.mlp.fc2."),
    (rf"{_LAYER}mlp\.gate_proj\.", r"blocks.\1.mlp.fc1_g."),
    (rf"{_LAYER}mlp\.up_proj\.", r"blocks.\1.mlp.fc1_x."),
    (r"^layernorm\.", "norm."),
)
_HUGGINGFACE_PRETRAINING = r"pooler\.|classifier\.|decoder\.|embeddings\.mask_token$"


def read_timm_folder(folder: Path) -> LoadedWeights:
    """A folder as `timm.create_model("local-dir:FOLDER")` opens it.

    Raises:
        ValueError: the model or one of its arguments is none that an encoder here can have, or see `read_weights`.
    """
    config = read_json(folder / "config.json")
    name = str(config["architecture"]).partition(".")[0]
    encoder = timm_adapter(name)
    given = config.get("model_args", {})
    taken = _TIMM_TAKEN if encoder == "ViT" else {"img_size", "in_chans", "drop_path_rate"}
    if unknown := sorted(set(given) - taken - _TIMM_IGNORED):
        raise ValueError(f"load_backbone: {folder / 'config.json'}: model_args {unknown} given; accepted: {sorted(taken | _TIMM_IGNORED)}")
    pretrained = config.get("pretrained_cfg", config)
    channels, *size = pretrained.get("input_size", (3, 224, 224))
    state, _ = read_weights(folder, names=_TIMM_WEIGHTS)
    arguments: Arguments = {
        "name": name,
        "img_size": size,
        "in_chans": channels,
        "mean": _statistic(pretrained.get("mean")),
        "std": _statistic(pretrained.get("std")),
        "licence": str(pretrained.get("license") or ""),
        "source": f"timm folder {folder.name}",
        **{key: value for key, value in given.items() if key in taken},
    }
    return LoadedWeights("timm folder", encoder, arguments, in_single_precision(state), FORMATS["timm"].pretraining)


def read_huggingface_folder(folder: Path) -> LoadedWeights:
    """A folder of a ViT, DINOv2, DINOv3, MAE or MSN as Hugging Face's library writes it.

    Raises:
        ValueError: another model, an option that no timm model has, or see `read_weights`.
    """
    path = folder / "config.json"
    config = read_json(path)
    kind = str(config["model_type"])
    resizes: dict[str, PositionResize] = {
        "vit": "bicubic",
        "vit_mae": "bicubic",
        "vit_msn": "bicubic",
        "dinov2": "bicubic",
        "dinov2_with_registers": "timm",
        "dinov3_vit": "timm",
    }
    if kind not in resizes:
        raise ValueError(f"load_backbone: {path}: model_type={kind!r} given; accepted: {', '.join(resizes)}")
    gated = bool(config.get("use_gated_mlp"))
    activation = config.get("hidden_act", "gelu")
    if activation != ("silu" if gated else "gelu"):
        raise ValueError(f"load_backbone: {path}: hidden_act={activation!r} given; accepted: {'silu' if gated else 'gelu'}")
    tensors, weights = read_weights(folder, names=_TIMM_WEIGHTS)
    state = _from_huggingface(in_single_precision(tensors), rotary=kind == "dinov3_vit", gated=gated)
    if "patch_embed.proj.weight" not in state:
        raise ValueError(f"load_backbone: {folder / weights} has no patch embedding of a {kind}")
    heads = config.get("num_attention_heads")
    periods = None
    if kind == "dinov3_vit" and isinstance(heads, int):
        # As their code spells it, in float32.
        periods = float(config.get("rope_theta", 100.0)) ** torch.arange(0, 1, 4 * heads / state["cls_token"].shape[-1])
    arguments, state, assumed = infer(state, name=None, num_heads=heads, heads={}, periods=periods, path=str(folder))
    if "pos_embed" not in state and "image_size" in config:
        arguments["img_size"] = list(pair(config["image_size"]))
    preprocessing = read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
    arguments |= {
        "position_resize": resizes[kind],
        "norm_eps": float(config.get("layer_norm_eps", 1e-6)),
        "mean": _statistic(preprocessing.get("image_mean")),
        "std": _statistic(preprocessing.get("image_std")),
        "source": f"Hugging Face folder {folder.name}",
    }
    return LoadedWeights(f"Hugging Face {kind}", "ViT", arguments, state, _HUGGINGFACE_PRETRAINING, assumed=assumed)


def _from_huggingface(tensors: State, *, rotary: bool, gated: bool) -> State:
    state: State = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _HUGGINGFACE_NAMES:
            name = re.sub(pattern, replacement, name)
        if rotary:
            name = re.sub(rf"{_LAYER}layer_scale([12])\.lambda1$", r"blocks.\1.gamma_\2", name)
            name = name if gated else name.replace(".mlp.fc1_x.", ".mlp.fc1.")
        else:
            name = re.sub(rf"{_LAYER}layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma", name)
        state[name] = tensor
    for prefix in sorted({found[1] for name in state if (found := re.match(r"(blocks\.\d+\.attn\.)[qkv]\.", name))}):
        _join(state, prefix, "weight")
        if rotary:
            for part in ("q", "v"):
                if f"{prefix}{part}.bias" in state:
                    state[f"{prefix}{part}_bias"] = state.pop(f"{prefix}{part}.bias")
        else:
            _join(state, prefix, "bias")
    return fold_class_position(state) if not rotary else state


def _join(state: State, prefix: str, kind: str) -> None:
    """Queries, keys and values in one tensor, where all three are there."""
    names = [f"{prefix}{part}.{kind}" for part in ("q", "k", "v")]
    if all(name in state for name in names):
        state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(name) for name in names])


def _statistic(values: list[float] | tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]
