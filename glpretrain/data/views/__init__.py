"""Views on the device: batched multi-crop, colour and blur, strong augmentation. `glpretrain.data.views.bench` times it."""

from glpretrain.data.views.multicrop import MultiCrop, Views
from glpretrain.data.views.spec import Strong, ViewSpec

__all__ = ["MultiCrop", "Strong", "ViewSpec", "Views"]
