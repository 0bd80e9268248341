"""The parts of a training step that every method shares: teachers, memories, heads, decoders, the optimizer and the warm start."""

from glpretrain.training.branch import Branch
from glpretrain.training.memory import FeatureQueue, State
from glpretrain.training.optim import Clip, Optimization, TrunkRelease
from glpretrain.training.teacher import EMATeacher, FrozenTeacher

__all__ = ["Branch", "Clip", "EMATeacher", "FeatureQueue", "FrozenTeacher", "Optimization", "State", "TrunkRelease"]
