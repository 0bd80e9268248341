"""Sources of point clouds: files, published data sets, and synthetic solids."""

from glpretrain.data.sources.points.clouds import cloud_item, read_points
from glpretrain.data.sources.points.datasets import ModelNet40, ScanObjectNN, ShapeNet55
from glpretrain.data.sources.points.own_clouds import PointArrays, PointFolder
from glpretrain.data.sources.points.solids import Solids

__all__ = [
    "ModelNet40",
    "PointArrays",
    "PointFolder",
    "ScanObjectNN",
    "ShapeNet55",
    "Solids",
    "cloud_item",
    "read_points",
]
