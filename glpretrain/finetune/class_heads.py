"""What classification puts on the tokens of a backbone: one linear layer, the layers of Point-MAE's classifier of clouds, or those of
FSFM's detector of spoofed faces.

Reference code: facebookresearch/mae at efb2a80 (models_vit.py), Pang-Yatian/Point-MAE at 7445a68 (models/Point_MAE.py, PointTransformer),
wolo-wolo/FSFM-CVPR25 at 986aaab (fsfm-3c/finuetune/cross_domain_FAS: fas.py, models_vit.py).
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glpretrain.core.distributed import SyncedBatchNorm
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.layers import can_be_without_norm
from glpretrain.finetune.base import Head, for_tuning

Pool = Literal["cls", "mean", "cls_mean", "cls_max"]
Kind = Literal["linear", "mlp", "normalized"]
POOLS: tuple[Pool, ...] = get_args(Pool)
KINDS: tuple[Kind, ...] = get_args(Kind)
_NORM_EPS = 1e-6  # of MAE's fc_norm
_HEAD_STD = 2e-5  # main_finetune.py
_MLP_DIM = 256  # of Point-MAE's cls_head_finetune
_BOTTLENECK_DIM, _BOTTLENECK_STD, _BOTTLENECK_BIAS, _CLASSIFIER_STD, _LEAST_NORM = 512, 0.005, 0.1, 0.01, 1e-12  # of fas.py


def class_head(embed_dim: int, num_classes: int, *, kind: Kind = "linear", **settings: object) -> Head:
    """A new head.

    Args:
        embed_dim: width D of the tokens.
        num_classes: number of classes K.
        kind: `linear`, `mlp` or `normalized`.
        **settings: settings of its class.

    Raises:
        ValueError: there is no such kind.
    """
    heads: dict[str, Callable[..., Head]] = {"linear": ClassHead, "mlp": MLPHead, "normalized": NormalizedHead}
    if kind not in heads:
        raise ValueError(f"Classification: head={kind!r} given; accepted: {', '.join(KINDS)}")
    return heads[kind](embed_dim, num_classes, **settings)


def with_class_head(
    encoder: Encoder, num_classes: int, *, pool: Pool, head: Kind, dropout: float, drop_path: float, freeze: bool
) -> tuple[Encoder, Head]:
    """A backbone as it is fine-tuned, and a new head for it; arguments as in `Classification`.

    Raises:
        ValueError: a value out of range, or an encoder that the settings do not fit.
    """
    # As in MAE: the mean is taken before the final norm, and has one of its own. Encoders of other kinds keep theirs below it.
    norm = pool == "mean" and head != "mlp"
    keeps_norm = not (norm and can_be_without_norm(encoder))
    encoder = for_tuning(encoder, drop_path=drop_path, final_norm=keeps_norm, class_token=pool == "cls_max" and not freeze)
    settings = ({"norm": norm} if head != "mlp" else {}) | ({"dropout": dropout} if head != "linear" else {})
    return encoder, class_head(encoder.embed_dim, num_classes, kind=head, pool=pool, **settings)


def pooled(output: EncoderOutput, pool: Pool) -> Tensor:
    """Float[B D] or Float[B 2D]: what a head sees of the tokens of an item."""
    if pool == "cls":
        return output.cls
    if pool == "cls_max":
        return torch.cat([output.cls, output.patches.amax(dim=1)], dim=1)
    mean = output.patches.mean(dim=1)  # [B D]
    return mean if pool == "mean" else torch.cat([output.cls, mean], dim=1)


def pooled_dim(embed_dim: int, pool: Pool) -> int:
    """Width of what `pooled` gives.

    Raises:
        ValueError: there is no such pooling.
    """
    if pool not in POOLS:
        raise ValueError(f"Classification: pool={pool!r} given; accepted: {', '.join(POOLS)}")
    return embed_dim if pool in ("cls", "mean") else 2 * embed_dim


def dropout_rate(dropout: float) -> float:
    """The share, if it is one.

    Raises:
        ValueError: it is below 0, or 1 or more.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"Classification: dropout={dropout} given; accepted: 0 or more, and less than 1")
    return dropout


class ClassHead(Head):
    """Pooled tokens, a norm where there is one, and a linear layer.

    Args:
        embed_dim: width D of the tokens.
        num_classes: number of classes K.
        pool: `mean` of the patches, `cls`, both side by side, or `cls` beside the maximum of the patches.
        norm: whether a layer norm stands behind the pooling.

    Raises:
        ValueError: there is no such pooling.
    """

    def __init__(self, embed_dim: int, num_classes: int, *, pool: Pool, norm: bool) -> None:
        super().__init__()
        width = pooled_dim(embed_dim, pool)
        self.settings = {"pool": pool, "norm": norm}
        self.pool: Pool = pool
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS) if norm else nn.Identity()
        self.linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=_HEAD_STD)
        nn.init.zeros_(self.linear.bias)

    def features(self, output: EncoderOutput) -> Tensor:
        """Float[B D]: what the linear layer sees of the tokens of items."""
        return self.norm(pooled(output, self.pool))

    def forward(self, output: EncoderOutput, *, grid: tuple[int, ...]) -> Tensor:
        """Float[B K]."""
        return self.linear(self.features(output))


class MLPHead(Head):
    """Pooled tokens, and three linear layers with batch norm and dropout between them: the head of Point-MAE's classifier.

    The layers keep torch's own initialisation, as in the reference code.

    Args:
        embed_dim: width D of the tokens.
        num_classes: number of classes K.
        pool: see `ClassHead`.
        dropout: share of the hidden values that are dropped in training.

    Raises:
        ValueError: there is no such pooling, or the share is out of range.
    """

    def __init__(self, embed_dim: int, num_classes: int, *, pool: Pool, dropout: float = 0.5) -> None:
        super().__init__()
        self.settings = {"kind": "mlp", "pool": pool, "dropout": dropout_rate(dropout)}
        self.pool: Pool = pool
        self.layers = nn.Sequential(
            *self._hidden(pooled_dim(embed_dim, pool), dropout), *self._hidden(_MLP_DIM, dropout), nn.Linear(_MLP_DIM, num_classes)
        )

    @staticmethod
    def _hidden(width: int, dropout: float) -> list[nn.Module]:
        return [nn.Linear(width, _MLP_DIM), SyncedBatchNorm(_MLP_DIM), nn.ReLU(), nn.Dropout(dropout)]

    def forward(self, output: EncoderOutput, *, grid: tuple[int, ...]) -> Tensor:
        """Float[B K]."""
        return self.layers(pooled(output, self.pool))


class NormalizedHead(Head):
    """The head of FSFM's detector of spoofed faces: a layer of 512 values, each divided by the square root of twice its norm, and a
    classifier with normalised weights.

    The norm of a value is taken over the tokens of an item, the pooled one and all patches, and not over the 512 values: the official ViT
    hands on all of its tokens, and `feature_embedder` takes its norm along the second axis. What a value weighs in all classes has length
    1; the weights are set to that before each training step, so the gradient is that of a plain layer.

    Args:
        embed_dim: width D of the tokens.
        num_classes: number of classes K.
        pool: `mean`; no other one is accepted.
        norm: whether a layer norm stands behind the pooling.
        dropout: share of the 512 values that are dropped in training.

    Raises:
        ValueError: another pooling, or the share is out of range.
    """

    def __init__(self, embed_dim: int, num_classes: int, *, pool: Pool, norm: bool, dropout: float = 0.5) -> None:
        super().__init__()
        if pool != "mean":
            raise ValueError(f"Classification: pool={pool!r} given with head='normalized'; accepted: mean")
        self.settings = {"kind": "normalized", "pool": pool, "norm": norm, "dropout": dropout}
        self.norm = nn.LayerNorm(embed_dim, eps=_NORM_EPS) if norm else nn.Identity()
        self.bottleneck = nn.Linear(embed_dim, _BOTTLENECK_DIM)
        self.dropout = nn.Dropout(dropout_rate(dropout))
        self.linear = nn.Linear(_BOTTLENECK_DIM, num_classes)
        nn.init.normal_(self.bottleneck.weight, std=_BOTTLENECK_STD)
        nn.init.constant_(self.bottleneck.bias, _BOTTLENECK_BIAS)
        nn.init.normal_(self.linear.weight, std=_CLASSIFIER_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, output: EncoderOutput, *, grid: tuple[int, ...]) -> Tensor:
        """Float[B K]."""
        tokens = torch.cat([self.norm(pooled(output, "mean")).unsqueeze(1), output.patches], dim=1)  # [B 1+N D]
        hidden = self.dropout(F.relu(self.bottleneck(tokens)))  # [B 1+N 512]
        scaled = hidden[:, 0] / (2 * hidden.norm(dim=1).clamp(min=_LEAST_NORM)).sqrt()
        if self.training:
            with torch.no_grad():
                self.linear.weight.copy_(F.normalize(self.linear.weight, dim=0))
            return self.linear(scaled)
        return F.linear(scaled, F.normalize(self.linear.weight, dim=0), self.linear.bias)
