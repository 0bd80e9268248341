"""How the weights of a ViT begin, and the positions that never learn: the rules of the official codes, where they differ from timm's.

Left out: heads and decoders, which set their own (`training`), and weights that are loaded (`transfer`, `weights`).
"""

from typing import Literal

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# The rule for fresh weights. In all of them, biases of linear layers are 0, and the bias of the patch embedding is torch's own.
# timm: matrices and positions from a truncated normal of 0.02, the patch embedding as a convolution of torch, class and register
#   tokens from a normal of 1e-6; half of a gated layer is near zero with a bias of one.
# dinov2: as timm, without the exception for gated layers (facebookresearch/dinov2 @ b8931f7, models/vision_transformer.py).
# dino: as timm, with a class token of 0.02; also iBOT and Mugs (facebookresearch/dino @ 7c446df, vision_transformer.py).
# dinov3: for models of DINOv3, whose rule in timm divides the last matrices of a block by a factor that grows with its depth: here they do
#   not differ, and class and register tokens come from a normal of 0.02 (facebookresearch/dinov3 @ 6876159, models/vision_transformer.py).
# mae: Xavier-uniform matrices, with the patch embedding as one and queries, keys and values together as another, and a class token from
#   a normal of 0.02; also FSFM (facebookresearch/mae @ efb2a80, models_mae.py).
Initial = Literal["timm", "dino", "dinov2", "dinov3", "mae"]
INITIALS: tuple[Initial, ...] = ("timm", "dino", "dinov2", "dinov3", "mae")
_TOKENS = ("cls_token", "reg_token")


def start(model: nn.Module, rule: Initial, *, name: str) -> None:
    """Give a model that timm has just built the fresh weights of another rule; `timm` changes nothing.

    Args:
        model: timm's model.
        rule: the rule.
        name: name of the model, for messages.

    Raises:
        ValueError: the rule is not for such a model.
    """
    if rule == "timm":
        return
    if rule not in (accepted := _rules_of(model)):
        raise ValueError(f"ViT: initial={rule!r} given; {name} accepts {', '.join(accepted)} only")
    std = 0.02
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(".weight"):
            if rule == "mae":
                nn.init.xavier_uniform_(parameter.data.flatten(1))
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(parameter, std=std)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(parameter)
        elif name in _TOKENS and rule == "dino":
            nn.init.trunc_normal_(parameter, std=std)
        elif name in _TOKENS and rule in ("dinov3", "mae"):
            nn.init.normal_(parameter, std=std)


def _rules_of(model: nn.Module) -> tuple[Initial, ...]:
    """The rules that can be asked for with a model of timm."""
    if type(model) is VisionTransformer:
        return tuple(rule for rule in INITIALS if rule != "dinov3")
    return ("timm", "dinov3") if isinstance(model, Eva) and isinstance(model.rope, RotaryEmbeddingDinoV3) else ("timm",)


def sincos_position(grid: tuple[int, int], dim: int) -> Tensor:
    """Float[N dim]: fixed two-dimensional sine-cosine positions, half of the width for each axis (MAE util/pos_embed.py).

    Raises:
        ValueError: `dim` is not a multiple of four.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions: a width of {dim} given; it must be a multiple of 4")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def axis(position: Tensor) -> Tensor:
        angle = position[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    return torch.cat([axis(columns.flatten()), axis(rows.flatten())], dim=1).float()


def fix_positions(model: VisionTransformer) -> None:
    """Replace the learned positions by sine-cosine positions that never learn; the prefix tokens have none, as in MAE and FSFM."""
    assert model.pos_embed is not None
    rows, columns = model.patch_embed.grid_size
    places = sincos_position((rows, columns), model.embed_dim)
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, -len(places) :] = places
    model.pos_embed.requires_grad_(False)
