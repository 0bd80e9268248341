"""The timm ViT adapter: any plain Vision Transformer of timm, with tokens that can be hidden or dropped.

It runs timm's own patch embedding, position step, blocks and norm, so that with nothing hidden and nothing dropped it equals
timm's `forward_features` bit for bit. Left out: pyramids and windowed attention (`features.FeatureMap` takes those), NaFlexVit
and the towers of vision-language models, whose patch and position steps are one.
"""

import re
from collections.abc import Sequence

import timm
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models import is_model_in_modules
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.encoders.base import Encoder, encode_list, load_strictly, register
from glpretrain.encoders.positions import POSITION_RESIZES, PositionResize, resize_positions
from glpretrain.encoders.timm_model import image_card, pair, timm_config

# Modules of timm whose models are plain ViTs, and those among them whose relative positions are tied to one image size.
VIT_MODULES = ("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "deit", "eva", "beit")
_FIXED_SIZE_MODULES = ("vision_transformer_relpos", "beit")


@register
class ViT(Encoder):
    """A timm ViT with fresh weights.

    Args:
        name: of a timm model, such as `vit_small_patch16_224`.
        img_size: height and width that the position embedding is made for; views of other sizes are taken too.
        patch_size: in pixels; None is timm's own.
        in_chans: channels.
        embed_dim: None is timm's own.
        depth: number of blocks; None is timm's own.
        num_heads: None is timm's own.
        mlp_ratio: width of a block's hidden layer by D (both halves of a gated one together, where timm packs them); None is timm's own.
        drop_path_rate: stochastic depth.
        position_resize: how learned positions are resized to a view of another size, see `positions.PositionResize`.
        norm_eps: of every layer norm; None is timm's own.
        rope_periods: of DINOv3's rotary positions, one per frequency; None is timm's own (published files hold rounded ones).
        mean: per channel, of items scaled to [0, 1]; None is ImageNet's for three channels and 0.5 otherwise.
        std: likewise.
        licence: of the weights.
        source: of the weights.

    Raises:
        ValueError: `name` is no ViT of timm, or a size does not fit another.
    """

    def __init__(
        self,
        name: str,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int | None = None,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        drop_path_rate: float = 0.0,
        position_resize: PositionResize = "timm",
        norm_eps: float | None = None,
        rope_periods: Sequence[float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        licence: str = "",
        source: str = "",
    ) -> None:
        super().__init__()
        if not timm.is_model(name) or not is_model_in_modules(name, VIT_MODULES):
            raise ValueError(f"ViT: name={name!r} given; accepted: models of timm's {', '.join(VIT_MODULES)} (see timm.list_models)")
        self._fixed_size = is_model_in_modules(name, _FIXED_SIZE_MODULES)
        height, width = pair(img_size)
        # No pooling: timm then keeps the final norm on the tokens and builds no pooling head that would never get a gradient.
        timm_args: dict[str, str | int | float | bool | list[int]] = {
            "img_size": [height, width],
            "in_chans": in_chans,
            "num_classes": 0,
            "global_pool": "token" if "distilled" in name else "",
            "drop_path_rate": drop_path_rate,
        }
        if not self._fixed_size:
            timm_args["dynamic_img_size"] = True
        if is_model_in_modules(name, ("vision_transformer_relpos",)):
            timm_args["fc_norm"] = False  # some of these name the norm behind the pooling whatever the pooling is
        shape_args = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        chosen = {key: value for key, value in shape_args.items() if value is not None}
        for key, value in {**chosen, "in_chans": in_chans}.items():
            if key != "mlp_ratio" and value < 1:
                raise ValueError(f"ViT: {key}={value} given; accepted: at least 1")
        for key, value in (("mlp_ratio", mlp_ratio), ("norm_eps", norm_eps)):
            if value is not None and value <= 0.0:
                raise ValueError(f"ViT: {key}={value} given; accepted: above 0")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"ViT: drop_path_rate={drop_path_rate} given; accepted: [0, 1)")
        timm_args.update(chosen)
        try:
            self.model = timm.create_model(name, pretrained=False, **timm_args)
        except AssertionError as refusal:  # how timm refuses sizes that do not fit one another
            raise ValueError(f"ViT: timm refuses to build {name} with {chosen}: {refusal}") from refusal
        if isinstance(self.model, (Beit, Eva)):
            _check_width(self.model, name=name)
        if position_resize not in POSITION_RESIZES:
            raise ValueError(f"ViT: position_resize={position_resize!r} given; accepted: {', '.join(POSITION_RESIZES)}")
        if position_resize != "timm" and (type(self.model) is not VisionTransformer or self.model.pos_embed is None):
            raise ValueError(f"ViT: position_resize={position_resize!r} given; {name} accepts timm only")
        self._position_resize: PositionResize = position_resize
        if norm_eps is not None:
            for module in self.model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = norm_eps
        if rope_periods is not None:
            _set_rope_periods(self.model, rope_periods, name=name)
        self.register_parameter("mask_token", None)
        self._timm_args = timm_args
        arguments = {
            "name": name,
            "img_size": [height, width],
            "in_chans": in_chans,
            "drop_path_rate": drop_path_rate,
            "position_resize": position_resize,
            "norm_eps": norm_eps,
            "rope_periods": None if rope_periods is None else list(rope_periods),
            "licence": licence,
            "source": source,
            **shape_args,
        }
        self._card = image_card(
            "ViT",
            arguments,
            mean=mean,
            std=std,
            patch_size=tuple(self.model.patch_embed.feat_ratio(as_scalar=False)),
            embed_dim=self.model.embed_dim,
        )
        self.grid((in_chans, height, width))

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens that stand before the patches."""
        return self.model.num_prefix_tokens

    def grid(self, item_shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tokens for an item of shape C H W.

        Raises:
            ValueError: the shape does not divide into patches, or the model takes one size only.
        """
        channels, *size = item_shape
        name, accepted = self._card.arguments["name"], self._card.item_shape
        if channels != accepted[0] or len(size) != 2:
            raise ValueError(f"{name}: item shape {tuple(item_shape)} given; accepted: ({accepted[0]}, height, width)")
        if self._fixed_size and tuple(size) != accepted[1:]:
            raise ValueError(f"{name}: size {tuple(size)} given; its relative positions accept {accepted[1:]} only")
        for axis, (length, patch) in enumerate(zip(size, self._card.patch_size, strict=True)):
            if length % patch or length == 0:
                nearest = sorted({max(length // patch, 1) * patch, (length // patch + 1) * patch})
                raise ValueError(
                    f"{name}: {('height', 'width')[axis]} {length} does not divide by the patch of {patch} pixels; "
                    f"nearest accepted: {nearest}"
                )
        rows, columns = (length // patch for length, patch in zip(size, self._card.patch_size, strict=True))
        return rows, columns

    def forward(
        self,
        items: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        keep: Tensor | None = None,
    ) -> EncoderOutput | list[EncoderOutput]:
        """See `Encoder.forward`; items are Float[B C H W]."""
        if mask is not None and keep is not None:
            raise ValueError("ViT: mask and keep were both given; hide tokens or drop them, not both")
        if not isinstance(items, Tensor):
            if keep is not None:
                raise ValueError("ViT: keep needs one tensor of items, a list was given")
            return encode_list(self._encode, items, mask=mask)
        return self._encode(items, mask=mask, keep=keep)

    def _encode(self, items: Tensor, *, mask: Tensor | None, keep: Tensor | None = None) -> EncoderOutput:
        model, prefix = self.model, self.num_prefix_tokens
        rows, columns = self.grid(items.shape[1:])
        tokens = model.patch_embed(items)  # [B h w D], or [B N D] where the size is fixed
        if mask is not None:
            tokens = self._hide(tokens, mask=mask, count=rows * columns)
        tokens, block_args = self._add_positions(tokens)  # [B R+N D], R prefix tokens
        if keep is not None:
            if self._fixed_size:
                self.require_keep()
            if keep.shape[0] != items.shape[0] or keep.dim() != 2:
                raise ValueError(f"ViT: keep has shape {tuple(keep.shape)}; accepted: ({items.shape[0]}, tokens to keep)")
            kept = tokens[:, prefix:].gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))  # [B M D]
            tokens = torch.cat((tokens[:, :prefix], kept), dim=1)  # [B R+M D]
            block_args = [{name: _gather_rope(rope, keep) for name, rope in args.items()} for args in block_args]
        if isinstance(model, (VisionTransformer, Eva)):
            tokens = model.norm_pre(tokens)
        for block, args in zip(model.blocks, block_args, strict=True):
            tokens = block(tokens, **args)
        tokens = model.norm(tokens)
        patches = tokens[:, prefix:]
        return EncoderOutput(cls=patches.mean(dim=1) if model.cls_token is None else tokens[:, 0], patches=patches)

    def _hide(self, tokens: Tensor, *, mask: Tensor, count: int) -> Tensor:
        if self.mask_token is None:
            raise ValueError("ViT: a mask was given but there is no mask token; call add_mask_token() first")
        if mask.dtype != torch.bool or mask.shape != (tokens.shape[0], count):
            raise ValueError(
                f"ViT: mask is {mask.dtype} of shape {tuple(mask.shape)}; accepted: bool of shape ({tokens.shape[0]}, {count})"
            )
        hidden = mask.reshape(tokens.shape[:-1]).unsqueeze(-1)
        return torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)

    def _add_positions(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The tokens with prefix and position, and what each block has to be told about positions."""
        model, depth = self.model, self.num_layers
        if isinstance(model, VisionTransformer):
            if self._position_resize == "timm" or tokens.shape[1:3] == model.patch_embed.grid_size:
                return model._pos_embed(tokens), [{}] * depth
            return self._add_resized(tokens), [{}] * depth
        if isinstance(model, Eva):
            tokens, rope = model._pos_embed(tokens)
            if rope is None:
                return tokens, [{}] * depth
            return tokens, [{"rope": rope[layer] if model.rope_mixed else rope} for layer in range(depth)]
        if model.cls_token is not None:
            tokens = torch.cat((model.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        if isinstance(model, Beit):
            tokens = model.pos_drop(tokens if model.pos_embed is None else tokens + model.pos_embed)
            bias = {} if model.rel_pos_bias is None else {"shared_rel_pos_bias": model.rel_pos_bias()}
        else:
            bias = {} if model.shared_rel_pos is None else {"shared_rel_pos": model.shared_rel_pos.get_bias()}
        return tokens, [bias] * depth

    def _add_resized(self, tokens: Tensor) -> Tensor:
        """timm's position step with the positions resized otherwise: Float[B h w D] to Float[B R+N D]."""
        model = self.model
        positions = resize_positions(
            model.pos_embed, grid=model.patch_embed.grid_size, new_grid=tokens.shape[1:3], how=self._position_resize
        )
        prefix = [token.expand(tokens.shape[0], -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
        if model.no_embed_class:
            tokens = torch.cat((*prefix, tokens.flatten(1, 2) + positions), dim=1)
        else:
            tokens = torch.cat((*prefix, tokens.flatten(1, 2)), dim=1) + positions
        return model.pos_drop(tokens)

    def add_mask_token(self) -> None:
        """Add the learned token that stands for hidden patches, zero at the start (as iBOT)."""
        if self.mask_token is None:
            self.mask_token = nn.Parameter(next(self.model.parameters()).new_zeros(self.embed_dim))

    def require_keep(self) -> None:
        """Every ViT drops tokens, except those with relative positions over the whole grid."""
        if self._fixed_size:
            raise ValueError(
                f"{self._card.arguments['name']} cannot drop tokens: its relative positions span the whole grid; choose another ViT"
            )

    def layer_of(self, name: str) -> int:
        """0 for the embedding, i + 1 for block i, `num_layers` + 1 for the final norm and the mask token, which no backbone brings."""
        if found := re.match(r"model\.blocks\.(\d+)\.", name):
            return int(found[1]) + 1
        return self.num_layers + 1 if name.startswith(("model.norm.", "mask_token")) else 0

    def embeds_patches(self, name: str) -> bool:
        """The projection of pixels, not the tokens and positions that join it."""
        return name.startswith("model.patch_embed.")

    def backbone_state(self) -> dict[str, Tensor]:
        """timm's state dict."""
        return self.model.state_dict()

    def load_backbone_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `backbone_state`, strict."""
        load_strictly(self.model, state)

    def library_config(self, card: EncoderCard) -> dict:
        """What timm needs to open an exported folder."""
        return timm_config(card, model_args=self._timm_args)


def _check_width(model: Beit | Eva, *, name: str) -> None:
    """These two accept any width at first and fail at the first image."""
    heads = model.blocks[0].attn.num_heads
    # A rotation needs pairs of channels for either axis of the image.
    unit = 4 * heads if isinstance(model, Eva) and model.rope is not None else heads
    if model.embed_dim % unit:
        raise ValueError(f"ViT: embed_dim={model.embed_dim} does not fit the {heads} heads of {name}; accepted: multiples of {unit}")


def _set_rope_periods(model: nn.Module, periods: Sequence[float], *, name: str) -> None:
    if not isinstance(model, Eva) or not isinstance(model.rope, RotaryEmbeddingDinoV3):
        raise ValueError(f"ViT: rope_periods given; {name} has no rotary positions of DINOv3")
    if len(periods) != model.rope.periods.numel():
        raise ValueError(f"ViT: rope_periods has {len(periods)} values; accepted by {name}: {model.rope.periods.numel()}")
    model.rope.periods.copy_(torch.tensor(periods))


def _gather_rope(rope: Tensor, keep: Tensor) -> Tensor:
    """Rotary table Float[N D] or Float[heads N D] to one per item, Float[B 1 M D] or Float[B heads M D]."""
    table = rope if rope.dim() == 3 else rope.unsqueeze(0)
    return table[:, keep].transpose(0, 1)
