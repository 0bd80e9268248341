"""Encoders for `torch.hub.load`, without installing the package.

    torch.hub.load(REPOSITORY, "backbone", "runs/mmc/latest/backbone")
    torch.hub.load(REPOSITORY, "encoder", "vit_small_patch16_224", img_size=96)

REPOSITORY is `user/name` on GitHub, or a folder with `source="local"`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:  # torch.hub checks the dependencies after it has imported this file
    from typing import Unpack

    from glpretrain.weights import LoadOptions

dependencies = ["numpy", "safetensors", "timm", "torch"]


def backbone(path: str | Path, **options: "Unpack[LoadOptions]") -> nn.Module:
    """A trained encoder in evaluation mode: Float[B C H W] to `cls`, Float[B D], and `patches`, Float[B N D].

    Args:
        path: what `glpretrain.load_backbone` accepts, such as a folder written by `glpretrain export`.
        options: options of `glpretrain.load_backbone`.

    Raises:
        ValueError: see `glpretrain.load_backbone`.
    """
    from glpretrain.weights import load_backbone

    return load_backbone(path, **options)


def encoder(name: str, **options: object) -> nn.Module:
    """A ViT with fresh weights, in evaluation mode.

    Args:
        name: name of a timm model, such as `vit_small_patch16_224`.
        options: arguments of `glpretrain.encoders.ViT`, such as `img_size`, `in_chans`, `depth`.

    Raises:
        ValueError: `name` is not a ViT of timm, an argument is unknown, or a size does not fit another.
    """
    from glpretrain.encoders import build_from

    return build_from("ViT", {"name": name, **options}).eval()
