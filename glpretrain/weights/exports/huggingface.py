"""ViTs in the layout of Hugging Face transformers: ViTModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel.

Weights get the names under which such models are published, which old and new versions of transformers read alike. Before anything
is written, what the class computes from the renamed weights (`layouts.Features`) is compared with the encoder; where they differ
(another norm, activation or order), the export is refused. transformers itself is not needed.

Known difference: ViTModel and Dinov2Model resample learned positions without antialiasing, the encoder (timm) with it, so their
features agree at the exported size only. Dinov2WithRegistersModel and DINOv3ViTModel agree at every size.
Left out: heads, and encoders without class token.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from glpretrain.encoders import Encoder, ViT
from glpretrain.weights.exports.base import Written, check_images, difference, write_card
from glpretrain.weights.exports.layouts import DINOV2, DINOV3, LAYOUTS, REGISTERS, VIT, Features, Layout

_WEIGHTS, _CONFIG, _PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
_GELU = {"GELU()", "GELU(approximate='none')"}  # timm's own and torch's
_SILU = {"SiLU()"}
# Other orders of float32 sums over some hundred features of size one stay far below, another activation or norm is far above.
_SAME = 1e-4


def write_huggingface(encoder: Encoder, folder: Path) -> Written:
    """config.json, model.safetensors and preprocessor_config.json, for `transformers.AutoModel.from_pretrained(folder)`.

    Raises:
        ValueError: no class of transformers computes what this encoder does; the message says what stands in the way.
    """
    config, weights = convert(encoder)
    layout, computed = LAYOUTS[config["model_type"]], Features(config, weights)
    with torch.no_grad():
        worst = max(difference(computed(images), encoder(images)) for images in check_images(encoder))
    if not worst < _SAME:
        raise _refusal(encoder, f"{layout.architecture} computes something else from its weights (difference {worst:.1e})")
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses views of shared memory.
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()},
        folder / _WEIGHTS,
        metadata={"format": "pt"},
    )
    for name, values in ((_CONFIG, config), (_PREPROCESSOR, _preprocessor(encoder))):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    write_card(encoder, folder)
    note = f"open with transformers.AutoModel.from_pretrained(FOLDER): a {layout.architecture}"
    if layout.position_resize != encoder.card.arguments.get("position_resize", "timm"):
        note += ", which resamples positions in its own way: for equal features at another size export with --img_size"
    return Written(folder, worst, note)


def convert(encoder: Encoder) -> tuple[dict, dict[str, Tensor]]:
    """The config of a class of transformers, and the weights under its names.

    Raises:
        ValueError: no class has a place for some part of the encoder.
    """
    if not isinstance(encoder, ViT):
        raise _refusal(encoder, "it is no plain ViT")
    state = dict(encoder.backbone_state())
    if "cls_token" not in state:
        raise _refusal(encoder, "it has no class token")
    layout = _choose(encoder, state)
    weights = _prefix(encoder, state, layout=layout) | _rename(encoder, state, layout=layout)
    gated = _gated(encoder, weights, layout=layout)
    config = _config(encoder, weights, gated=gated, layout=layout)
    if gated and layout in (DINOV2, REGISTERS):
        gates = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
        weights = {re.sub(r"mlp\.fc[12]", lambda found: gates[found[0]], name): tensor for name, tensor in weights.items()}
    return config, weights | _unused(weights, width=encoder.embed_dim, depth=encoder.num_layers, layout=layout)


def _refusal(encoder: Encoder, why: str) -> ValueError:
    return ValueError(
        f"export: format='huggingface' cannot hold {encoder.card.arguments['name']}: {why}; accepted: ViTs with a class token and "
        "learned positions, with layer scale and registers or without, and DINOv3's"
    )


def _choose(encoder: ViT, state: dict[str, Tensor]) -> Layout:
    if "pos_embed" not in state:
        rope = dict(encoder.model.named_children()).get("rope")
        if type(rope).__name__ != "RotaryEmbeddingDinoV3":
            raise _refusal(encoder, "its positions are neither learned nor DINOv3's")
        return DINOV3
    layout = REGISTERS if "reg_token" in state else DINOV2 if "blocks.0.ls1.gamma" in state else VIT
    height, width = encoder.card.item_shape[1:]
    if layout is not VIT and height != width:
        raise _refusal(encoder, f"{layout.architecture} takes square positions only, these are for {height} x {width} pixels")
    return layout


def _prefix(encoder: ViT, state: dict[str, Tensor], *, layout: Layout) -> dict[str, Tensor]:
    """Takes tokens and positions out of `state`; the position of a register, which no class has, is added to its token."""
    width = encoder.embed_dim
    weights = {"embeddings.cls_token": state.pop("cls_token")}
    if layout in (REGISTERS, DINOV3):
        weights["embeddings.register_tokens"] = state.pop("reg_token") if "reg_token" in state else torch.zeros(1, 0, width)
    if layout is DINOV3:
        return weights
    positions = state.pop("pos_embed")  # [1 R+N D], or [1 N D] where only patches have one
    count = math.prod(encoder.grid(encoder.card.item_shape))
    of_prefix, of_patches = positions[:, :-count], positions[:, -count:]
    of_cls = of_prefix[:, :1] if of_prefix.shape[1] else torch.zeros(1, 1, width)
    if layout is REGISTERS and of_prefix.shape[1]:
        weights["embeddings.register_tokens"] = weights["embeddings.register_tokens"] + of_prefix[:, 1:]
    weights["embeddings.position_embeddings"] = torch.cat((of_cls, of_patches), dim=1)  # [1 1+N D]
    return weights


def _rename(encoder: ViT, state: dict[str, Tensor], *, layout: Layout) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        block, stem, leaf = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name).groups(default="")
        before = layout.block.format(block) if block else ""
        if stem == "attn.qkv" and len(tensor) == 3 * encoder.embed_dim:
            parts = zip(layout.qkv, tensor.tensor_split(3), strict=True)
            weights |= {before + part + leaf: piece for part, piece in parts}
        elif stem in layout.names:
            weights[before + layout.names[stem] + leaf] = tensor
        else:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise _refusal(encoder, f"{layout.architecture} has no place for {', '.join(unknown[:3])}{more}")
    biased = {name.removesuffix(".bias") for name in weights if name.endswith(".bias")}
    modules = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    if lacking := sorted(name for name in modules - biased if not name.endswith(layout.qkv)):
        raise _refusal(encoder, f"{layout.architecture} wants a bias in {', '.join(lacking[:3])}")
    return weights


def _gated(encoder: ViT, weights: dict[str, Tensor], *, layout: Layout) -> bool:
    """Whether the MLPs are SwiGLU; anything but that or GELU is refused."""
    before = layout.block.format(0)
    wide, narrow = (weights[f"{before}{layout.names[name]}.weight"] for name in ("mlp.fc1", "mlp.fc2"))
    packed = len(wide) == 2 * narrow.shape[1]
    if packed and layout in (VIT, DINOV3):
        raise _refusal(encoder, f"{layout.architecture} has no place for gates in mlp.fc1")
    gated = packed or f"{before}mlp.gate_proj.weight" in weights
    if other := {repr(block.mlp.act) for block in encoder.model.blocks} - (_SILU if gated else _GELU):
        raise _refusal(encoder, f"{layout.architecture} has {'SiLU' if gated else 'GELU'} where it has {', '.join(sorted(other))}")
    return gated


def _config(encoder: ViT, weights: dict[str, Tensor], *, gated: bool, layout: Layout) -> dict:
    card = encoder.card
    height, width = card.item_shape[1:]
    norms = {module.eps for module in encoder.model.modules() if isinstance(module, nn.LayerNorm)}
    if len(norms) != 1:
        raise _refusal(encoder, f"{layout.architecture} has one epsilon for all norms, it has {sorted(norms)}")
    config = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.model.blocks[0].attn.num_heads,
        "hidden_act": "silu" if gated and layout is DINOV3 else "gelu",  # DINOv2's gated class does not look at it
        "layer_norm_eps": norms.pop(),
        "image_size": height if height == width else [height, width],
        "patch_size": card.patch_size[0],
        "num_channels": card.item_shape[0],
        "torch_dtype": "float32",
    }
    before = layout.block.format(0)
    hidden = len(weights[f"{before}{layout.names['mlp.fc1']}.weight"])
    query, key, value = (f"{before}{part}.bias" in weights for part in layout.qkv)
    if layout is VIT:
        return config | {"intermediate_size": hidden, "qkv_bias": query, "pooler_act": "linear", "pooler_output_size": encoder.embed_dim}
    if layout is DINOV3:
        biases = {"query_bias": query, "key_bias": key, "value_bias": value, "proj_bias": True, "mlp_bias": True}
        theta, periods = encoder.model.rope.temperature, encoder.model.rope.periods
        if not torch.allclose(periods, theta ** torch.linspace(0, 1, len(periods) + 1)[:-1], rtol=1e-5):
            raise _refusal(encoder, f"{layout.architecture} has rotary periods that are powers of {theta}, it has others")
        rope = {"rope_theta": theta, "num_register_tokens": encoder.num_prefix_tokens - 1}
        return config | biases | rope | {"intermediate_size": hidden, "use_gated_mlp": gated}
    ratio = next((ratio for ratio in range(1, 17) if _hidden_features(encoder.embed_dim, ratio, gated=gated) == hidden), None)
    if ratio is None:
        raise _refusal(encoder, f"{layout.architecture} has MLPs that are whole multiples of {encoder.embed_dim} wide, not {hidden}")
    config |= {"mlp_ratio": ratio, "qkv_bias": query, "use_swiglu_ffn": gated}
    return config | ({"use_mask_token": False} if layout is DINOV2 else {"num_register_tokens": encoder.num_prefix_tokens - 1})


def _hidden_features(width: int, ratio: int, *, gated: bool) -> int:
    """Rows of the first linear layer; a gated one of DINOv2 keeps two thirds, in eights, twice."""
    return 2 * ((int(width * ratio * 2 / 3) + 7) // 8 * 8) if gated else width * ratio


def _preprocessor(encoder: Encoder) -> dict:
    card = encoder.card
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": card.item_shape[1], "width": card.item_shape[2]},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(card.mean),
        "image_std": list(card.std),
    }


def _unused(weights: dict[str, Tensor], *, width: int, depth: int, layout: Layout) -> dict[str, Tensor]:
    """What a class cannot be told to leave out, so that nothing is random after loading."""
    if layout is VIT:  # its pooler, here one that hands on the class token
        return {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    blocks = [layout.block.format(block) for block in range(depth)]
    scales = {f"{before}layer_scale{number}.lambda1": torch.ones(width) for before in blocks for number in (1, 2)}
    unused = {name: tensor for name, tensor in scales.items() if name not in weights}
    if layout is not DINOV2:
        unused["embeddings.mask_token"] = torch.zeros(1, width) if layout is REGISTERS else torch.zeros(1, 1, width)
    return unused
