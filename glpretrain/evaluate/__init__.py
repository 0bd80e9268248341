"""Scores of a frozen encoder. `default_evaluators` is what a training run reports before and after."""

from glpretrain.data.sources.base import Source
from glpretrain.evaluate.base import ROLES, Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls.cross_validation import CrossValidatedProbe
from glpretrain.evaluate.cls.few_shot import FewShot
from glpretrain.evaluate.cls.knn import KNN
from glpretrain.evaluate.cls.linear import LinearProbe
from glpretrain.evaluate.cls.linear_sweep import LinearSweep
from glpretrain.evaluate.cls.retrieval import Retrieval
from glpretrain.evaluate.faces.forgery import ForgeryDetection
from glpretrain.evaluate.health import Health
from glpretrain.evaluate.patches.attention_segmentation import AttentionSegmentation
from glpretrain.evaluate.patches.clustering import ClusterSegmentation
from glpretrain.evaluate.patches.discovery import ObjectDiscovery
from glpretrain.evaluate.patches.in_context import InContextSegmentation
from glpretrain.evaluate.patches.linear_segmentation import LinearSegmentation
from glpretrain.evaluate.patches.prompt_segmentation import PromptSegmentation
from glpretrain.evaluate.patches.propagation import LabelPropagation
from glpretrain.evaluate.pixels import Pixels
from glpretrain.evaluate.points.episodes import Episodes
from glpretrain.evaluate.points.linear_svm import LinearSVM
from glpretrain.evaluate.points.part_segmentation import PartSegmentation
from glpretrain.evaluate.points.prompts import PointPrompts
from glpretrain.evaluate.points.shape_histogram import ShapeHistogram

__all__ = [
    "KNN",
    "ROLES",
    "AttentionSegmentation",
    "ClusterSegmentation",
    "CrossValidatedProbe",
    "Episodes",
    "Evaluator",
    "FeatureCache",
    "FewShot",
    "ForgeryDetection",
    "Health",
    "InContextSegmentation",
    "LabelPropagation",
    "LinearProbe",
    "LinearSVM",
    "LinearSegmentation",
    "LinearSweep",
    "ObjectDiscovery",
    "PartSegmentation",
    "Pixels",
    "PointPrompts",
    "PromptSegmentation",
    "Result",
    "Retrieval",
    "Score",
    "ShapeHistogram",
    "default_evaluators",
]

# Together about 10 seconds at 48 px on two cores, with intervals of 2 to 4 points.
_MAX_TRAIN, _MAX_TEST, _MAX_MASKED = 2000, 1000, 400


def default_evaluators(labelled: tuple[Source, Source], masked: Source) -> dict[str, Evaluator]:
    """What every run is scored with, on fixed subsets that keep it to seconds.

    Args:
        labelled: training and test items with classes.
        masked: items with instance masks.

    Returns:
        "knn", "linear" ("svm" for points) and "prompt"; the first two share their decoded items.
    """
    train, test = Pixels(labelled[0], max_items=_MAX_TRAIN), Pixels(labelled[1], max_items=_MAX_TEST)
    # A folder of a dozen photographs is still scored; the names of the scores say with which k.
    k = tuple(count for count in (10, 20) if count <= len(train)) or (1,)
    if train.source.modality == "points":
        prompts = PointPrompts(Pixels(masked, max_items=_MAX_MASKED))
        return {"knn": KNN(train, test, k=k), "svm": LinearSVM(train, test), "prompt": prompts}
    return {
        "knn": KNN(train, test, k=k),
        "linear": LinearProbe(train, test),
        "prompt": PromptSegmentation(Pixels(masked, max_items=_MAX_MASKED)),
    }
