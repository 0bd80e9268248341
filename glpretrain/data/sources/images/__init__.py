"""Sources of images: files, shards, tiles of slides, faces, videos, and synthetic scenes and tissue."""

from glpretrain.data.sources.images.bands import Bands
from glpretrain.data.sources.images.dicom import DicomFolder
from glpretrain.data.sources.images.faces import Faces, FaceSwaps, LFWSubset
from glpretrain.data.sources.images.folders import ImageFolder
from glpretrain.data.sources.images.huggingface import HuggingFaceImages
from glpretrain.data.sources.images.lists import ImageList
from glpretrain.data.sources.images.masked import MaskedFolder
from glpretrain.data.sources.images.scenes import Scenes
from glpretrain.data.sources.images.shards import TarShards
from glpretrain.data.sources.images.tiles import TileFolder
from glpretrain.data.sources.images.tissue import Tissue, TissueSlides
from glpretrain.data.sources.images.videos import SceneVideos, Video, VideoFolder, VideoSource

__all__ = [
    "Bands",
    "DicomFolder",
    "FaceSwaps",
    "Faces",
    "HuggingFaceImages",
    "ImageFolder",
    "ImageList",
    "LFWSubset",
    "MaskedFolder",
    "SceneVideos",
    "Scenes",
    "TarShards",
    "TileFolder",
    "Tissue",
    "TissueSlides",
    "Video",
    "VideoFolder",
    "VideoSource",
]
