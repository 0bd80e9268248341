"""A class for each slide by gated attention over the frozen features of its tiles; see `multiple_instance` for the module and its fit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.detection import detection_score
from glpretrain.evaluate.metrics.intervals import accuracy, mean_of_scores
from glpretrain.evaluate.metrics.roc import Detections, auc
from glpretrain.evaluate.probes import answerable
from glpretrain.evaluate.rows import LabelledFeatures
from glpretrain.evaluate.slides.multiple_instance import fit_gated_attention


@dataclass(frozen=True, kw_only=True)
class SlideAttention(Evaluator):
    """Classes of slides: `accuracy` and `balanced_accuracy`, and with two classes `auc` of the second one, of slides and in percent.

    The tiles of a slide (`Source.groups`) are a bag with one label. Attention is fitted on the slides of `train` and asked about those of
    `test`; some slides of `train` are held out and stop the fit.

    Args:
        hidden_dim: number of hidden values of the attention.
        dropout: dropout rate of the features.
        epochs: number of passes over the slides, at most.
        lr: Adam's learning rate.
        weight_decay: Adam's weight decay.
        class_weights: whether every class counts alike, however many slides it has.
        held_out_ratio: share of the slides of each class of `train` that stops the fit; 0 fits all of them for all epochs.
        patience: number of epochs without a lower loss of the held-out slides after which it stops.
        min_epochs: number of epochs before which it does not stop.
        seed: seed of weights, order and dropout.
    """

    headlines = ("accuracy", "balanced_accuracy", "auc")
    scored = "test"
    needs = ("train", "test")
    truth = "classes"

    hidden_dim: int = 128
    dropout: float = 0.25
    epochs: int = 100
    lr: float = 2e-4
    weight_decay: float = 1e-4
    class_weights: bool = True
    held_out_ratio: float = 0.125
    patience: int = 20
    min_epochs: int = 50
    seed: int = 0

    def validate(self) -> None:
        for name in ("hidden_dim", "epochs", "lr", "patience"):
            require_positive(name, vars(self)[name])
        for name in ("dropout", "held_out_ratio"):
            if not 0.0 <= vars(self)[name] < 1.0:
                raise ValueError(f"{name}: {vars(self)[name]}; accepted: 0 or more, and less than 1")

    def check_items(self, sources: Sources) -> None:
        for items in (sources[role] for role in self.needs):
            if not items.source.groups:
                raise ValueError(f"source {items.name!r}: its items belong to no slides; accepted: tiles, as glpretrain tiles cuts them")

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        train, test = (self.features.labelled(encoder, sources[role], cache) for role in self.needs)
        test, left_out = answerable(train, test, sources)
        bags, labels = _bags(train, sources["train"])
        known, numbers = torch.tensor(labels).unique(return_inverse=True)
        attention = fit_gated_attention(
            bags,
            numbers.tolist(),
            hidden_dim=self.hidden_dim,
            dropout=self.dropout,
            epochs=self.epochs,
            lr=self.lr,
            weight_decay=self.weight_decay,
            class_weights=self.class_weights,
            held_out_ratio=self.held_out_ratio,
            patience=self.patience,
            min_epochs=self.min_epochs,
            seed=self.seed,
        )
        asked, truths = _bags(test, sources["test"])
        truth = torch.tensor(truths)
        with torch.no_grad():
            logits = torch.stack([attention(bag)[0] for bag in asked])  # [S K]
        predicted = known[logits.argmax(dim=1)]
        recalls = [accuracy(predicted[truth == label], truth[truth == label]) for label in truth.unique().tolist()]
        scores = {"accuracy": accuracy(predicted, truth), "balanced_accuracy": mean_of_scores(recalls, count=len(truth))}
        positive = truth == known[-1]
        if len(known) == 2 and positive.unique().numel() == 2:
            found = Detections(logits.softmax(dim=1)[:, 1], positive, torch.arange(len(truth)))
            return Result({**scores, "auc": detection_score(auc, found)}, {}, left_out)
        reason = "test shows one of two classes" if len(known) == 2 else f"{len(known)} classes; an AUC is of two"
        return Result(scores, {}, {**left_out, "auc": reason})


def _bags(rows: LabelledFeatures, items: DecodedItems) -> tuple[list[Tensor], list[int]]:
    """The rows of each slide, Float[M D], and its class.

    Raises:
        ValueError: tiles of a slide are of several classes.
    """
    assert rows.groups is not None, "check_items looked at it"
    bags, labels = [], []
    for group in rows.groups.unique().tolist():
        own = rows.groups == group
        if len(shown := rows.labels[own].unique()) > 1:
            name = items.source.groups[int(rows.index[own][0])]
            raise ValueError(f"source {items.name!r}: the tiles of {name} are of {len(shown)} classes; a slide has one")
        bags.append(rows.cls[own])
        labels.append(int(shown[0]))
    return bags, labels
