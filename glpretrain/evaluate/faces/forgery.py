"""Is a face real? Forgeries and presentation attacks by AUC, equal and half total error rate: on one set and across sets.

A linear probe on frozen `cls` is fitted on `train` and asked of every other set. Frames of one video (`Source.groups`) stay together
where choices are made and where intervals are drawn, and their probabilities are averaged for a video's score. Fine-tuning, which is what
published tables report, is left out: the numbers here compare backbones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score, require_positive, require_share
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.detection import detection_scores
from glpretrain.evaluate.metrics.intervals import mean_of_scores
from glpretrain.evaluate.metrics.roc import Detections, auc, eer_threshold
from glpretrain.evaluate.probes import small_products, standardiser, stratified_split


@dataclass(frozen=True, kw_only=True)
class ForgeryDetection(Evaluator):
    """Real against forged, live against attack: `auc`, `eer` and `hter` of items, in percent; `video_auc` and so on where items are frames.

    The probe is fitted on `train`; the headlines are those of `test`. `hter` is taken at a threshold that was chosen elsewhere, where the
    error rates are equal on `development`, or on the held-out part of `train` where there is no `development`. A video's score is the mean
    of its frames' probabilities. With `others` also `<role>_auc` and so on, by the same probe and threshold, and `mean_auc` and so on over
    `test` and the others. Chosen: `inverse_l2`, `threshold`, `video_threshold`.

    Args:
        others: roles of more sources that are scored.
        positive: the class that is to be found; all other classes together are the other one.
        inverse_l2: candidates for scikit-learn's C; the best AUC on a held-out part of `train` decides.
        held_out_ratio: share of the videos (or items) of `train` that chooses.
        max_iter: number of L-BFGS iterations.
    """

    headlines = ("auc", "eer", "hter")
    scored = "test"
    needs = ("train", "test")
    takes = ("development",)

    others: Sequence[str] = ()
    positive: str = "fake"
    inverse_l2: Sequence[float] = (0.001, 0.01, 0.1, 1.0)
    held_out_ratio: float = 0.2
    max_iter: int = 500

    def validate(self) -> None:
        if taken := {*self.needs, *self.takes} & set(self.others):
            raise ValueError(f"others: {sorted(taken)} given; these roles have a use of their own; name other roles")
        require_positive("inverse_l2", self.inverse_l2)
        require_share("held_out_ratio", self.held_out_ratio)

    @property
    def roles(self) -> tuple[str, ...]:
        return (*super().roles, *self.others)

    def check_items(self, sources: Sources) -> None:
        if missing := [role for role in self.others if role not in sources]:
            raise ValueError(f"others: needs the sources {missing}; given: {sorted(sources)}")
        for items in (sources[role] for role in self.roles if role in sources):
            classes = list(items.source.classes)
            if self.positive not in classes or len(classes) < 2:
                raise ValueError(f"positive: {self.positive!r}; {items.name} has the classes {classes}; accepted: one of at least two")

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        cls, known = self._rows(encoder, sources["train"], cache)
        standardised = standardiser(cls)
        strength, held_out = self._choose(standardised(cls), known)
        probe = self._fit(standardised(cls), known.positive, strength)

        def found(role: str) -> Detections:
            cls, known = self._rows(encoder, sources[role], cache)
            return known._replace(scores=_probabilities(probe, standardised(cls)))

        choosing = found("development") if "development" in sources else held_out
        thresholds = {"threshold": eer_threshold(choosing)}
        sets = {role: found(role) for role in ("test", *self.others)}
        if any(one.has_groups for one in sets.values()):
            thresholds["video_threshold"] = eer_threshold(choosing.averaged())
        lacking = {role for role, one in sets.items() if one.positive.unique().numel() < 2}
        if lacking == sets.keys():
            raise ValueError(f"{', '.join(sets)}: a set has items of one class only; both are needed")
        tables = {role: detection_scores(one, thresholds) for role, one in sets.items() if role not in lacking}
        prefixes = {role: "" if role == "test" else f"{role}_" for role in lacking}
        if lacking:
            prefixes[", ".join(sorted(lacking))] = "mean_"
        left_out = {f"{prefix}{score}": f"{role}: items of one class only" for role, prefix in prefixes.items() for score in self.headlines}
        scores = {name: score for name, score in _table(tables, headlines=self.headlines).items() if name not in left_out}
        return Result(scores, {"inverse_l2": strength, **thresholds}, left_out)

    def _choose(self, cls: Tensor, known: Detections) -> tuple[float, Detections]:
        """The strength with the best held-out AUC, the strongest penalty on a tie, and what its probe says of the held-out items."""
        held_out, _ = stratified_split(known.positive.long(), known.groups, ratio=self.held_out_ratio)
        chooses = torch.zeros(len(cls), dtype=torch.bool)
        chooses[held_out] = True
        for what, part in (("held-out", chooses), ("other", ~chooses)):
            if known.positive[part].unique().numel() < 2:
                raise ValueError(f"train: its {what} part lacks one of the two classes; give more items of both")
        _, groups = known.groups[chooses].unique(return_inverse=True)
        tried: dict[float, Detections] = {}
        for strength in sorted(self.inverse_l2):
            probe = self._fit(cls[~chooses], known.positive[~chooses], strength)
            tried[strength] = Detections(_probabilities(probe, cls[chooses]), known.positive[chooses], groups)
        best = max(tried, key=lambda strength: auc(tried[strength], torch.ones(1, len(groups))).item())
        return best, tried[best]

    def _rows(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> tuple[Tensor, Detections]:
        """Float[B D] of `cls` and who is who, without scores yet."""
        rows = self.features.labelled(encoder, items, cache)
        groups = torch.arange(len(rows.labels)) if rows.groups is None else rows.groups.unique(return_inverse=True)[1]
        return rows.cls, Detections(torch.zeros(len(rows.cls)), rows.labels == items.source.classes.index(self.positive), groups)

    def _fit(self, cls: Tensor, positive: Tensor, inverse_l2: float) -> LogisticRegression:
        with small_products(cls):
            # Balanced, so that a set with four forgeries for every real face does not move the threshold.
            return LogisticRegression(C=inverse_l2, max_iter=self.max_iter, class_weight="balanced").fit(cls.numpy(), positive.numpy())


def _probabilities(probe: LogisticRegression, cls: Tensor) -> Tensor:
    """Float[B] of the positive class."""
    return torch.from_numpy(probe.predict_proba(cls.numpy())[:, 1])


def _table(sets: Mapping[str, Mapping[str, Score]], *, headlines: Sequence[str]) -> dict[str, Score]:
    """Scores of `test` under their own names, of the others with their set's name before, and the means over all sets."""
    scores = dict(sets.get("test", {}))
    for name, own in sets.items():
        scores |= {} if name == "test" else {f"{name}_{score}": value for score, value in own.items()}
    if len(sets) > 1:
        for score in headlines:
            rows = [own[score] for own in sets.values()]
            scores[f"mean_{score}"] = mean_of_scores(rows, count=sum(row.n for row in rows))
    return scores
