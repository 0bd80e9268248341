"""Sources of items. `glpretrain.data.module` (Lightning), `glpretrain.data.views` (kornia) and `glpretrain.data.tiles` (slides) are
imported by their own names, so reading images needs none of them."""

from glpretrain.data.base import Item, Source, Subset, UnreadableItemError
from glpretrain.data.images import ImageFolder, ImageList, MaskedFolder
from glpretrain.data.scenes import Scenes
from glpretrain.data.shards import HuggingFaceImages, TarShards
from glpretrain.data.videos import SceneVideos, Video, VideoFolder, VideoSource

__all__ = [
    "HuggingFaceImages",
    "ImageFolder",
    "ImageList",
    "Item",
    "MaskedFolder",
    "SceneVideos",
    "Scenes",
    "Source",
    "Subset",
    "TarShards",
    "UnreadableItemError",
    "Video",
    "VideoFolder",
    "VideoSource",
]
