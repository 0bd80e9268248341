"""Sources of items. `glpretrain.data.module` (Lightning) and `glpretrain.data.views` (kornia) are imported separately, so that reading
items needs neither."""

from glpretrain.data.episodes import Episode
from glpretrain.data.own import source_for
from glpretrain.data.sources.audio import AudioFolder, HuggingFaceSounds, SoundList, Sounds, SoundShards
from glpretrain.data.sources.base import Item, Source, Subset, UnreadableItemError
from glpretrain.data.sources.images import (
    Bands,
    DicomFolder,
    Faces,
    FaceSwaps,
    HuggingFaceImages,
    ImageFolder,
    ImageList,
    LFWSubset,
    MaskedFolder,
    Scenes,
    SceneVideos,
    TarShards,
    TileFolder,
    Tissue,
    TissueSlides,
    Video,
    VideoFolder,
    VideoSource,
)
from glpretrain.data.sources.points import ModelNet40, PointArrays, PointFolder, ScanObjectNN, ShapeNet55, Solids

__all__ = [
    "AudioFolder",
    "Bands",
    "DicomFolder",
    "Episode",
    "FaceSwaps",
    "Faces",
    "HuggingFaceImages",
    "HuggingFaceSounds",
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
    "SoundList",
    "SoundShards",
    "Sounds",
    "Source",
    "Subset",
    "TarShards",
    "TileFolder",
    "Tissue",
    "TissueSlides",
    "UnreadableItemError",
    "Video",
    "VideoFolder",
    "VideoSource",
    "source_for",
]
