"""Views on the device: batched crops of images, colour, blur and strong augmentation, and crops of clouds. `bench` times images."""

from glpretrain.data.views.base import ViewMaker, Views
from glpretrain.data.views.collapse import CollapsedGroups
from glpretrain.data.views.multicrop import MultiCrop
from glpretrain.data.views.points import PointCrops, PointViewSpec
from glpretrain.data.views.spec import Strong, ViewSpec

__all__ = ["CollapsedGroups", "MultiCrop", "PointCrops", "PointViewSpec", "Strong", "ViewMaker", "ViewSpec", "Views"]
