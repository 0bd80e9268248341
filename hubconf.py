"""Encoders through `torch.hub.load`, without installing the package.

    torch.hub.load(REPOSITORY, "backbone", "runs/mmc/latest/backbone")
    torch.hub.load(REPOSITORY, "encoder", "vit_small_patch16_224", img_size=96)

REPOSITORY is `user/name` on GitHub, or a folder with `source="local"`.
"""

from pathlib import Path

from torch import nn

dependencies = ["numpy", "safetensors", "timm", "torch"]


def backbone(path: str | Path, **options: str | int | bool | None) -> nn.Module:
    """A trained encoder in evaluation mode: Float[B C H W] to `cls`, Float[B D], and `patches`, Float[B N D].

    Args:
        path: what `glpretrain.load_backbone` takes, such as a folder written by `glpretrain export`.
        options: of `glpretrain.load_backbone`.

    Raises:
        ValueError: see `glpretrain.load_backbone`.
    """
    from glpretrain.weights import load_backbone

    return load_backbone(path, **options)


def encoder(name: str, **options: str | int | float | list[int] | list[float] | None) -> nn.Module:
    """A ViT with fresh weights, in evaluation mode.

    Args:
        name: of a timm model, such as `vit_small_patch16_224`.
        options: of `glpretrain.encoders.ViT`, such as `img_size`, `in_chans`, `depth`.

    Raises:
        ValueError: `name` is no ViT of timm, or a size does not fit another.
    """
    from glpretrain.encoders import ViT

    return ViT(name, **options).eval()
