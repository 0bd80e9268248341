"""Sources of items. `glpretrain.data.module` (Lightning) and `glpretrain.data.views` (kornia) are imported by their own names,
so reading images needs neither."""

from glpretrain.data.base import Item, Source, Subset, UnreadableItemError
from glpretrain.data.faces import Faces, FaceSwaps, LFWSubset
from glpretrain.data.images import ImageFolder, ImageList, MaskedFolder
from glpretrain.data.point_datasets import ModelNet40, ScanObjectNN, ShapeNet55
from glpretrain.data.point_folders import PointArrays, PointFolder
from glpretrain.data.scenes import Scenes
from glpretrain.data.shards import HuggingFaceImages, TarShards
from glpretrain.data.solids import Solids
from glpretrain.data.tiles import TileFolder
from glpretrain.data.tissue import Tissue
from glpretrain.data.videos import SceneVideos, Video, VideoFolder, VideoSource

__all__ = [
    "FaceSwaps",
    "Faces",
    "HuggingFaceImages",
    "ImageFolder",
    "ImageList",
    "Item",
    "LFWSubset",
    "MaskedFolder",
    "ModelNet40",
    "PointArrays",
    "PointFolder",
    "ScanObjectNN",
    "SceneVideos",
    "Scenes",
    "ShapeNet55",
    "Solids",
    "Source",
    "Subset",
    "TarShards",
    "TileFolder",
    "Tissue",
    "UnreadableItemError",
    "Video",
    "VideoFolder",
    "VideoSource",
]
