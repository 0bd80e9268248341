"""A ViT with an attention pool: one learned query attends to all tokens and gives `cls`, as in CoCa's image tower (CONCH).

Left out: the second pool, whose many tokens only a text decoder reads, and the projection into the space of texts.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder, build_from, register
from glpretrain.encoders.limits import check_numbers
from glpretrain.encoders.states import load_strictly
from glpretrain.encoders.vit import ViT


class _Pool(nn.Module):
    """The attention of one query. Its parameters have the names of the official code, whose files are loaded."""

    def __init__(self, in_dim: int, *, out_dim: int, num_heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, out_dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.attn = nn.MultiheadAttention(out_dim, num_heads, kdim=in_dim, vdim=in_dim, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(out_dim), nn.LayerNorm(in_dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Float[B T in_dim] to the pooled Float[B out_dim], and to Float[B T out_dim]: what each token alone would give."""
        tokens = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), 1, -1)
        pooled, _ = self.attn(query, tokens, tokens, need_weights=False)
        values = F.linear(tokens, self.attn.v_proj_weight, self.attn.in_proj_bias.chunk(3)[2])
        return pooled[:, 0], self.attn.out_proj(values)


@register
class PooledViT(Encoder):
    """A timm ViT with an attention pool, with fresh weights.

    Patches are ours: what the pool would give if its query attended to that patch alone, so that they lie in the space of `cls`.

    Args:
        name: name of a timm ViT with a class token and no registers.
        pool_dim: width D of the pooled features.
        pool_heads: number of attention heads of the pool.
        img_size: height and width of the images, see `ViT`.
        patch_size: side of a patch in pixels.
        in_chans: number of channels.
        embed_dim: width of the ViT's tokens.
        depth: number of the ViT's blocks.
        num_heads: number of the ViT's attention heads.
        mlp_ratio: see `ViT`.
        drop_path_rate: see `ViT`.
        mean: mean of each channel, see `ViT`.
        std: standard deviation of each channel, see `ViT`.
        licence: licence of the weights.
        source: source of the weights.

    Raises:
        ValueError: the ViT has registers or no class token, or a size does not fit another one.
    """

    def __init__(
        self,
        name: str,
        *,
        pool_dim: int = 512,
        pool_heads: int = 8,
        img_size: int | Sequence[int] = 448,
        patch_size: int | None = None,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        drop_path_rate: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        licence: str = "",
        source: str = "",
    ) -> None:
        super().__init__()
        shape = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        given = {"name": name, "img_size": img_size, "in_chans": in_chans, "drop_path_rate": drop_path_rate, "mean": mean, "std": std}
        trunk = build_from("ViT", given | shape)
        assert isinstance(trunk, ViT)
        self.trunk = trunk
        if self.trunk.model.cls_token is None or self.trunk.num_prefix_tokens != 1:
            raise ValueError(f"PooledViT: name={name!r} given; accepted: a ViT with a class token and no registers")
        check_numbers("PooledViT", pool_dim=pool_dim, pool_heads=pool_heads)
        if pool_dim % pool_heads:
            raise ValueError(f"PooledViT: pool_dim={pool_dim} does not divide into pool_heads={pool_heads}")
        self.attn_pool_contrast = _Pool(self.trunk.embed_dim, out_dim=pool_dim, num_heads=pool_heads)
        self.ln_contrast = nn.LayerNorm(pool_dim)
        arguments = {key: trunk.card.arguments[key] for key in given | shape}
        arguments |= {"pool_dim": pool_dim, "pool_heads": pool_heads, "licence": licence, "source": source}
        self._card = replace(trunk.card, encoder="PooledViT", arguments=arguments, embed_dim=pool_dim, licence=licence, source=source)

    @property
    def num_layers(self) -> int:
        """Number of the ViT's blocks."""
        return self.trunk.num_layers

    def blocks(self) -> Sequence[nn.Module]:
        """The ViT's blocks."""
        return self.trunk.blocks()

    def grid(self, item_shape: Sequence[int]) -> tuple[int, int]:
        """See `ViT.grid`."""
        return self.trunk.grid(item_shape)

    def _encode(self, items: Tensor, *, mask: Tensor | None, keep: Tensor | None = None) -> EncoderOutput:
        output = self.trunk(items, mask=mask, keep=keep)
        cls, tokens = self.attn_pool_contrast(torch.cat([output.cls.unsqueeze(1), output.patches], dim=1))  # [B D], [B 1+N D]
        return EncoderOutput(cls=self.ln_contrast(cls), patches=self.ln_contrast(tokens[:, 1:]))

    def add_mask_token(self) -> None:
        """See `ViT`."""
        self.trunk.add_mask_token()

    def require_keep(self) -> None:
        """See `ViT`."""
        self.trunk.require_keep()

    def layer_of(self, name: str) -> int:
        """Layers of the ViT; the pool follows its last block."""
        return self.trunk.layer_of(name.removeprefix("trunk.")) if name.startswith("trunk.") else self.num_layers + 1

    def backbone_state(self) -> dict[str, Tensor]:
        """The official names: `trunk.` and timm's, `attn_pool_contrast.`, `ln_contrast.`."""
        pool = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("trunk.")}
        return {f"trunk.{name}": tensor for name, tensor in self.trunk.backbone_state().items()} | pool

    def load_backbone_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `backbone_state`, strict."""
        own = {name.removeprefix("trunk."): tensor for name, tensor in state.items() if name.startswith("trunk.")}
        mask = {} if self.trunk.mask_token is None else {"trunk.mask_token": self.trunk.mask_token.detach()}
        pool = {name: tensor for name, tensor in state.items() if not name.startswith("trunk.")}
        load_strictly(self, {f"trunk.model.{name}": tensor for name, tensor in own.items()} | pool | mask)
