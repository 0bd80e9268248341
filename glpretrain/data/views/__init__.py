"""Views on the device: batched multi-crop, colour and blur. `glpretrain.data.views.bench` times it."""

from glpretrain.data.views.multicrop import MultiCrop, Views
from glpretrain.data.views.spec import ViewSpec

__all__ = ["MultiCrop", "ViewSpec", "Views"]
