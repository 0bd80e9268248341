"""Sources of sounds: files, lists, shards, columns of data sets, and synthetic sounds."""

from glpretrain.data.sources.audio.folders import AudioFolder
from glpretrain.data.sources.audio.huggingface import HuggingFaceSounds
from glpretrain.data.sources.audio.lists import SoundList
from glpretrain.data.sources.audio.shards import SoundShards
from glpretrain.data.sources.audio.sounds import Sounds

__all__ = ["AudioFolder", "HuggingFaceSounds", "SoundList", "SoundShards", "Sounds"]
