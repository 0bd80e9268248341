"""Scores of a frozen encoder. `default_evaluators` is what a training run reports before and after."""

from glpretrain import modalities
from glpretrain.core.imports import imported
from glpretrain.data.sources.base import Source
from glpretrain.evaluate.base import Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls import KNN, CrossValidatedProbe, DINOLinear, FewShot, LinearProbe, LinearSweep, MAELinear, Retrieval
from glpretrain.evaluate.faces import ForgeryDetection
from glpretrain.evaluate.features import Features
from glpretrain.evaluate.health import Health
from glpretrain.evaluate.items import ROLES, DecodedItems, Sources
from glpretrain.evaluate.patches import (
    AttentionSegmentation,
    ClusterSegmentation,
    InContextSegmentation,
    LabelPropagation,
    LinearSegmentation,
    ObjectDiscovery,
    PromptSegmentation,
)
from glpretrain.evaluate.points import Episodes, LinearSVM, PartSegmentation, PointPrompts, ShapeHistogram
from glpretrain.evaluate.slides import SlideAttention

__all__ = [
    "KNN",
    "ROLES",
    "AttentionSegmentation",
    "ClusterSegmentation",
    "CrossValidatedProbe",
    "DINOLinear",
    "DecodedItems",
    "Episodes",
    "Evaluator",
    "FeatureCache",
    "Features",
    "FewShot",
    "ForgeryDetection",
    "Health",
    "InContextSegmentation",
    "LabelPropagation",
    "LinearProbe",
    "LinearSVM",
    "LinearSegmentation",
    "LinearSweep",
    "MAELinear",
    "ObjectDiscovery",
    "PartSegmentation",
    "PointPrompts",
    "PromptSegmentation",
    "Result",
    "Retrieval",
    "Score",
    "ShapeHistogram",
    "SlideAttention",
    "Sources",
    "default_evaluators",
    "default_sources",
]

# Together about 10 seconds at 48 px on two cores, with intervals of 2 to 4 points.
_MAX_ITEMS = {"train": 2000, "test": 1000, "masked": 400}


def default_evaluators(modality: str) -> dict[str, Evaluator]:
    """What every run on this kind of items is scored with, by name, on `default_sources`.

    Args:
        modality: name of the kind of item.

    Raises:
        ValueError: there is no such kind.
    """
    evaluators: dict[str, Evaluator] = {}
    for name, path in modalities.get(modality).default_evaluators.items():
        evaluators[name] = imported(path)()
    return evaluators


def default_sources(labelled: tuple[Source, Source] | None, masked: Source | None) -> Sources:
    """Fixed subsets that keep the default evaluators to seconds.

    Args:
        labelled: training and test items with classes, if there are any.
        masked: items with instance masks, if there are any.
    """
    given = {} if labelled is None else {"train": labelled[0], "test": labelled[1]}
    given |= {} if masked is None else {"masked": masked}
    return Sources({role: DecodedItems(source, max_items=_MAX_ITEMS[role]) for role, source in given.items()})
