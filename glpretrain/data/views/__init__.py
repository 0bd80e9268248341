"""Views, made on the device: batched crops, colour operations, blur and strong augmentation of images, and crops of point clouds."""

from glpretrain.data.views.base import ViewMaker, Views
from glpretrain.data.views.changes import Changes
from glpretrain.data.views.multicrop import MultiCrop
from glpretrain.data.views.points import PointCrops, PointViewSpec
from glpretrain.data.views.spec import Strong, ViewSpec

__all__ = ["Changes", "MultiCrop", "PointCrops", "PointViewSpec", "Strong", "ViewMaker", "ViewSpec", "Views"]
