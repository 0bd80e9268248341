"""What every other package builds on: shared types, keys for random draws, schedules, collectives, geometry of points."""

from glpretrain.core.batch import Batch, Uses, ViewGroup
from glpretrain.core.frames import crop_frames, places, token_centres
from glpretrain.core.schedule import Schedule
from glpretrain.core.types import EncoderCard, EncoderOutput, Item

__all__ = ["Batch", "EncoderCard", "EncoderOutput", "Item", "Schedule", "Uses", "ViewGroup", "crop_frames", "places", "token_centres"]
