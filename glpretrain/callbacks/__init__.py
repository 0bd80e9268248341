"""What watches a run. Callbacks read; none of them changes the mathematics."""

from glpretrain.callbacks.checkpoints import Checkpoints
from glpretrain.callbacks.evaluators import RunEvaluators, scored
from glpretrain.callbacks.health import TrainingHealth
from glpretrain.callbacks.loggers import finish, run_loggers
from glpretrain.callbacks.progress import RunProgress
from glpretrain.callbacks.replay import KeepRefused
from glpretrain.callbacks.signals import StopOnSignal, StoppedBySignalError
from glpretrain.callbacks.start import KeepStart
from glpretrain.callbacks.throughput import Throughput
from glpretrain.callbacks.together import EndedByAnotherError, EndTogether
from glpretrain.callbacks.views import LogViews

__all__ = [
    "Checkpoints",
    "EndTogether",
    "EndedByAnotherError",
    "KeepRefused",
    "KeepStart",
    "LogViews",
    "RunEvaluators",
    "RunProgress",
    "StopOnSignal",
    "StoppedBySignalError",
    "Throughput",
    "TrainingHealth",
    "finish",
    "run_loggers",
    "scored",
]
