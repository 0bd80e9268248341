"""What the timm adapters share: sizes and channel statistics, positions for another grid, and the folder that timm opens by itself."""

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models import is_model_in_modules
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from glpretrain.core.patches import strided_grid
from glpretrain.core.types import EncoderCard

TimmArguments = dict[str, str | int | float | bool | list[int]]

# How learned positions are resized to another grid of tokens. timm: bicubic to the new size, antialiased. bicubic: the same without
# antialiasing. dino: bicubic by a factor for a grid that is larger by 0.1, which moves every sampling point a little; this is DINO's
# guard against rounding, and iBOT, Mugs and DINOv2 kept it.
PositionResize = Literal["timm", "bicubic", "dino"]
POSITION_RESIZES: tuple[PositionResize, ...] = ("timm", "bicubic", "dino")

_LARGEST_SIDE = 65_536  # pixels

create_model: Callable[..., nn.Module] = timm.create_model  # every model has keyword arguments of its own


def check_model(name: str, modules: Sequence[str], *, encoder: str) -> None:
    """Refuse, with a ValueError, a name that belongs to no model of these modules of timm."""
    if not isinstance(name, str) or not timm.is_model(name) or not is_model_in_modules(name, modules):
        raise ValueError(f"{encoder}: name={name!r} given; accepted: models of timm's {', '.join(modules)} (see timm.list_models)")


class BlockOfViT(NamedTuple):
    """What timm's model of some name has in its blocks."""

    gated: bool  # whether its MLPs are others than timm's plain one
    num_heads: int


def first_block(name: str) -> nn.Module:
    """The first block of timm's ViT of this name, which is built without memory."""
    with torch.device("meta"):
        return create_model(name, num_classes=0).get_submodule("blocks.0")


def block_of(name: str) -> BlockOfViT:
    """What the first block of timm's ViT of this name has."""
    block = first_block(name)
    heads = block.get_submodule("attn").num_heads
    assert isinstance(heads, int)
    return BlockOfViT(gated=type(block.get_submodule("mlp")) is not Mlp, num_heads=heads)


GATED = "vit_giant_patch14_dinov2"  # timm's model with gated MLPs, which is built at any size
_PLAIN = re.compile(r"vit_(small|base|large)_patch14_(reg4_)?dinov2")  # those with plain ones and the rest as in `GATED`


def gated_like(name: str, sizes: Mapping[str, int | float | None]) -> tuple[str, dict[str, int | float]]:
    """DINOv2's model of some size with SwiGLU in place of its MLPs (`ffn_layer: swiglufused` in dinov2/configs/train/vitl14.yaml).

    A SwiGLU has two thirds of the hidden width of the MLP, rounded up to a multiple of 8 (dinov2/layers/swiglu_ffn.py); timm counts both
    of its halves, because one matrix holds them.

    Args:
        name: timm's model with plain MLPs.
        sizes: `patch_size`, `embed_dim`, `depth`, `num_heads` and `mlp_ratio`, where None is that model's own; the ratio is the MLP's.

    Returns:
        The name of timm's model with gated MLPs, and all sizes with which it is built.

    Raises:
        ValueError: the name is another model's.
    """
    if not _PLAIN.fullmatch(name):
        accepted = ", ".join(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large"))
        raise ValueError(f"ViT: ffn='swiglu' given with {name}; accepted: {accepted}, with or without reg4")
    with torch.device("meta"):
        model = create_model(name, num_classes=0)
    assert isinstance(model, VisionTransformer)
    heads = model.blocks[0].get_submodule("attn").num_heads
    assert isinstance(heads, int)
    own = {"patch_size": 14, "embed_dim": model.embed_dim, "depth": len(model.blocks), "num_heads": heads, "mlp_ratio": 4.0}
    size = {**own, **{key: value for key, value in sizes.items() if value is not None}}
    dim = int(size["embed_dim"])
    hidden = (int(int(dim * size["mlp_ratio"]) * 2 / 3) + 7) // 8 * 8
    registers = {"reg_tokens": model.num_reg_tokens, "no_embed_class": True} if model.num_reg_tokens else {}
    return GATED, {**registers, **size, "mlp_ratio": ratio_of(2 * hidden, embed_dim=dim)}


def ratio_of(hidden: int, *, embed_dim: int) -> float:
    """The `mlp_ratio` with which timm gives the MLP this hidden width."""
    ratio = hidden / embed_dim
    # timm rounds the product down.
    return ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width.

    Raises:
        ValueError: the size is neither one positive number nor two.
    """
    sizes = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sizes) != 2 or not all(isinstance(side, int) and 1 <= side <= _LARGEST_SIDE for side in sizes):
        raise ValueError(
            f"encoder: img_size={reprlib.repr(size)} given; accepted: a positive number, or height and width, at most {_LARGEST_SIDE} each"
        )
    return sizes[0], sizes[1]


def normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, *, in_chans: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel; None stands for ImageNet's (three channels) or 0.5 (any other number).

    Raises:
        ValueError: their length is not the number of channels.
    """
    usual = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if in_chans == 3 else ((0.5,) * in_chans,) * 2
    chosen = []
    for name, given, default in zip(("mean", "std"), (mean, std), usual, strict=True):
        values = default if given is None else tuple(given) if isinstance(given, Iterable) else ("no list",) * in_chans
        if len(values) != in_chans:
            raise ValueError(f"encoder: {name} has {len(values)} values; accepted: {in_chans}, one per channel")
        if not all(isinstance(value, int | float) and (-1e9 if name == "mean" else 0) < value <= 1e9 for value in values):
            raise ValueError(f"encoder: {name}={reprlib.repr(given)} given; accepted: finite numbers, above 0 for std")
        chosen.append(tuple(values))
    return chosen[0], chosen[1]


def covering(size: tuple[int, int], *, patch_size: int | None, stride: tuple[int, int]) -> list[int]:
    """The size that patches side by side would cover if there were as many of them as there are overlapping ones.

    Raises:
        ValueError: the patch is not given, larger than the image, or smaller than the step.
    """
    if patch_size is None or not max(stride) <= patch_size <= min(size):
        raise ValueError(
            f"encoder: patch_stride={list(stride)} given with patch_size={patch_size} and img_size={list(size)}; accepted: steps of at most"
            " a patch, and patches of at most the image"
        )
    return [patch_size * count for count in strided_grid(size, patch_size=(patch_size, patch_size), stride=stride)]


def overlap_patches(model: nn.Module, stride: tuple[int, int], *, name: str) -> None:
    """Let patches begin every `stride` pixels; a ValueError refuses models with another patch embedding or positions of fixed size."""
    embed = model.get_submodule("patch_embed")
    if not isinstance(model, VisionTransformer) or type(embed) is not PatchEmbed or not isinstance(embed.proj, nn.Conv2d):
        raise ValueError(f"ViT: patch_stride={list(stride)} given; {name} accepts none")
    embed.proj.stride = stride
    embed.img_size = None  # pyright: ignore[reportAttributeAccessIssue]  or timm would ask for sides that divide into patches


def image_card(
    encoder: str,
    arguments: Mapping[str, str | int | float | bool | list[int] | list[float] | None],
    *,
    item_shape: tuple[int, int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    patch_size: tuple[int, ...],
    embed_dim: int,
    modality: str = "image",
) -> EncoderCard:
    """The card of an adapter.

    Args:
        encoder: registered name of the adapter.
        arguments: arguments of its constructor, `licence` and `source` among them, without those that follow from `item_shape`.
        item_shape: channels, height and width.
        mean: mean of each channel as given by the user, see `normalisation`.
        std: standard deviation of each channel as given by the user.
        patch_size: height and width of a token in pixels.
        embed_dim: width D of the features.
        modality: name of the kind of items.
    """
    in_chans, *img_size = item_shape
    means, stds = normalisation(mean, std, in_chans=in_chans)
    return EncoderCard(
        encoder=encoder,
        arguments={**arguments, "in_chans": in_chans, "img_size": img_size, "mean": list(means), "std": list(stds)},
        modality=modality,
        item_shape=item_shape,
        patch_size=patch_size,
        embed_dim=embed_dim,
        mean=means,
        std=stds,
        licence=str(arguments["licence"]),
        source=str(arguments["source"]),
    )


def resize_positions(positions: Tensor, *, grid: Sequence[int], new_grid: Sequence[int], how: PositionResize) -> Tensor:
    """Float[1 R+M D]: learned positions on another grid; where both grids are the same, they stay as they are.

    Args:
        positions: Float[1 R+N D]; the first R belong to class and register tokens, which have no place, and stay as they are.
        grid: rows and columns, N in all.
        new_grid: rows and columns, M in all.
        how: see `PositionResize`.
    """
    if tuple(grid) == tuple(new_grid):
        return positions
    num_prefix = positions.shape[1] - math.prod(grid)
    maps = positions[:, num_prefix:].float().unflatten(1, tuple(grid)).permute(0, 3, 1, 2)  # [1 D h w]
    if how == "dino":
        factors = [(new + 0.1) / old for new, old in zip(new_grid, grid, strict=True)]
        maps = F.interpolate(maps, scale_factor=factors, mode="bicubic")
    else:
        maps = F.interpolate(maps, size=list(new_grid), mode="bicubic", antialias=how == "timm")
    assert maps.shape[2:] == tuple(new_grid)
    resized = maps.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)  # [1 M D]
    return torch.cat((positions[:, :num_prefix], resized), dim=1)


def add_resized_positions(model: VisionTransformer, tokens: Tensor, *, how: PositionResize) -> Tensor:
    """timm's position step with positions that are resized in another way: Float[B h w D] to Float[B T D]."""
    assert model.pos_embed is not None
    positions = resize_positions(model.pos_embed, grid=model.patch_embed.grid_size, new_grid=tokens.shape[1:3], how=how)
    prefix = [token.expand(tokens.shape[0], -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    if model.no_embed_class:
        tokens = torch.cat((*prefix, tokens.flatten(1, 2) + positions), dim=1)
    else:
        tokens = torch.cat((*prefix, tokens.flatten(1, 2)), dim=1) + positions
    return model.pos_drop(tokens)


def add_positions(
    model: VisionTransformer | VisionTransformerRelPos | Beit | Eva, tokens: Tensor, *, how: PositionResize
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """timm's position step: Float[B h w D], or [B N D] where the size is fixed, to Float[B T D] with the prefix tokens first, and what each
    block has to be told about positions. Learned positions are resized as `how` says.
    """
    depth = len(model.blocks)
    if isinstance(model, VisionTransformer):
        if how == "timm" or tokens.shape[1:3] == model.patch_embed.grid_size:
            return model._pos_embed(tokens), [{}] * depth
        return add_resized_positions(model, tokens, how=how), [{}] * depth
    if isinstance(model, Eva):
        tokens, rope = model._pos_embed(tokens)
        if rope is None:
            return tokens, [{}] * depth
        return tokens, [{"rope": rope[layer] if rope.dim() > 2 else rope} for layer in range(depth)]  # [N 2d], or one per block
    if model.cls_token is not None:
        tokens = torch.cat((model.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
    if isinstance(model, Beit):
        tokens = model.pos_drop(tokens if model.pos_embed is None else tokens + model.pos_embed)
        bias = {} if model.rel_pos_bias is None else {"shared_rel_pos_bias": model.rel_pos_bias()}
    else:
        bias = {} if model.shared_rel_pos is None else {"shared_rel_pos": model.shared_rel_pos.get_bias()}
    return tokens, [bias] * depth


def timm_config(model: nn.Module, card: EncoderCard, *, model_args: TimmArguments) -> dict[str, object]:
    """The `config.json` of a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens.

    With the names of the classifier and of the first convolution, timm can give the model another number of classes or channels.

    Args:
        model: timm's model.
        card: card that is written beside it.
        model_args: arguments with which timm builds the same model.
    """
    own = vars(model)["pretrained_cfg"]
    names = {key: own[key] for key in ("classifier", "first_conv", "pool_size") if own.get(key)}
    if card.item_shape[0] not in (1, 3):  # versions of timm that only know images of 3 channels would drop the layer
        names.pop("first_conv", None)
    return {
        "architecture": card.arguments["name"],
        "num_classes": 0,
        "num_features": card.embed_dim,
        "global_pool": model_args.get("global_pool", "avg"),
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": list(card.item_shape),
            "num_classes": 0,
            "mean": list(card.mean),
            "std": list(card.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "license": card.licence,
            **names,
        },
    }


EVA_REGISTERS = "num_reg_tokens"  # what models of timm's `eva`, those of DINOv3 among them, call `reg_tokens`


def as_eva_names(arguments: TimmArguments) -> TimmArguments:
    """Arguments of a plain ViT under the names that timm's `eva` has for them."""
    return {EVA_REGISTERS if name == "reg_tokens" else name: value for name, value in arguments.items()}


def check_width(model: Beit | Eva, *, name: str) -> None:
    """Refuse, with a ValueError, a width that does not fit the heads: these two accept any width at first and fail at the first image."""
    heads = model.blocks[0].get_submodule("attn").num_heads
    assert isinstance(heads, int)
    # A rotation needs pairs of channels for either axis of the image.
    unit = 4 * heads if isinstance(model, Eva) and model.rope is not None else heads
    if model.embed_dim % unit:
        raise ValueError(f"ViT: embed_dim={model.embed_dim} does not fit the {heads} heads of {name}; accepted: multiples of {unit}")


def set_norm_eps(model: nn.Module, eps: float) -> None:
    """Give every layer norm this epsilon."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def biased_keys(name: str) -> TimmArguments:
    """Arguments with which the keys of a model have a bias too: timm's `eva` has two kinds of attention, one of them without.

    Raises:
        ValueError: the model is not one of DINOv3's whose queries and values have a bias.
    """
    attention = first_block(name).get_submodule("attn") if is_model_in_modules(name, ("eva",)) and "dinov3" in name else None
    if attention is None or vars(attention)["_parameters"].get("q_bias") is None:
        raise ValueError(f"ViT: key_bias=True given; {name} has no biases of queries and values without one of keys; leave it out")
    return {"attn_type": "rope"}


def set_rope_periods(model: nn.Module, periods: Sequence[float], *, name: str) -> None:
    """Give a model of DINOv3 these periods of its rotations; a ValueError refuses other models and another number of them."""
    if not isinstance(model, Eva) or not isinstance(model.rope, RotaryEmbeddingDinoV3):
        raise ValueError(f"ViT: rope_periods given; {name} has no rotary positions of DINOv3")
    own = model.rope.periods
    assert isinstance(own, Tensor)
    if len(periods) != own.numel():
        raise ValueError(f"ViT: rope_periods has {len(periods)} values; accepted by {name}: {own.numel()}")
    own.copy_(torch.tensor(periods))
