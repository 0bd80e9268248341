"""Is a face real? Forgeries and presentation attacks by AUC, equal and half total error rate: on one set and across sets.

A linear probe on frozen `cls` is fitted on `train` and asked of every other set. Frames of one video (`Source.groups`) stay together
where choices are made and where intervals are drawn, and their probabilities are averaged for a video's score. Left out: fine-tuning,
which is what published tables report; the numbers here compare backbones.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls.linear import held_out_split, small_products
from glpretrain.evaluate.features import encode
from glpretrain.evaluate.metrics.intervals import drawn_counts, spread_interval
from glpretrain.evaluate.metrics.roc import Detections, auc, eer, eer_threshold, hter, numbered
from glpretrain.evaluate.pixels import Pixels

_MIN_STD = 1e-6  # a collapsed feature is not blown up beyond this


class ForgeryDetection(Evaluator):
    """Real against forged, live against attack: `auc`, `eer` and `hter` of items, in percent; `video_auc` and so on where items are frames.

    `hter` is taken at a threshold that was chosen elsewhere, where the error rates are equal on `development`, or on the held-out part of
    `train`. A video's score is the mean of its frames' probabilities. With `others` also `<set>_auc` and so on, by the same probe and
    threshold, and `mean_auc` and so on over `test` and the others. Chosen: `inverse_l2`, `threshold`, `video_threshold`.

    Args:
        train: items that the probe is fitted on.
        test: items that are scored; the headlines are theirs.
        development: items that choose the threshold; None takes the held-out part of `train`.
        others: more sets to score, by a name for the table.
        positive: the class that is to be found; all other classes together are the other one.
        inverse_l2: candidates for scikit-learn's C; the best AUC on a held-out part of `train` decides.
        held_out_ratio: share of the videos (or items) of `train` that chooses.
        max_iter: L-BFGS iterations.
        image_size: side of the square, or height and width; None for the card's item shape.
        layer: block whose features are taken; negative numbers count from the last.
        batch_size: items at a time.
        bf16: encode under bfloat16 autocast.
    """

    headlines = ("auc", "eer", "hter")

    def __init__(
        self,
        train: Source | Pixels,
        test: Source | Pixels,
        *,
        development: Source | None = None,
        others: dict[str, Source] | None = None,
        positive: str = "fake",
        inverse_l2: Sequence[float] = (0.001, 0.01, 0.1, 1.0),
        held_out_ratio: float = 0.2,
        max_iter: int = 500,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        self.train, self.test = Pixels.of(train), Pixels.of(test)
        self.development = None if development is None else Pixels.of(development)
        self.others = {name: Pixels.of(source) for name, source in (others or {}).items()}
        if "test" in self.others:
            raise ValueError("others: a set is called 'test'; accepted: other names")
        for pixels in (self.train, self.test, self.development, *self.others.values()):
            if pixels is not None:
                _require_classes(pixels, positive)
        if not inverse_l2 or min(inverse_l2) <= 0:
            raise ValueError(f"inverse_l2: {list(inverse_l2)}; accepted: positive numbers")
        if not 0 < held_out_ratio < 1:
            raise ValueError(f"held_out_ratio: {held_out_ratio}; accepted: between 0 and 1")
        self.positive, self.inverse_l2, self.held_out_ratio, self.max_iter = positive, tuple(inverse_l2), held_out_ratio, max_iter
        self.image_size, self.layer, self.batch_size, self.bf16 = image_size, layer, batch_size, bf16

    @property
    def scored(self) -> Pixels:
        return self.test

    @property
    def protocol(self) -> dict[str, object]:
        """As `Evaluator`, with the sets by their fingerprints."""
        development = None if self.development is None else self.development.fingerprint()
        others = {name: pixels.fingerprint() for name, pixels in self.others.items()}
        return super().protocol | {"development": development, "others": others}

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        """As `Evaluator`."""
        cls, known = self._rows(encoder, self.train, cache)
        mean, std = cls.mean(dim=0), cls.std(dim=0).clamp_min(_MIN_STD)
        strength, held_out = self._choose((cls - mean) / std, known)
        probe = self._fit((cls - mean) / std, known.positive, strength)

        def found(pixels: Pixels) -> Detections:
            cls, known = self._rows(encoder, pixels, cache)
            return known._replace(scores=_probabilities(probe, (cls - mean) / std))

        choosing = held_out if self.development is None else found(self.development)
        thresholds = {"threshold": eer_threshold(choosing)}
        sets = {"test": found(self.test)} | {name: found(pixels) for name, pixels in self.others.items()}
        if any(one.has_groups for one in sets.values()):
            thresholds["video_threshold"] = eer_threshold(choosing.averaged())
        scores = _table({name: _scores_of(one, thresholds) for name, one in sets.items()}, headlines=self.headlines)
        return Result(scores, chosen={"inverse_l2": strength, **thresholds})

    def _choose(self, cls: Tensor, known: Detections) -> tuple[float, Detections]:
        """The strength with the best held-out AUC, the strongest penalty on a tie, and what its probe says of the held-out items."""
        held_out, _ = held_out_split(int(known.groups.max()) + 1, ratio=self.held_out_ratio)
        chooses = torch.isin(known.groups, held_out)
        for what, part in (("held-out", chooses), ("other", ~chooses)):
            if known.positive[part].unique().numel() < 2:
                raise ValueError(f"train: its {what} part lacks one of the two classes; give more items, or another held_out_ratio")
        _, groups = known.groups[chooses].unique(return_inverse=True)
        tried: dict[float, Detections] = {}
        for strength in sorted(self.inverse_l2):
            probe = self._fit(cls[~chooses], known.positive[~chooses], strength)
            tried[strength] = Detections(_probabilities(probe, cls[chooses]), known.positive[chooses], groups)
        best = max(tried, key=lambda strength: auc(tried[strength], torch.ones(1, len(groups))).item())
        return best, tried[best]

    def _rows(self, encoder: Encoder, pixels: Pixels, cache: FeatureCache | None) -> tuple[Tensor, Detections]:
        """Float[B D] of `cls` and who is who, without scores yet."""
        options = {"image_size": self.image_size, "layer": self.layer, "batch_size": self.batch_size, "bf16": self.bf16, "cache": cache}
        batches = encode(encoder, pixels, fit="crop", patches=False, **options)
        rows = [(batch.labels, batch.index, output.cls) for batch, output in batches]
        labels, index, cls = (torch.cat(parts) for parts in zip(*rows, strict=True))
        labels, index, cls = labels[labels >= 0], index[labels >= 0], cls[labels >= 0]
        if not cls.isfinite().all():
            raise ValueError(f"source {pixels.name!r}: the encoder's cls features are not finite; nothing can be scored on them")
        names = pixels.source.groups
        groups = numbered([names[number] for number in index.tolist()] if names else (), count=len(index))
        return cls, Detections(torch.zeros(len(cls)), labels == pixels.source.classes.index(self.positive), groups)

    def _fit(self, cls: Tensor, positive: Tensor, inverse_l2: float) -> LogisticRegression:
        with small_products(cls):
            # Balanced, so that a set with four forgeries for every real face does not move the threshold.
            return LogisticRegression(C=inverse_l2, max_iter=self.max_iter, class_weight="balanced").fit(cls.numpy(), positive.numpy())


def _require_classes(pixels: Pixels, positive: str) -> None:
    classes = list(pixels.source.classes)
    if positive not in classes or len(classes) < 2:
        raise ValueError(f"positive: {positive!r} given, {pixels.name} has the classes {classes}; accepted: one of at least two")


def _probabilities(probe: LogisticRegression, cls: Tensor) -> Tensor:
    """Float[B] of the positive class."""
    return torch.from_numpy(probe.predict_proba(cls.numpy())[:, 1])


def _scores_of(found: Detections, thresholds: Mapping[str, float]) -> dict[str, Score]:
    """Of one set."""
    scores: dict[str, Score] = {}
    for level, one in {"": found, "video_": found.averaged()}.items() if found.has_groups else {"": found}.items():
        scores[f"{level}auc"] = _score(auc, one)
        scores[f"{level}eer"] = _score(eer, one)
        threshold = thresholds[f"{level}threshold"]
        scores[f"{level}hter"] = _score(lambda drawn, weights, at=threshold: hter(drawn, weights, threshold=at), one)
    return scores


def _score(statistic: Callable[[Detections, Tensor], Tensor], found: Detections) -> Score:
    """In percent, with the interval that drawing groups with replacement gives."""
    if found.positive.unique().numel() < 2:
        raise ValueError("forgery: a set has items of one class only; both are needed")
    count = int(found.groups.max()) + 1
    value = statistic(found, torch.ones(1, len(found.scores))).item()
    interval = spread_interval(statistic(found, drawn_counts(count)[:, found.groups]))
    return Score(100.0 * value, 100.0 * interval, count)


def _table(sets: Mapping[str, Mapping[str, Score]], *, headlines: Sequence[str]) -> dict[str, Score]:
    """Scores of `test` under their own names, of the others with their set's name before, and the means over all sets."""
    scores = dict(sets["test"])
    for name, own in sets.items():
        scores |= {} if name == "test" else {f"{name}_{score}": value for score, value in own.items()}
    if len(sets) > 1:
        for score in headlines:
            rows = [own[score] for own in sets.values()]
            ci = sum(row.ci**2 for row in rows) ** 0.5 / len(rows)  # the sets are independent
            scores[f"mean_{score}"] = Score(sum(row.value for row in rows) / len(rows), ci, sum(row.n for row in rows))
    return scores
