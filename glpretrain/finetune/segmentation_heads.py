"""What segmentation puts on the patches of a backbone: one linear layer, or a transformer that reads one token for each class.

A decoder of several scales (UperNet) is left out. Libraries with wheels have it for encoders of their own that give feature maps of several
sizes (segmentation-models-pytorch, transformers), and the one whose results on ViTs are published (mmsegmentation) needs mmcv, which is
built for each version of torch. What makes four sizes of the one of a ViT would have to be written here.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from glpretrain.core.distributed import SyncedBatchNorm
from glpretrain.core.types import EncoderOutput
from glpretrain.finetune.base import Head

Kind = Literal["linear", "transformer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_STD = 0.02  # segm/model/utils.py, init_weights
_HEAD_DIM = 64  # segm/model/factory.py
_SCALE = 10.0  # of the cosines of two classes, at first


def segmentation_head(embed_dim: int, num_classes: int, *, kind: Kind, **settings: int) -> Head:
    """A new head.

    Args:
        embed_dim: width D of the patches.
        num_classes: number of classes K.
        kind: `linear` or `transformer`.
        **settings: settings of its class.

    Raises:
        ValueError: there is no such kind.
    """
    heads: dict[str, Callable[..., Head]] = {"linear": LinearHead, "transformer": MaskTransformer}
    if kind not in heads:
        raise ValueError(f"head={kind!r} given; accepted: {', '.join(KINDS)}")
    return heads[kind](embed_dim, num_classes, **settings)


def on_grid(patches: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Float[B N K] as Float[B K h w]."""
    return patches.transpose(1, 2).unflatten(2, grid)


class LinearHead(Head):
    """Batch norm, and one linear layer on every patch: the head of DINOv2's linear evaluation.

    Reference code: facebookresearch/dinov2 at 7c503b3 (dinov2/eval/segmentation/models/decode_heads/linear_head.py, BNHead).

    Args:
        embed_dim: width D of the patches.
        num_classes: number of classes K.
    """

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.settings = {"kind": "linear"}
        self.norm = SyncedBatchNorm(embed_dim)
        self.linear = nn.Linear(embed_dim, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)  # mmsegmentation's decode_head.py
        nn.init.zeros_(self.linear.bias)

    def forward(self, output: EncoderOutput, *, grid: tuple[int, ...]) -> Tensor:
        """Float[B K h w]."""
        return on_grid(self.linear(self.norm(output.patches)), grid)


class Scale(nn.Module):
    """Multiplication by a learned number.

    Args:
        value: the number at first.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, input: Tensor) -> Tensor:
        """Float[*S] to Float[*S]."""
        return self.value * input


class MaskTransformer(Head):
    """Segmenter's decoder: blocks that read the patches and one token for each class; a patch's logit of a class is their cosine, normed.

    Paper: Strudel et al., 2021, section 3.2. Reference code: rstrudel/segmenter at 20d1bfa (segm/model/decoder.py, MaskTransformer).
    Known differences: there is no dropout (0.1 there); and the cosines of two classes are scaled by one learned number, because the norm of
    two numbers is their order, 1 and -1, which has no gradient.

    Args:
        embed_dim: width D of the patches and of the blocks.
        num_classes: number of classes K.
        num_layers: number of blocks.
        num_heads: number of attention heads; None is one for every 64 of the width.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, embed_dim: int, num_classes: int, *, num_layers: int = 2, num_heads: int | None = None) -> None:
        super().__init__()
        num_heads = max(1, embed_dim // _HEAD_DIM) if num_heads is None else num_heads
        if num_layers < 1 or num_heads < 1 or embed_dim % num_heads:
            given = f"{num_layers} layers and {num_heads} heads of a width of {embed_dim}"
            raise ValueError(f"MaskTransformer: {given} given; accepted: from 1 on, and heads that divide the width")
        self.settings = {"kind": "transformer", "num_layers": num_layers, "num_heads": num_heads}
        self.embed = nn.Linear(embed_dim, embed_dim)
        self.class_token = nn.Parameter(torch.empty(1, num_classes, embed_dim))
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(embed_dim)
        self.project_patches = nn.Linear(embed_dim, embed_dim, bias=False)
        self.project_classes = nn.Linear(embed_dim, embed_dim, bias=False)
        self.class_norm = nn.LayerNorm(num_classes) if num_classes > 2 else Scale(_SCALE)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for projection in (self.project_patches, self.project_classes):
            nn.init.normal_(projection.weight, std=embed_dim**-0.5)
        nn.init.trunc_normal_(self.class_token, std=_STD)

    def forward(self, output: EncoderOutput, *, grid: tuple[int, ...]) -> Tensor:
        """Float[B K h w]."""
        patches = self.embed(output.patches)
        B, N, _ = patches.shape
        tokens = self.norm(self.blocks(torch.cat([patches, self.class_token.expand(B, -1, -1)], dim=1)))  # [B N+K D]
        patches, classes = tokens[:, :N], tokens[:, N:]
        patches = F.normalize(self.project_patches(patches), dim=2)  # [B N D]
        classes = F.normalize(self.project_classes(classes), dim=2)  # [B K D]
        return on_grid(self.class_norm(torch.einsum("bnd,bkd->bnk", patches, classes)), grid)
