"""Decoders over the tokens of an item: a few transformer blocks over kept tokens and mask tokens, and a prediction for every token.

Left out: the losses on the predictions (objectives), and heads that see one token or `cls` only (`heads`).
"""

from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glpretrain.encoders.drop_path import drawn_paths
from glpretrain.encoders.initial import sincos_position
from glpretrain.encoders.plain_blocks import BlockShape, plain_blocks
from glpretrain.encoders.points import PositionedBlocks, position_layers, start_weights
from glpretrain.training.heads import truncated_linear

DECODER_PATHS = 0xDEC0  # purpose that a view's key is folded with, so that decoder and encoder drop different paths
NORM_EPS = 1e-6  # of every layer norm, as in the constructors of MAE and FSFM; torch's own is 1e-5


def with_mask_tokens(tokens: Tensor, *, mask_token: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
    """Float[B 1+N E]: the kept patches at their places, and the mask token everywhere else.

    Args:
        tokens: Float[B 1+M E], `cls` and the kept patches.
        mask_token: Float[E].
        keep: Int[B M], places of the kept patches.
        num_tokens: number of all patches N.
    """
    full = mask_token.to(tokens.dtype).expand(len(tokens), num_tokens, -1)  # [B N E]
    full = full.scatter(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]), tokens[:, 1:])
    return torch.cat([tokens[:, :1], full], dim=1)


def _with_positions(tokens: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """Float[B 1+N E], the tokens with the position of every patch added; `cls` has no position."""
    return torch.cat([tokens[:, :1], tokens[:, 1:] + sincos_position(grid, tokens.shape[-1]).to(tokens)], dim=1)


def _blocks(embed_dim: int, *, depth: int, num_heads: int) -> nn.Sequential:
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(
                embed_dim,
                num_heads,
                dim_feedforward=4 * embed_dim,
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=NORM_EPS,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
    )


class TokenDecoder(nn.Module):
    """MAE's decoder: transformer blocks over the kept tokens and a mask token for each of the others, then the pixels of every token.

    Args:
        in_dim: width D of the encoder's tokens.
        patch_dim: number of values to predict per token.
        embed_dim: width E of the decoder's tokens.
        depth: number of blocks.
        num_heads: number of attention heads of a block.
        initial: the rule for fresh matrices: `mae` is Xavier-uniform everywhere, as in the official code; `torch` is what torch gives its
            blocks, with a truncated normal of 0.02 around them.

    Raises:
        ValueError: `initial` is another word.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        patch_dim: int,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        initial: Literal["torch", "mae"] = "torch",
    ) -> None:
        super().__init__()
        if initial not in ("torch", "mae"):
            raise ValueError(f"decoder: initial={initial!r} given; accepted: torch, mae")
        self.embed = truncated_linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.blocks = _blocks(embed_dim, depth=depth, num_heads=num_heads)
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.predict = truncated_linear(embed_dim, patch_dim)
        if initial == "mae":
            _init_xavier(self)

    def forward(self, cls: Tensor, patches: Tensor, *, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """Float[B N patch_dim]: all tokens, predicted from the kept ones.

        Args:
            cls: Float[B D].
            patches: Float[B M D], the kept tokens.
            keep: Int[B M], places of the kept tokens.
            grid: rows and columns of tokens, N in all.
        """
        tokens = self.embed(torch.cat([cls.unsqueeze(1), patches], dim=1))  # [B 1+M E]
        tokens = with_mask_tokens(tokens, mask_token=self.mask_token, keep=keep, num_tokens=grid[0] * grid[1])  # [B 1+N E]
        tokens = _with_positions(tokens, grid=grid)
        return self.predict(self.norm(self.blocks(tokens)[:, 1:]))


class RestoredDecoder(nn.Module):
    """FSFM's pixel decoder: as MAE's, but mask tokens have the encoder's width and are put in before the embedding (models_fsfm.py).

    The arguments are those of `TokenDecoder`.
    """

    def __init__(self, in_dim: int, *, patch_dim: int, embed_dim: int = 512, depth: int = 8, num_heads: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, embed_dim)
        self.blocks = _blocks(embed_dim, depth=depth, num_heads=num_heads)
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.predict = nn.Linear(embed_dim, patch_dim)
        _init_xavier(self)

    def forward(self, tokens: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """Float[B 1+N D], `cls` and all patches as `with_mask_tokens` gives them, to Float[B N patch_dim]."""
        tokens = _with_positions(self.embed(tokens), grid=grid)  # [B 1+N E]
        return self.predict(self.norm(self.blocks(tokens)[:, 1:]))


class RepresentationDecoder(nn.Module):
    """FSFM's rep decoder: one vector for an item with hidden tokens, the mean over `cls` and all tokens (models_fsfm.py).

    It holds the mask token, which the two decoders of the official model share.

    Args:
        dim: width D of the encoder's tokens, and of the result.
        depth: number of blocks.
        num_heads: number of attention heads of a block.
        positions: `none` as in the official code, whose positions are zeros that never learn; or `sincos`.

    Raises:
        ValueError: `positions` is another word.
    """

    def __init__(self, dim: int, *, depth: int = 2, num_heads: int = 16, positions: Literal["none", "sincos"] = "none") -> None:
        super().__init__()
        if positions not in ("none", "sincos"):
            raise ValueError(f"positions: {positions!r} given; accepted: none, sincos")
        self.positions = positions
        self.embed = nn.Linear(dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.blocks = _blocks(dim, depth=depth, num_heads=num_heads)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.predict = nn.Linear(dim, dim)
        _init_xavier(self)

    def forward(self, cls: Tensor, patches: Tensor, *, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        """Float[B D]: the vector of the whole item.

        Args:
            cls: Float[B D].
            patches: Float[B M D], the kept tokens, or all N.
            grid: rows and columns of tokens, N in all.
            keep: Int[B M], places of the kept tokens; None where all are given.
        """
        tokens = self.embed(torch.cat([cls.unsqueeze(1), patches], dim=1))  # [B 1+M D]
        if keep is not None:
            tokens = with_mask_tokens(tokens, mask_token=self.mask_token, keep=keep, num_tokens=grid[0] * grid[1])  # [B 1+N D]
        if self.positions == "sincos":
            tokens = _with_positions(tokens, grid=grid)
        return self.predict(self.norm(self.blocks(tokens))).mean(dim=1)


class MaskedViewDecoder(nn.Module):
    """MaskEmbed's decoder: from embeddings of an image's patches, those of hidden patches zero, to the features of the masked image.

    Tokens that stand before the patches get zeros too, so all that the decoder knows of the image is in the visible patches
    (iancovert/locality-alignment at 092ed8e, locality_alignment/model_utils.py, MaskEmbedDecoder).

    Args:
        in_dim: width E of the embeddings and of the decoder.
        out_dim: width D of the features.
        num_patches: number of patches N.
        num_prefix_tokens: number of tokens before the patches, such as the class token.
        shape: heads, biases and activation of its blocks.
        depth: number of blocks.
    """

    def __init__(self, in_dim: int, *, out_dim: int, num_patches: int, num_prefix_tokens: int, shape: BlockShape, depth: int = 2) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.position = nn.Parameter(torch.empty(num_prefix_tokens + num_patches, in_dim))
        nn.init.normal_(self.position, std=0.02)
        self.blocks = plain_blocks(in_dim, shape=shape, depth=depth, layer_scale=1e-6)
        self.norm = nn.LayerNorm(in_dim)
        self.predict = nn.Linear(in_dim, out_dim)

    def forward(self, patches: Tensor, *, visible: Tensor) -> Tensor:
        """Float[B M T D]: for each of M masks the features of all tokens, those before the patches first.

        Args:
            patches: Float[B N E], embeddings of the patches of whole images.
            visible: Bool[B M N].
        """
        num_items, num_masks, _ = visible.shape
        tokens = (patches.unsqueeze(1) * visible.unsqueeze(-1)).flatten(0, 1)  # [(B M) N E]
        tokens = F.pad(tokens, (0, 0, self.num_prefix_tokens, 0)) + self.position  # [(B M) T E]
        return self.predict(self.norm(self.blocks(tokens))).unflatten(0, (num_items, num_masks))


class GroupDecoder(nn.Module):
    """Point-MAE's decoder: points of hidden groups, from visible tokens and a mask token per hidden group, with their centres' positions.

    Args:
        dim: width D of the encoder and of the decoder.
        depth: number of blocks.
        num_heads: attention heads per block.
        group_size: number of points of a group.
        drop_path_rate: rate of stochastic depth in the last block.
    """

    def __init__(self, dim: int, *, depth: int, num_heads: int, group_size: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.position = position_layers(dim)
        self.blocks = PositionedBlocks(dim, depth=depth, num_heads=num_heads, drop_path_rate=drop_path_rate)
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, 3 * group_size)
        self.apply(start_weights)
        for block in self.blocks:
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, patches: Tensor, *, visible: Tensor, hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        """Predict groups relative to their centres.

        Args:
            patches: Float[B M D], visible tokens.
            visible: Float[B M 3], their centres.
            hidden: Float[B H 3], the other centres.
            keys: Int[B], what dropped paths are drawn from; without them, torch's generator.

        Returns:
            Float[B H group_size 3].
        """
        num_items, num_hidden, _ = hidden.shape
        tokens = torch.cat([patches, self.mask_token.to(patches.dtype).expand(num_items, num_hidden, -1)], dim=1)  # [B M+H D]
        positions = self.position(torch.cat([visible, hidden], dim=1))
        with nullcontext() if keys is None else drawn_paths(self.blocks, keys):
            tokens = self.blocks(tokens, positions)
        return self.predict(self.norm(tokens[:, -num_hidden:])).unflatten(2, (-1, 3))


def _init_xavier(decoder: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases; attention's projection of queries, keys and values counts as one matrix."""
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
