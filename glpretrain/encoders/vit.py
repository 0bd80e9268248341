"""The timm ViT adapter: any plain Vision Transformer of timm, with tokens that can be hidden or dropped.

It runs timm's own patch embedding, position step, blocks and norm. With nothing hidden and nothing dropped, class token, registers and
patches together equal timm's `forward_features` bit for bit. Left out: pyramids and windowed attention (see `feature_maps.FeatureMap`),
NaFlexVit, and the towers of vision-language models, whose patch and position steps are one.
"""

import math
import re
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.patch_embed import PatchEmbed
from timm.models import is_model_in_modules
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from glpretrain.core.clouds import take
from glpretrain.core.patches import image_grid
from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.encoders.base import Encoder, register
from glpretrain.encoders.blocks import PlainBlock, can_pack, gather_rope, packing_pays, run, run_packed
from glpretrain.encoders.checkpointing import recomputing
from glpretrain.encoders.drop_path import compute_kept, drawn_paths, drop_uniformly, use_keyed_paths
from glpretrain.encoders.initial import INITIALS, Initial, fix_positions, start
from glpretrain.encoders.limits import check_numbers, check_words
from glpretrain.encoders.local_norm import LocalNorm, normed_tokens, of_views
from glpretrain.encoders.rope import RopeAugmentation, augment_positions, drawn_positions
from glpretrain.encoders.sequences import Views, hide_tokens, split_tokens
from glpretrain.encoders.timm_model import (
    POSITION_RESIZES,
    PositionResize,
    TimmArguments,
    add_positions,
    as_eva_names,
    biased_keys,
    check_model,
    check_width,
    covering,
    create_model,
    first_block,
    gated_like,
    image_card,
    overlap_patches,
    pair,
    set_norm_eps,
    set_rope_periods,
    timm_config,
)

# Modules of timm whose models are plain ViTs, and those among them whose relative positions are tied to one image size.
VIT_MODULES = ("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "deit", "eva", "beit")
_FIXED_SIZE_MODULES = ("vision_transformer_relpos", "beit")


@register
class ViT(Encoder):
    """A timm ViT with fresh weights.

    Args:
        name: name of a timm model, such as `vit_small_patch16_224`.
        img_size: height and width that the position embedding is made for; views of other sizes are accepted too.
        patch_size: side of a patch in pixels; None is timm's own.
        patch_stride: pixels from one patch to the next, down and across, where patches overlap, as in AST; None for patches side by side.
        in_chans: number of channels.
        embed_dim: width D of the tokens; None is timm's own.
        depth: number of blocks; None is timm's own.
        num_heads: number of attention heads; None is timm's own.
        mlp_ratio: width of a block's hidden layer, divided by D (both halves of a packed gated one together); None is timm's own.
        ffn: `swiglu` gives a DINOv2 model the gated layers that its authors train, whose width follows from `mlp_ratio`, see
            `timm_model.gated_like`; the card then names timm's gated model and its sizes. None is timm's own.
        positions: `learned`, or `sincos` for fixed sine-cosine positions as in MAE and FSFM.
        initial: the rule for fresh weights, see `initial.Initial`; it is not on the card.
        drop_path_rate: rate of stochastic depth in the last block; it grows evenly from 0 in the first one, as in DINO, iBOT and Mugs.
        drop_path_uniform: give every block that same rate, as DINOv2 and GPFM do (dinov2/configs/ssl_default_config.yaml). Plain blocks
            then compute only what is kept, see `blocks.PlainBlock`.
        init_values: start of every layer scale, which some models have and timm's of that name does not; None is timm's own.
        reg_tokens: number of register tokens; None is timm's own.
        no_embed_class: whether positions are added to patches only, and not to class token and registers; None is timm's own.
        final_norm: whether there is a norm behind the last block; MAE's fine-tuning has one behind the pooling instead.
        position_resize: how learned positions are resized to a view of another size, see `timm_model.PositionResize`.
        norm_eps: epsilon of every layer norm; None is timm's own.
        rope_periods: periods of DINOv3's rotary positions, one per frequency; None is timm's own (published files hold rounded ones).
        rope_augmentation: how these positions are moved in training, see `rope.RopeAugmentation`; it is not on the card.
        key_bias: whether keys of DINOv3's models have a bias too, where queries and values have one (official `mask_k_bias: false`).
        local_norm: whether `cls` and registers of local views have a final norm of their own, see `local_norm`; it is not on the card.
        mean: mean of each channel, of images scaled to [0, 1]; None stands for ImageNet's (three channels) or 0.5.
        std: standard deviation of each channel; None as for `mean`.
        modality: name of the kind of items that it sees as images, see `glpretrain.modalities`: `audio` makes of frames and bins the rows
            and columns of one channel, whose mean and standard deviation are those of the filterbank.
        licence: licence of the weights.
        source: source of the weights.

    Raises:
        ValueError: `name` is no ViT of timm, a size does not fit another one, `drop_path_uniform` is set without a rate, or the model
            has no such layers, positions or tokens.
    """

    mask_token: nn.Parameter | None

    def __init__(
        self,
        name: str,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int | None = None,
        patch_stride: Sequence[int] | None = None,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        ffn: Literal["swiglu"] | None = None,
        positions: Literal["learned", "sincos"] = "learned",
        initial: Initial = "timm",
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        reg_tokens: int | None = None,
        no_embed_class: bool | None = None,
        final_norm: bool = True,
        position_resize: PositionResize = "timm",
        norm_eps: float | None = None,
        rope_periods: Sequence[float] | None = None,
        rope_augmentation: RopeAugmentation | None = None,
        key_bias: bool = False,
        local_norm: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        modality: str = "image",
        licence: str = "",
        source: str = "",
    ) -> None:
        super().__init__()
        check_model(name, VIT_MODULES, encoder="ViT")
        shape = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        check_numbers("ViT", **shape, in_chans=in_chans, norm_eps=norm_eps, drop_path_rate=drop_path_rate)
        check_words("ViT", position_resize=(position_resize, POSITION_RESIZES), positions=(positions, ("learned", "sincos")))
        check_words("ViT", initial=(initial, INITIALS), ffn=(ffn, (None, "swiglu")))
        added: TimmArguments = {}
        if ffn is not None:
            name, sizes = gated_like(name, shape)
            shape = {key: sizes.pop(key) for key in shape}
            added.update(sizes)
        others = {"init_values": init_values, "reg_tokens": reg_tokens, "no_embed_class": no_embed_class}
        others |= {} if final_norm else {"final_norm": False}
        added |= {key: value for key, value in others.items() if value is not None}
        check_numbers("ViT", init_values=init_values, reg_tokens=reg_tokens or None)
        if drop_path_uniform and drop_path_rate == 0.0:
            raise ValueError("ViT: drop_path_uniform=True given with drop_path_rate=0.0; set a rate above 0 or leave drop_path_uniform out")
        self._fixed_size = is_model_in_modules(name, _FIXED_SIZE_MODULES)
        height, width = pair(img_size)
        stride = None if patch_stride is None else pair(patch_stride)
        chosen: TimmArguments = {key: value for key, value in shape.items() if value is not None}
        # No pooling: timm then keeps the final norm on the tokens and builds no pooling head that would never get a gradient.
        self._timm_args: TimmArguments = {
            "img_size": [height, width] if stride is None else covering((height, width), patch_size=patch_size, stride=stride),
            "in_chans": in_chans,
            "num_classes": 0,
            "global_pool": "token" if "distilled" in name else "",
            "drop_path_rate": drop_path_rate,
            **chosen,
            **(added if not is_model_in_modules(name, ("eva",)) else as_eva_names(added)),
            **(biased_keys(name) if key_bias else {}),
        }
        if not self._fixed_size:
            self._timm_args["dynamic_img_size"] = True
        if is_model_in_modules(name, ("vision_transformer_relpos",)):
            self._timm_args["fc_norm"] = False  # some of these name the norm behind the pooling whatever the pooling is
        is_plain = type(first_block(name)) is Block
        try:
            model = create_model(name, pretrained=False, **self._timm_args, **({"block_fn": PlainBlock} if is_plain else {}))
        except (AssertionError, TypeError) as refusal:  # sizes that do not fit one another; arguments that this model does not have
            raise ValueError(f"ViT: timm refuses to build {name} with {chosen | added}: {refusal}") from refusal
        assert isinstance(model, VisionTransformer | VisionTransformerRelPos | Beit | Eva)
        self.model = model
        if isinstance(model, Beit | Eva):
            check_width(model, name=name)
        plain = type(model) is VisionTransformer
        for word, value, default in (("position_resize", position_resize, "timm"), ("positions", positions, "learned")):
            if value != default and not (plain and model.pos_embed is not None):
                raise ValueError(f"ViT: {word}={value!r} given; {name} accepts {default} only")
        if stride is not None:
            overlap_patches(model, stride, name=name)
        self.position_resize: PositionResize = position_resize
        if norm_eps is not None:
            set_norm_eps(model, norm_eps)
        if rope_periods is not None:
            set_rope_periods(model, rope_periods, name=name)
        start(model, initial, name=name)
        if rope_augmentation is not None:
            augment_positions(model, rope_augmentation, name=name)
        if plain and positions == "sincos":
            fix_positions(model)
        use_keyed_paths(model)
        if drop_path_uniform:
            drop_uniformly(model.blocks, rate=drop_path_rate)
            if is_plain:
                compute_kept(model.blocks)
        self.packs_views = not self._fixed_size and can_pack(model.blocks)
        self.register_parameter("mask_token", None)
        self.local_norm: LocalNorm | None = None
        if local_norm:
            self.add_pretraining(("local_norm.weight",))
        assert isinstance(model.patch_embed, PatchEmbed | HybridEmbed)
        ratio = model.patch_embed.feat_ratio(as_scalar=False)
        assert isinstance(ratio, tuple)
        arguments = {
            "name": name,
            "drop_path_rate": drop_path_rate,
            # Written only where it is set: cards of earlier versions, and the fingerprints made from them, stay the same.
            **({"drop_path_uniform": True} if drop_path_uniform else {}),
            **({"positions": positions} if positions != "learned" else {}),
            **({"key_bias": True} if key_bias else {}),
            **added,
            "position_resize": position_resize,
            "norm_eps": norm_eps,
            "rope_periods": None if rope_periods is None else list(rope_periods),
            "licence": licence,
            "source": source,
            **shape,
            **({"modality": modality} if modality != "image" else {}),
            **({"patch_stride": list(stride)} if stride is not None else {}),
        }
        item_shape = (in_chans, height, width)
        given = {"item_shape": item_shape, "mean": mean, "std": std, "patch_size": ratio, "embed_dim": model.embed_dim}
        self._card = image_card("ViT", arguments, modality=modality, **given)
        self.grid(item_shape)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    def blocks(self) -> Sequence[nn.Module]:
        """timm's blocks."""
        return list(self.model.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class, distillation and register tokens, which stand before the patches."""
        return self.model.num_prefix_tokens

    def grid(self, item_shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image; raises a ValueError as `core.patches.image_grid`, or where one size only is accepted."""
        accepted, size = self._card.item_shape[1:], tuple(item_shape[1:])
        if self._fixed_size and size != accepted:
            raise ValueError(f"{self._card.arguments['name']}: size {size} given; its relative positions accept {accepted} only")
        return image_grid(self._card, item_shape)

    def _encode(self, items: Tensor, *, mask: Tensor | None, keep: Tensor | None = None) -> EncoderOutput:
        tokens, block_args = self._embed(items, mask=mask)
        if keep is not None:
            prefix, patches = tokens.tensor_split([self.num_prefix_tokens], dim=1)
            tokens = torch.cat((prefix, take(patches, keep)), dim=1)
            block_args = [{name: gather_rope(rope, keep) for name, rope in args.items()} for args in block_args]
        return self._end(run(self.model.blocks, tokens, block_args))

    def _encode_cls(self, items: Tensor, *, mask: Tensor | None) -> EncoderOutput:
        tokens, block_args = self._embed(items, mask=mask)
        return self._end(run(self.model.blocks, tokens, block_args, num_queries=self._num_queries(cls_only=True)))

    def _groups(self, groups: Sequence[Views], *, chunk_size: int | None) -> list[EncoderOutput]:
        """Views of several sizes in one sequence of tokens, where that is the faster way."""
        num_tokens = sum(len(group.items) * math.prod(self.grid(group.items.shape[1:])) for group in groups)
        pays = packing_pays(num_tokens * self.embed_dim, device=groups[0].items.device)
        if len(groups) == 1 or chunk_size is not None or not (self.packs_views and pays):
            return super()._groups(groups, chunk_size=chunk_size)
        tokens, args = zip(*(self._embed_group(group) for group in groups), strict=True)
        wanted = [self._num_queries(cls_only=group.cls_only) for group in groups]
        keys = [group.keys for group in groups if group.keys is not None]
        sizes = tuple((len(group), group.shape[1]) for group in tokens)
        paths = drawn_paths(self, torch.cat(keys), sizes=sizes) if keys and self.training else nullcontext()
        with paths as draws, recomputing(self):
            encoded = run_packed(self.model.blocks, tokens, args, num_queries=wanted, draws=draws, attention=self.packed_attention)
        outputs = [self._end(one, are_local=group.are_local) for group, one in zip(groups, encoded, strict=True)]
        return [one.of_cls() if group.cls_only else one for group, one in zip(groups, outputs, strict=True)]

    def _num_queries(self, *, cls_only: bool) -> int | None:
        """How many tokens of an item are wanted; None stands for all, also where `cls` is the mean of the patches."""
        return self.num_prefix_tokens if cls_only and self.model.cls_token is not None else None

    def _embed(self, items: Tensor, *, mask: Tensor | None) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Float[B C H W] to what the first block sees, Float[B T D], and what each block has to be told about positions."""
        model = self.model
        self.grid(items.shape[1:])
        tokens = model.patch_embed(items)  # [B h w D], or [B N D] where the size is fixed
        if mask is not None:
            tokens = hide_tokens(tokens, mask=mask, mask_token=self.mask_token)
        tokens, block_args = add_positions(model, tokens, how=self.position_resize)  # [B T D], prefix tokens first
        return model.norm_pre(tokens) if isinstance(model, VisionTransformer | Eva) else tokens, block_args

    def _embed_group(self, group: Views) -> tuple[Tensor, list[dict[str, Tensor]]]:
        with drawn_positions(self, group.keys):
            return self._embed(group.items, mask=group.mask)

    def _end(self, tokens: Tensor, *, are_local: bool = False) -> EncoderOutput:
        with of_views(self, are_local=are_local):
            normed = normed_tokens(tokens, self.model.norm, local=self.local_norm, num_prefix_tokens=self.num_prefix_tokens)
        return split_tokens(normed, num_prefix_tokens=self.num_prefix_tokens, has_class_token=self.model.cls_token is not None)

    def add_mask_token(self) -> None:
        """Add the learned token that stands for hidden patches, zero at the start (as in iBOT)."""
        if self.mask_token is None:
            self.mask_token = nn.Parameter(next(self.model.parameters()).new_zeros(self.embed_dim))

    def add_pretraining(self, names: Collection[str]) -> None:
        """The mask token, and the final norm of local views."""
        super().add_pretraining(names)
        if "local_norm.weight" in names:
            self.local_norm = LocalNorm(self.model.norm, has_class_token=self.model.cls_token is not None)

    def load_backbone_state(self, state: dict[str, Tensor]) -> None:
        """The final norm of local views starts with the numbers of the one that is loaded; no backbone brings it."""
        super().load_backbone_state(state)
        if self.local_norm is not None:
            self.local_norm.follow(self.model.norm)

    def require_keep(self) -> None:
        """Every ViT drops tokens, except those with relative positions over the whole grid."""
        if self._fixed_size:
            raise ValueError(
                f"{self._card.arguments['name']} cannot drop tokens: its relative positions span the whole grid; choose another ViT"
            )

    def layer_of(self, name: str) -> int:
        """0 for the embedding, i + 1 for block i, `num_layers` + 1 for final norms and the mask token, which no backbone brings."""
        if found := re.match(r"model\.blocks\.(\d+)\.", name):
            return int(found[1]) + 1
        return self.num_layers + 1 if name.startswith(("model.norm.", "local_norm.", "mask_token")) else 0

    def embeds_patches(self, name: str) -> bool:
        """True for the projection of pixels, not for the tokens and positions that are added to it."""
        return name.startswith("model.patch_embed.")

    def library_config(self, card: EncoderCard) -> dict[str, object]:
        """What timm needs to open an exported folder; empty where patches overlap, which no model of timm has."""
        if "patch_stride" in self._card.arguments:
            return {}
        model = self.model
        args = self._timm_args | {"global_pool": "avg" if model.cls_token is None else "token"}
        if not isinstance(model, Beit):  # the norm stays on the tokens, where it was trained, whatever a user's pooling is
            args["use_fc_norm" if isinstance(model, Eva) else "fc_norm"] = False
        return timm_config(model, card, model_args=args)
