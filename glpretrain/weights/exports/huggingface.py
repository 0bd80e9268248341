"""ViTs in the layout of Hugging Face transformers: ViTModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, ASTModel.

Weights get the names under which such models are published (`names.HUGGINGFACE`), which old and new versions of transformers read alike.
Before anything is written, `Features` computes from the renamed weights what the class of transformers computes, and the result is
compared with the encoder. Where they differ (another norm, activation or order), the export is refused. transformers itself is not
needed.

Known difference: ViTModel and Dinov2Model resize learned positions without antialiasing and the encoder (timm) with it, so their features
agree at the exported size only. Dinov2WithRegistersModel and DINOv3ViTModel agree at every size. ASTModel is for sounds with a second
token for distillation, takes Float[B T F] and has its patches frequency by frequency; sounds without that token become a ViTModel that
takes normalised filterbanks, Float[B 1 T F].
Left out: heads, and encoders without class token.
"""

import math
import re
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glpretrain.core.fbank import RATE
from glpretrain.core.files import write_json
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import Encoder, ViT
from glpretrain.weights.exports.base import Written, check_images, difference
from glpretrain.weights.files import State
from glpretrain.weights.folders import LIBRARY_CONFIG, write_card, write_weights
from glpretrain.weights.formats import is_gated
from glpretrain.weights.names import AST, DINOV2, DINOV2_REGISTERS, DINOV3, HUGGINGFACE, VIT, Layout

_GELU = {"GELU()", "GELU(approximate='none')"}  # timm's own and torch's
_SILU = {"SiLU()"}
# Another order of float32 sums over some hundred features of size one stays far below, another activation or norm is far above.
_SAME = 1e-4


@runtime_checkable
class _Rotary(Protocol):
    """timm's rotary positions of DINOv3."""

    temperature: float
    periods: Tensor


def write_huggingface(encoder: Encoder, folder: Path) -> Written:
    """config.json, model.safetensors and preprocessor_config.json, for `transformers.AutoModel.from_pretrained(folder)`.

    Raises:
        ValueError: no class of transformers computes what this encoder does; the message says why.
    """
    config, weights, layout = convert(encoder)
    computed = Features(config, weights)
    with torch.no_grad():
        worst = max(difference(computed(images), encoder(images)) for images in check_images(encoder))
    if not worst < _SAME:
        raise _refusal(encoder, f"{layout.architecture} computes something else from its weights (difference {worst:.1e})")
    write_weights(weights, folder)
    write_json(folder / LIBRARY_CONFIG, config)
    note = f"open with transformers.AutoModel.from_pretrained(FOLDER): a {layout.architecture}"
    if layout is AST or encoder.card.modality == "image":
        write_json(folder / "preprocessor_config.json", _preprocessor(encoder))
    else:  # no class of transformers makes such items
        note += ", which takes normalised filterbanks, Float[B 1 T F]"
    write_card(encoder.card, folder)
    if layout.position_resize != encoder.card.arguments.get("position_resize", "timm"):
        note += ", which resizes positions in its own way: for equal features at another size export with --img_size"
    return Written(folder, worst, note)


def convert(encoder: Encoder) -> tuple[dict, State, Layout]:
    """The config of a class of transformers, the weights under its names, and its layout.

    Raises:
        ValueError: no class has a place for some part of the encoder.
    """
    if not isinstance(encoder, ViT):
        raise _refusal(encoder, "it is not a plain ViT")
    state = encoder.backbone_state()
    if "cls_token" not in state:
        raise _refusal(encoder, "it has no class token")
    layout = _choose(encoder, state)
    packed = is_gated(state)
    gated = packed or "blocks.0.mlp.fc1_g.weight" in state
    weights, unknown = layout.from_timm(state, gated=gated)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise _refusal(encoder, f"{layout.architecture} has no place for {', '.join(unknown[:3])}{more}")
    modules, biased = ({name.removesuffix(leaf) for name in weights if name.endswith(leaf)} for leaf in (".weight", ".bias"))
    if lacking := sorted(name for name in modules - biased if not name.endswith(layout.qkv)):
        raise _refusal(encoder, f"{layout.architecture} needs a bias in {', '.join(lacking[:3])}")
    if packed and "mlp.fc1" not in layout.gated:
        raise _refusal(encoder, f"{layout.architecture} has no place for gates in mlp.fc1")
    activations = {repr(module) for name, module in encoder.model.named_modules() if re.fullmatch(r"blocks\.\d+\.mlp\.act", name)}
    if other := activations - (_SILU if gated else _GELU):
        raise _refusal(encoder, f"{layout.architecture} has {'SiLU' if gated else 'GELU'} where it has {', '.join(sorted(other))}")
    _place_tokens(encoder, weights, layout=layout)
    config = _config(encoder, weights, gated=gated, layout=layout)
    return config, weights | _unused(encoder, weights, layout=layout), layout


def _refusal(encoder: Encoder, why: str) -> ValueError:
    return ValueError(
        f"export: format='huggingface' cannot hold {encoder.card.arguments['name']}: {why}; accepted: ViTs with a class token and "
        "learned positions, with layer scale and registers or without, and DINOv3's"
    )


def _choose(encoder: ViT, state: State) -> Layout:
    if "pos_embed" not in state:
        if type(dict(encoder.model.named_children()).get("rope")).__name__ != "RotaryEmbeddingDinoV3":
            raise _refusal(encoder, "its positions are neither learned nor DINOv3's")
        return DINOV3
    if "dist_token" in state and encoder.card.modality == "audio":
        return AST
    layout = DINOV2_REGISTERS if "reg_token" in state else DINOV2 if "blocks.0.ls1.gamma" in state else VIT
    height, width = encoder.card.item_shape[1:]
    if layout is not VIT and height != width:
        raise _refusal(encoder, f"{layout.architecture} takes square positions only, these are for {height} x {width} pixels")
    return layout


def _place_tokens(encoder: ViT, weights: State, *, layout: Layout) -> None:
    """Registers where a class has them, and a position for the class token and every patch but for no register.

    The position of a register is added to its token.
    """
    names, zeros = layout.names, torch.zeros(1, 1, encoder.embed_dim)
    if "reg_token" in names:
        weights.setdefault(names["reg_token"], zeros[:, :0])
    if "pos_embed" not in names:
        return
    if layout is AST:
        _put_frequency_first(encoder, weights)
        return
    positions = weights[names["pos_embed"]]  # [1 R+N D], or [1 N D] where only patches have one
    count = math.prod(encoder.grid(encoder.card.item_shape))
    of_prefix, of_patches = positions[:, :-count], positions[:, -count:]
    if of_prefix.shape[1] and "reg_token" in names:
        weights[names["reg_token"]] = weights[names["reg_token"]] + of_prefix[:, 1:]
    weights[names["pos_embed"]] = torch.cat((of_prefix[:, :1] if of_prefix.shape[1] else zeros, of_patches), dim=1)  # [1 1+N D]


def _put_frequency_first(encoder: ViT, weights: State) -> None:
    """Kernels and positions as AST has them, whose filterbanks have frequency first."""
    stem, positions = f"{AST.names['patch_embed.proj']}.weight", AST.names["pos_embed"]
    weights[stem] = weights[stem].transpose(2, 3).contiguous()
    grid = encoder.grid(encoder.card.item_shape)
    prefix, patches = weights[positions].split([2, math.prod(grid)], dim=1)
    weights[positions] = torch.cat((prefix, _other_first(patches, grid=grid)), dim=1)


def _other_first(tokens: Tensor, *, grid: tuple[int, ...]) -> Tensor:
    """Float[B N D] row by row of a grid, column by column."""
    return tokens.unflatten(1, grid).transpose(1, 2).flatten(1, 2)


def _config(encoder: ViT, weights: State, *, gated: bool, layout: Layout) -> dict:
    card = encoder.card
    height, width = card.item_shape[1:]
    norms = {module.eps for module in encoder.model.modules() if isinstance(module, nn.LayerNorm)}
    if len(norms) != 1:
        raise _refusal(encoder, f"{layout.architecture} has one epsilon for all norms, it has {sorted(norms)}")
    config: dict = {
        "architectures": [layout.architecture],
        "model_type": next(kind for kind, other in HUGGINGFACE.items() if other is layout),
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.model.get_submodule("blocks.0.attn").num_heads,
        "hidden_act": "silu" if gated and layout is DINOV3 else "gelu",  # DINOv2's gated class does not read it
        "layer_norm_eps": norms.pop(),
        "image_size": height if height == width else [height, width],
        "patch_size": card.patch_size[0],
        "num_channels": card.item_shape[0],
        "torch_dtype": "float32",
    }
    before, names = layout.block.format(0), layout.names | (layout.gated if gated else {})
    hidden = len(weights[f"{before}{names['mlp.fc1']}.weight"])
    query, key, value = (f"{before}{part}.bias" in weights for part in layout.qkv)
    if layout is AST:
        given = encoder.card.arguments.get("patch_stride")
        time_stride, frequency_stride = given if isinstance(given, list) else card.patch_size
        sizes = {"max_length": height, "num_mel_bins": width, "time_stride": time_stride, "frequency_stride": frequency_stride}
        kept = {name: value for name, value in config.items() if name not in ("image_size", "num_channels")}
        return kept | sizes | {"intermediate_size": hidden, "qkv_bias": query}
    if layout is VIT:
        return config | {"intermediate_size": hidden, "qkv_bias": query, "pooler_act": "linear", "pooler_output_size": encoder.embed_dim}
    if layout is DINOV3:
        biases = {"query_bias": query, "key_bias": key, "value_bias": value, "proj_bias": True, "mlp_bias": True}
        rope = encoder.model.get_submodule("rope")
        assert isinstance(rope, _Rotary)
        theta, periods = rope.temperature, rope.periods
        if not torch.allclose(periods, theta ** torch.linspace(0, 1, len(periods) + 1)[:-1], rtol=1e-5):
            raise _refusal(encoder, f"{layout.architecture} has rotary periods that are powers of {theta}, it has others")
        others = {"rope_theta": theta, "num_register_tokens": encoder.num_prefix_tokens - 1}
        return config | biases | others | {"intermediate_size": hidden, "use_gated_mlp": gated}
    ratio = next((ratio for ratio in range(1, 17) if _hidden_features(encoder.embed_dim, ratio, gated=gated) == hidden), None)
    if ratio is None:
        raise _refusal(encoder, f"{layout.architecture} has MLPs that are whole multiples of {encoder.embed_dim} wide, not {hidden}")
    config |= {"mlp_ratio": ratio, "qkv_bias": query, "use_swiglu_ffn": gated}
    return config | ({"use_mask_token": False} if layout is DINOV2 else {"num_register_tokens": encoder.num_prefix_tokens - 1})


def _hidden_features(width: int, ratio: int, *, gated: bool) -> int:
    """Rows of the first linear layer; DINOv2's gated one has two thirds, rounded up to a multiple of eight, for each half."""
    return 2 * ((int(width * ratio * 2 / 3) + 7) // 8 * 8) if gated else width * ratio


def _preprocessor(encoder: Encoder) -> dict:
    card = encoder.card
    if card.modality == "audio":
        return {
            "feature_extractor_type": "ASTFeatureExtractor",
            "feature_size": 1,
            "sampling_rate": RATE,
            "max_length": card.item_shape[1],
            "num_mel_bins": card.item_shape[2],
            "do_normalize": True,
            "mean": card.mean[0],
            "std": card.std[0] / 2,  # it divides by twice this
            "padding_value": 0.0,
            "return_attention_mask": False,
        }
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


def _unused(encoder: ViT, weights: State, *, layout: Layout) -> State:
    """What a class has besides, so that nothing is random after loading."""
    width = encoder.embed_dim
    if layout is VIT:  # its pooler, here one that hands on the class token
        return {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    if layout is AST:
        return {}
    blocks = [layout.block.format(block) for block in range(encoder.num_layers)]
    unused = {f"{before}{scale}": torch.ones(width) for before in blocks for scale in layout.scales if f"{before}{scale}" not in weights}
    if layout is not DINOV2:
        unused["embeddings.mask_token"] = torch.zeros(1, width) if layout is DINOV2_REGISTERS else torch.zeros(1, 1, width)
    return unused


class Features:
    """What a class of transformers computes from its config and weights, for images of the size that it is made for; for sounds in
    our order, with time first.

    Args:
        config: content of config.json.
        weights: tensors under the published names.
    """

    def __init__(self, config: dict, weights: State) -> None:
        self._config, self._weights = config, weights
        self._layout = HUGGINGFACE[config["model_type"]]
        self._is_ast = self._layout is AST
        self._gated = bool(config.get("use_gated_mlp") or config.get("use_swiglu_ffn"))
        self._names = self._layout.names | (self._layout.gated if self._gated else {})

    def __call__(self, images: Tensor) -> EncoderOutput:
        """Float[B C H W] at the size of the config, or Float[B 1 T F]."""
        names, weights = self._names, self._weights
        stem, stride = names["patch_embed.proj"], self._config["patch_size"]
        if self._is_ast:
            images, stride = images.transpose(2, 3), (self._config["frequency_stride"], self._config["time_stride"])
        cells = F.conv2d(images, weights[f"{stem}.weight"], weights[f"{stem}.bias"], stride=stride)  # [B D h w]
        patches = cells.flatten(2).transpose(1, 2)  # [B N D]
        cls, rope = weights[names["cls_token"]], None  # [1 1 D]
        if "pos_embed" in names:
            positions = weights[names["pos_embed"]]  # [1 1+N D], or [1 2+N D] of an ASTModel
            prefix = [cls, weights[names["dist_token"]]] if self._is_ast else [cls]
            cls, patches = torch.cat(prefix, dim=1) + positions[:, : len(prefix)], patches + positions[:, len(prefix) :]
        else:
            rope = self._rope(*cells.shape[2:])
        prefix = [cls, weights[names["reg_token"]]] if "reg_token" in names else [cls]
        tokens = torch.cat([*(token.expand(len(images), -1, -1) for token in prefix), patches], dim=1)  # [B T D]
        for block in range(self._config["num_hidden_layers"]):
            tokens = self._block(tokens, before=self._layout.block.format(block), rope=rope)
        tokens = self._norm(tokens, names["norm"])
        patches = tokens[:, -patches.shape[1] :]
        if self._is_ast:
            patches = _other_first(patches, grid=tuple(cells.shape[2:]))
        return EncoderOutput(cls=tokens[:, 0], patches=patches)

    def _block(self, tokens: Tensor, *, before: str, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        names, heads = self._names, self._config["num_attention_heads"]
        attention_scale, mlp_scale = [self._weights[before + scale] for scale in self._layout.scales] or (1.0, 1.0)
        inner = self._norm(tokens, before + names["norm1"])
        query, key, value = (self._linear(inner, before + part).unflatten(-1, (heads, -1)).transpose(1, 2) for part in self._layout.qkv)
        if rope is not None:
            query, key = _rotate(query, *rope), _rotate(key, *rope)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # [B T D]
        tokens = tokens + attention_scale * self._linear(attended, before + names["attn.proj"])
        return tokens + mlp_scale * self._mlp(self._norm(tokens, before + names["norm2"]), before=before)

    def _mlp(self, inner: Tensor, *, before: str) -> Tensor:
        names = self._names
        if not self._gated:
            hidden = F.gelu(self._linear(inner, before + names["mlp.fc1"]))
        else:
            if "mlp.fc1_g" in names:
                gate, inner = (self._linear(inner, before + names[name]) for name in ("mlp.fc1_g", "mlp.fc1_x"))
            else:
                gate, inner = self._linear(inner, before + names["mlp.fc1"]).tensor_split(2, dim=-1)
            hidden = F.silu(gate) * inner
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
