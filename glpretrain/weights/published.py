"""Reading what others publish: folders of timm and Hugging Face, and checkpoint files of images and of point clouds.

Left out: the names of the tensors (`names`), the format and the arguments of a plain file (`formats`), models of Hugging Face that are
not plain ViTs, and configurations that no timm model can express (they are refused).
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from glpretrain.encoders import timm_adapter
from glpretrain.encoders.timm_model import EVA_REGISTERS, GATED, block_of, pair
from glpretrain.weights.files import State, in_single_precision, numbers, read_json, read_weights, section
from glpretrain.weights.formats import heads_of, infer, is_gated, num_blocks, recognise
from glpretrain.weights.halves import Unwrapped, unwrap
from glpretrain.weights.names import FILES, HUGGINGFACE, POINT_MAE, POS_BERT, SATELLITE
from glpretrain.weights.report import Arguments, LoadedWeights, LoadOptions
from glpretrain.weights.spectrograms import infer_spectrograms

# What a timm configuration may say without consequence for an encoder, and what becomes an argument of the encoder.
_TIMM_IGNORED = {"num_classes", "global_pool", "dynamic_img_size", "strict_img_size", "pretrained_strict", "fc_norm", "use_fc_norm"}
_TIMM_TAKEN = {"img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "drop_path_rate"}
_TIMM_TAKEN |= {"init_values", "reg_tokens", "no_embed_class", "key_bias"}
# Classes that a configuration may name: those of plain MLPs, and those of gated ones.
_TIMM_LAYERS = {"mlp_layer": (("Mlp",), ("SwiGLUPacked",)), "act_layer": (("GELU", "gelu"), ("SiLU", "silu"))}

# What an AST's configuration calls frames and bins, and the steps between patches along them, with the defaults of transformers.
_AST_SIZE, _AST_STRIDE = (("max_length", 1024), ("num_mel_bins", 128)), (("time_stride", 10), ("frequency_stride", 10))
_LARGEST_COUNT = 65_536

# CONCH is a model of images and texts (CoCa). Its image tower is a timm ViT with an attention pool behind it.
_CONCH_KEPT = r"visual\.(trunk|attn_pool_contrast|ln_contrast)\."
_CONCH_POOL_HEADS = 8
_CONCH_STATISTICS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])  # conch/open_clip_custom: OpenAI's

# A tensor that only one of the two families of point transformers has.
_POINT_MARK, _POS_MARK = "encoder.first_conv.0.weight", "gather_local_0.conv1.weight"


def read_timm_folder(folder: Path) -> LoadedWeights:
    """A folder that `timm.create_model("local-dir:FOLDER")` opens.

    Raises:
        ValueError: the model or one of its arguments has no counterpart in our encoders, or see `read_weights`.
    """
    path = folder / "config.json"
    config = read_json(path)
    name = str(config["architecture"]).partition(".")[0]
    encoder = timm_adapter(name)
    given, pretrained = section(config, "model_args", path=path), section(config, "pretrained_cfg", path=path) or config
    given = {"reg_tokens" if key == EVA_REGISTERS else key: value for key, value in given.items()}
    if "dinov3" in name and given.get("attn_type") == "rope":  # timm's attention whose keys have a bias
        given = {key: value for key, value in given.items() if key != "attn_type"} | {"key_bias": True}
    taken = _TIMM_TAKEN if encoder == "ViT" else {"img_size", "in_chans", "drop_path_rate"}
    layers = {layer: str(given.pop(layer)).rpartition(".")[2] for layer in _TIMM_LAYERS if layer in given}
    if unknown := sorted(set(given) - taken - _TIMM_IGNORED):
        accepted = sorted(taken | _TIMM_IGNORED | set(_TIMM_LAYERS))
        raise ValueError(f"load_backbone: {path}: model_args {unknown} given; accepted: {accepted}")
    channels, *size = numbers(pretrained.get("input_size", (3, 224, 224)), name="input_size") or [3]
    img_size = pair(given.get("img_size", [int(side) for side in size]))
    arguments: Arguments = {
        "name": name,
        "in_chans": int(channels),
        "mean": numbers(pretrained.get("mean"), name="mean"),
        "std": numbers(pretrained.get("std"), name="std"),
        "licence": str(pretrained.get("license") or ""),
        "source": f"timm folder {folder.name}",
        **{key: value for key, value in given.items() if key in taken},
        "img_size": list(img_size),
    }
    state, assumed = in_single_precision(read_weights(folder), path=folder), []
    gated = encoder == "ViT" and "patch_embed.proj.weight" in state and is_gated(state)
    for layer, choices in _TIMM_LAYERS.items():
        if layer in layers and layers[layer] not in choices[gated]:
            accepted = ", ".join(choices[gated])
            raise ValueError(f"load_backbone: {path}: {layer}={layers[layer]!r} given; accepted for these weights: {accepted}")
    if gated and not (block := block_of(name)).gated:  # added by code that no config.json can hold
        heads = given.get("num_heads", block.num_heads)
        shape, state, _ = infer(state, name=GATED, num_heads=heads, heads={}, periods=None, path=folder, img_size=img_size)
        arguments |= {key: shape[key] for key in ("name", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
        assumed.append(f"gated MLPs (SwiGLUPacked with SiLU), so {name} is built as {GATED} of the same size")
    return LoadedWeights("timm folder", encoder, arguments, state, FILES["timm"].pretraining, assumed=tuple(assumed))


def read_huggingface_folder(folder: Path) -> LoadedWeights:
    """A folder of a ViT, DINOv2, DINOv3, MAE or MSN that Hugging Face transformers wrote.

    Raises:
        ValueError: the folder holds another model or an option that no timm model has, or see `read_weights`.
    """
    path = folder / "config.json"
    config = read_json(path)
    kind = str(config["model_type"])
    if kind not in HUGGINGFACE:
        raise ValueError(f"load_backbone: {path}: model_type={kind!r} given; accepted: {', '.join(HUGGINGFACE)}")
    layout, gated = HUGGINGFACE[kind], bool(config.get("use_gated_mlp"))
    activation, accepted = config.get("hidden_act", "gelu"), "silu" if gated else "gelu"
    if activation != accepted:
        raise ValueError(f"load_backbone: {path}: hidden_act={activation!r} given; accepted: {accepted}")
    state = layout.to_timm(in_single_precision(read_weights(folder), path=folder), gated=gated)
    if "patch_embed.proj.weight" not in state:
        raise ValueError(f"load_backbone: the weights in {folder} have no patch embedding of a {kind}")
    heads, periods = config.get("num_attention_heads"), None
    if kind == "dinov3_vit" and isinstance(heads, int):
        # In float32, as their code computes it.
        periods = _number(config, "rope_theta", 100.0) ** torch.arange(0, 1, 4 * heads / state["cls_token"].shape[-1])
    size = pair(config["image_size"]) if "image_size" in config else None
    mean, std = layout.statistics
    if layout.modality == "audio":
        size, stride = ((_count(config, one), _count(config, other)) for one, other in (_AST_SIZE, _AST_STRIDE))
        arguments, state, assumed = infer_spectrograms(state, name=None, num_heads=heads, heads={}, path=folder, size=size, stride=stride)
    else:
        arguments, state, assumed = infer(state, name=None, num_heads=heads, heads={}, periods=periods, path=folder, img_size=size)
    preprocessing = read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
    arguments |= {
        "position_resize": layout.position_resize,
        "norm_eps": _number(config, "layer_norm_eps", 1e-6),
        "mean": numbers(preprocessing.get("image_mean"), name="image_mean") or mean,
        "std": numbers(preprocessing.get("image_std"), name="image_std") or std,
        "source": f"Hugging Face folder {folder.name}",
    }
    return LoadedWeights(layout.title, "ViT", arguments, state, layout.pretraining, assumed=tuple(assumed))


def _count(config: dict, names: tuple[str, int]) -> int:
    """A positive whole number of a configuration, by its name and its default."""
    name, default = names
    value = config.get(name, default)
    if type(value) is not int or not 1 <= value <= _LARGEST_COUNT:
        raise ValueError(f"load_backbone: {name}={value!r} found; accepted: a whole number from 1 to {_LARGEST_COUNT}")
    return value


def _number(config: dict, name: str, default: float) -> float:
    (value,) = numbers([config.get(name, default)], name=name) or [default]
    return value


def read_published_file(content: object, options: LoadOptions, *, path: Path) -> LoadedWeights:
    """A published checkpoint of an encoder of images or points.

    Args:
        content: what the file holds.
        options: options of `load_backbone`.
        path: the file, for its name and for messages.

    Raises:
        ValueError: the format or the architecture is not known, see `unwrap`, `recognise` and `infer`.
    """
    found = unwrap(content, which=options.get("which", "teacher"), path=path)
    state = in_single_precision(found.state, path=path)
    if _POINT_MARK in state or _POS_MARK in state:
        return _read_points(replace(found, state=state), num_heads=options.get("num_heads"), path=path)
    if "visual.attn_pool_contrast.query" in state and "visual.trunk.patch_embed.proj.weight" in state:
        return _read_conch(state, options, path=path)
    format = options.get("format") or recognise(found, path=path)
    layout, periods = FILES[format], state.get("rope_embed.periods")
    state = layout.to_timm(_split_biases(state) if format == "dinov3" else state)
    given = {"name": options.get("name"), "num_heads": options.get("num_heads"), "heads": layout.heads, "path": path}
    is_sound = layout.modality == "audio"
    arguments, state, assumed = infer_spectrograms(state, **given) if is_sound else infer(state, **given, periods=periods)
    mean, std = SATELLITE if format == "dinov3" and "sat493m" in path.name else layout.statistics
    title = f"{layout.title} ({found.side})" if found.side else layout.title
    arguments |= {
        # DINOv2 resizes the positions of its models with registers as timm does.
        "position_resize": "timm" if format == "dinov2" and "reg_token" in state else layout.position_resize,
        "mean": mean,
        "std": std,
        "source": f"{title}, {path.name}",
    }
    return LoadedWeights(
        title, "ViT", arguments, state, layout.pretraining, found.left_out, tuple(assumed), ("format", "name", "num_heads")
    )


def _split_biases(state: State) -> State:
    """DINOv3's joint biases as timm's Eva keeps them: one for queries and one for values. They stay joint where keys of any block have
    one too (official `mask_k_bias: false`), which matters with rotary positions.

    Raises:
        ValueError: a bias is not finite, as where the model was built and never initialised.
    """
    split: State = {}
    joint: State = {}
    for name, tensor in state.items():
        if name.endswith(".attn.qkv.bias"):
            mask = state.get(f"{name}_mask")
            joint[name] = tensor if mask is None else tensor * mask.to(tensor.dtype)
            if not joint[name].isfinite().all():
                raise ValueError(f"load_backbone: {name}, or its mask, is not finite")
        elif not name.endswith(".attn.qkv.bias_mask"):
            split[name] = tensor
    if any(bias.tensor_split(3)[1].any() for bias in joint.values()):
        return split | joint
    for name, bias in joint.items():
        queries, _, values = bias.tensor_split(3)
        prefix = name.removesuffix("qkv.bias")
        split |= {f"{prefix}q_bias": queries, f"{prefix}v_bias": values}
    return split


def _read_conch(state: State, options: LoadOptions, *, path: Path) -> LoadedWeights:
    """The image tower; the text tower, the decoder and the pool that the decoder reads are left out."""
    kept = {name.removeprefix("visual."): tensor for name, tensor in state.items() if re.match(_CONCH_KEPT, name)}
    trunk = {name.removeprefix("trunk."): tensor for name, tensor in kept.items() if name.startswith("trunk.")}
    heads = FILES["timm"].heads
    found, _, assumed = infer(trunk, name=options.get("name"), num_heads=options.get("num_heads"), heads=heads, periods=None, path=path)
    mean, std = _CONCH_STATISTICS
    arguments = {name: value for name, value in found.items() if name != "rope_periods"} | {
        "pool_dim": kept["attn_pool_contrast.query"].shape[1],
        "pool_heads": _CONCH_POOL_HEADS,
        "mean": mean,
        "std": std,
        "source": f"CONCH, {path.name}",
    }
    assumed = (*assumed, f"{_CONCH_POOL_HEADS} heads of the pool, as published")
    left_out = tuple(sorted(name for name in state if not re.match(_CONCH_KEPT, name)))
    return LoadedWeights("CONCH", "PooledViT", arguments, kept, left_out=left_out, assumed=assumed, hints=("name", "num_heads"))


def _read_points(found: Unwrapped, *, num_heads: int | None, path: Path) -> LoadedWeights:
    """Point-MAE (pretrained or fine-tuned), Point-BERT or POS-BERT.

    What no tensor says (points of a group, points per token, attention heads) is taken as published, and the report says so.
    """
    embed_dim = len(found.state["norm.weight"])
    if _POS_MARK in found.state:
        layout, title, encoder, points = POS_BERT, "POS-BERT", "pos_bert_large" if embed_dim > 192 else "pos_bert_base", 32
    elif "reduce_dim.weight" in found.state:
        layout, title, encoder, points = POINT_MAE, "Point-BERT", "point_bert", 16
    else:
        layout, title, encoder, points = POINT_MAE, "Point-MAE", "point_mae", 16
    title = f"{title} ({found.side})" if found.side else title
    num_heads, assumed = heads_of(embed_dim, num_heads=num_heads, published=layout.heads, path=path)
    assumed = (f"groups of 32 points and one token for {points}, as published", *assumed)
    state = {name: _of_points(name, tensor) for name, tensor in layout.to_timm(found.state).items()}
    arguments: Arguments = {
        "name": encoder,
        "embed_dim": embed_dim,
        "depth": num_blocks(state),
        "num_heads": num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "tokens_dim": state["tokens.first.0.weight"].shape[0],
        "class_token": "cls_token" in state,
        "source": f"{title}, {path.name}",
    }
    return LoadedWeights(title, "PointTransformer", arguments, state, layout.pretraining, found.left_out, assumed, ("num_heads",))


def _of_points(name: str, tensor: Tensor) -> Tensor:
    """Convolutions over single points as linear layers, and POS-BERT's class token the way round that others have it."""
    if name.startswith("tokens.") and tensor.dim() == 3:
        return tensor.squeeze(2)
    return tensor.transpose(1, 2) if name == "cls_token" and tensor.shape[2] == 1 else tensor
