"""Sources of sounds: files, and synthetic sounds."""

from glpretrain.data.sources.audio.folders import AudioFolder
from glpretrain.data.sources.audio.sounds import Sounds

__all__ = ["AudioFolder", "Sounds"]
