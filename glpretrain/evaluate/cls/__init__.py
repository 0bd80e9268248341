"""Evaluators of the class token: classification and retrieval from frozen features."""

from glpretrain.evaluate.cls.agreement import Agreement
from glpretrain.evaluate.cls.few_shot import FewShot
from glpretrain.evaluate.cls.knn import KNN
from glpretrain.evaluate.cls.linear import CrossValidatedProbe, LinearProbe
from glpretrain.evaluate.cls.linear_protocols import DINOLinear, MAELinear
from glpretrain.evaluate.cls.linear_sweep import LinearSweep
from glpretrain.evaluate.cls.multilabel import MultilabelProbe
from glpretrain.evaluate.cls.retrieval import Retrieval

__all__ = [
    "KNN",
    "Agreement",
    "CrossValidatedProbe",
    "DINOLinear",
    "FewShot",
    "LinearProbe",
    "LinearSweep",
    "MAELinear",
    "MultilabelProbe",
    "Retrieval",
]
