"""Views, made on the device: batched crops, colours, blur and strong augmentation of images, crops of clouds, stretches of sounds."""

from glpretrain.data.views.base import ViewMaker, Views
from glpretrain.data.views.changes import Changes
from glpretrain.data.views.multicrop import MultiCrop
from glpretrain.data.views.points import PointCrops, PointViewSpec
from glpretrain.data.views.sounds import SoundCrops, SoundViewSpec
from glpretrain.data.views.spec import Strong, ViewSizes, ViewSpec

__all__ = [
    "Changes",
    "MultiCrop",
    "PointCrops",
    "PointViewSpec",
    "SoundCrops",
    "SoundViewSpec",
    "Strong",
    "ViewMaker",
    "ViewSizes",
    "ViewSpec",
    "Views",
]
