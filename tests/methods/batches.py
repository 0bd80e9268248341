"""Batches and methods made by hand: the one place where tests know how views and settings are packed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glpretrain.core.batch import Batch, ViewGroup
from glpretrain.core.frames import crop_frames
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.training.optim import Optimization


def batch_of(
    global_views: Tensor,
    *,
    local_views: Tensor | None = None,
    student_views: Tensor | None = None,
    weak: Tensor | None = None,
    coarse_views: Sequence[Tensor] = (),
    mask: Tensor | None = None,
    region_mask: Tensor | None = None,
    corrupted_views: Tensor | None = None,
    corruption: Tensor | None = None,
    boxes: Tensor | None = None,
    index: Tensor | None = None,
    weight: Tensor | None = None,
) -> Batch:
    """Views Float[V B *item] and what else is given; boxes are Float[G B 5]: x0 y0 x1 y1, flip + 2 * quarter turns."""
    frame = None
    if boxes is not None:
        frame = crop_frames(boxes[..., :4], flip=boxes[..., 4] % 2 > 0.5, turns=(boxes[..., 4] // 2).long())
    views = {
        "global": ViewGroup(global_views, frame=frame, mask=mask, region_mask=region_mask, corrupted=corrupted_views, corruption=corruption)
    }
    if local_views is not None:
        views["local"] = ViewGroup(local_views)
    if student_views is not None:
        views["student"] = ViewGroup(student_views, strong=None if weak is None else ~weak)
    views |= {f"coarse_{coarse.shape[2]}": ViewGroup(coarse) for coarse in coarse_views}
    count = global_views.shape[1]
    index = torch.arange(count) if index is None else index
    return Batch(index=index, views=views, weight=torch.ones(count) if weight is None else weight)


def value_of(term: Tensor) -> Tensor:
    """The mean of a term over its items, Float[]."""
    return term.mean()


def method(kind: type[Method], encoder: Encoder, **settings) -> Method:
    """A method; settings of `Optimization` may stand among its own."""
    optimization = {name: settings.pop(name) for name in list(settings) if name in Optimization.__dataclass_fields__}
    return kind(encoder, optimization=Optimization(**optimization), **settings)
