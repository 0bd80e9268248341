"""Scores of a frozen encoder. `default_evaluators` is what a training run reports before and after."""

from collections.abc import Mapping

from glpretrain import modalities
from glpretrain.core.imports import imported
from glpretrain.data.sources.base import Source
from glpretrain.evaluate.base import Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls import (
    KNN,
    Agreement,
    CrossValidatedProbe,
    DINOLinear,
    FewShot,
    LinearProbe,
    LinearSweep,
    MAELinear,
    MultilabelProbe,
    Retrieval,
)
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
    PatchMultilabel,
    PromptSegmentation,
)
from glpretrain.evaluate.points import Episodes, LinearSVM, PartSegmentation, PointPrompts, ShapeHistogram
from glpretrain.evaluate.slides import SlideAttention

__all__ = [
    "KNN",
    "ROLES",
    "Agreement",
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
    "MultilabelProbe",
    "ObjectDiscovery",
    "PartSegmentation",
    "PatchMultilabel",
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
    "unlabelled_evaluators",
    "unlabelled_sources",
]

NO_MASKS = "no masks are given"
# Together about 10 seconds at 48 px on two cores, with intervals of 2 to 4 points.
_MAX_ITEMS = {"train": 2000, "test": 1000, "masked": 400}


def default_evaluators(modality: str) -> dict[str, Evaluator]:
    """What every run on this kind of items is scored with, by name, on `default_sources`.

    Args:
        modality: name of the kind of item.

    Raises:
        ValueError: there is no such kind.
    """
    return _made(modalities.get(modality).default_evaluators)


def unlabelled_evaluators(modality: str) -> dict[str, Evaluator]:
    """What items without labels and masks are scored with, by name; none for some kinds of items. Arguments and errors as above."""
    return _made(modalities.get(modality).unlabelled_evaluators)


def _made(paths: Mapping[str, str]) -> dict[str, Evaluator]:
    evaluators: dict[str, Evaluator] = {}
    for name, path in paths.items():
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


def unlabelled_sources(source: Source, *, reason: str) -> Sources:
    """A fixed subset of items without labels, as `test`; other roles are missing.

    Args:
        source: the items.
        reason: why there is no `train`, in one line.
    """
    return Sources({"test": DecodedItems(source, max_items=_MAX_ITEMS["test"])}, missing={"train": reason, "masked": NO_MASKS})
