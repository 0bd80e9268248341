"""What tests read off views: frames of all groups that share an order, and whether a frame flips or turns."""

import torch
from torch import Tensor

from glpretrain.data.views import Views


def frames_of(views: Views) -> Tensor:
    """Float[V B 2 3] of the global and local views, in this order."""
    return torch.cat([views.groups[name].frame for name in ("global", "local") if name in views.groups])


def flips(frames: Tensor) -> Tensor:
    """Bool[*S]: whether a frame of an image mirrors, which its determinant says whatever it turns."""
    return torch.linalg.det(frames[..., :2]) < 0
