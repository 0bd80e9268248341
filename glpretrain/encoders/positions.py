"""Learned positions for another grid of tokens, resized as the code that trained them resizes them."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# timm: bicubic to the size, antialiased. bicubic: the same without antialiasing. dino: bicubic by a factor for a grid larger by
# 0.1, which moves every sampling point a little; DINO's guard against rounding, kept by iBOT, Mugs and DINOv2.
PositionResize = Literal["timm", "bicubic", "dino"]
POSITION_RESIZES: tuple[PositionResize, ...] = ("timm", "bicubic", "dino")


def resize_positions(positions: Tensor, *, grid: tuple[int, int], new_grid: tuple[int, int], how: PositionResize) -> Tensor:
    """Positions of one grid for another; unchanged where both are the same.

    Args:
        positions: Float[1 R+N D]; the first R, of class and register tokens, belong to no place and stay.
        grid: rows and columns, N in all.
        new_grid: rows and columns, M in all.
        how: see `PositionResize`.

    Returns:
        Float[1 R+M D].
    """
    if grid == new_grid:
        return positions
    num_prefix = positions.shape[1] - grid[0] * grid[1]
    maps = positions[:, num_prefix:].float().unflatten(1, grid).permute(0, 3, 1, 2)  # [1 D h w]
    if how == "dino":
        factors = [(new + 0.1) / old for new, old in zip(new_grid, grid, strict=True)]
        maps = F.interpolate(maps, scale_factor=factors, mode="bicubic")
    else:
        maps = F.interpolate(maps, size=new_grid, mode="bicubic", antialias=how == "timm")
    assert maps.shape[2:] == new_grid
    resized = maps.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)  # [1 M D]
    return torch.cat((positions[:, :num_prefix], resized), dim=1)
