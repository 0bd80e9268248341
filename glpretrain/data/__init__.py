"""Sources of items. `glpretrain.data.module` (Lightning) and `glpretrain.data.views` (kornia) are imported by their own names,
so reading images needs neither."""

from glpretrain.data.own import source_for
from glpretrain.data.sources.base import Item, Source, Subset, UnreadableItemError
from glpretrain.data.sources.faces import Faces, FaceSwaps, LFWSubset
from glpretrain.data.sources.images import ImageFolder, ImageList, MaskedFolder
from glpretrain.data.sources.point_datasets import ModelNet40, ScanObjectNN, ShapeNet55
from glpretrain.data.sources.point_folders import PointArrays, PointFolder
from glpretrain.data.sources.scenes import Scenes
from glpretrain.data.sources.shards import HuggingFaceImages, TarShards
from glpretrain.data.sources.solids import Solids
from glpretrain.data.sources.tiles import TileFolder
from glpretrain.data.sources.tissue import Tissue
from glpretrain.data.sources.videos import SceneVideos, Video, VideoFolder, VideoSource

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
    "source_for",
]
