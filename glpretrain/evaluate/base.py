"""What a score is, and what every evaluator does: it runs on an encoder and answers with named numbers, each with its interval.

Training, methods and loggers are left out on purpose. An evaluator sees an encoder and sources, so the same object serves before a run,
during it and after it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

import torch
from matplotlib.figure import Figure

from glpretrain.data.sources.base import Source
from glpretrain.data.sources.images.videos import VideoSource
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import Features
from glpretrain.evaluate.items import DecodedItems, Sources

Given = Mapping[str, Source | DecodedItems | VideoSource] | Sources
Truth = Literal["classes", "masks", "mask_classes"]
_LACKING: dict[Truth, str] = {
    "classes": "classes; this evaluator needs labelled items",
    "masks": "masks; this evaluator needs them",
    "mask_classes": "masks of classes (mask_classes); this evaluator needs them",
}


class Score(NamedTuple):
    """One number and the ends of its 95 % interval, which are None where a single observation tells nothing about the spread."""

    value: float  # rates in percent
    low: float | None
    high: float | None
    n: int  # number of items, images, objects or videos that it is computed from

    def __str__(self) -> str:
        return f"{self.value:.1f}" if self.low is None else f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


class Result(NamedTuple):
    """What one run of an evaluator found."""

    scores: dict[str, Score]
    chosen: dict[str, float]  # what the protocol chose on held-out data, such as a threshold; no scores
    left_out: Mapping[str, str] = MappingProxyType({})  # scores that could not be computed, each with the reason in one line


@dataclass(frozen=True, kw_only=True)
class Evaluator(ABC):
    """Scores of a frozen encoder. An evaluator holds settings only; encoder and sources come when it runs.

    A subclass is a frozen dataclass whose fields are its settings. It says by the class variables below which sources it needs, and
    implements `compute`, and where there is something to look at `draw`. `validate` and `check_items` refuse what it cannot work with.

    Args:
        features: how items are encoded.
    """

    headlines: ClassVar[tuple[str, ...]]  # names of the scores that a table shows
    scored: ClassVar[str]  # role of the items whose scores are reported; those that only vote, fit or calibrate have another one
    needs: ClassVar[tuple[str, ...]]  # roles of the sources that it needs
    takes: ClassVar[tuple[str, ...]] = ()  # roles of the sources that it uses where they are given
    truth: ClassVar[Truth | None] = None  # what all its items must carry, the same in every role
    modality: ClassVar[str | None] = None  # the only kind of item that it accepts; None accepts every kind
    num_axes: ClassVar[int | None] = None  # number of axes of the only grids of tokens that it accepts; None accepts every grid
    unused: ClassVar[tuple[str, ...]] = ("tokens",)  # settings of `features` that it would ignore, and therefore refuses

    features: Features = field(default=Features())

    def __post_init__(self) -> None:
        with self._naming_itself():
            self.features.refuse(*self.unused)
            self.validate()

    def validate(self) -> None:  # noqa: B027 - most evaluators override it
        """Refuse settings that are out of range.

        Raises:
            ValueError: names the setting, its value and what is accepted.
        """

    def check_items(self, sources: Sources) -> None:  # noqa: B027
        """Refuse sources that have the roles, but not what the settings need of them, such as enough items.

        Raises:
            ValueError: names what is missing.
        """

    @abstractmethod
    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        """The scores, of sources that have been checked. Arguments as of `run`."""

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """The figures, by name, of sources that have been checked; none by default. Arguments as of `run`."""
        return {}

    def comparing_seconds(self, dim: int, counts: Mapping[str, int], device: torch.device) -> float:
        """About how long it takes once features are there, by trying it on a few rows; 0 where that is short, or not known before.

        Args:
            dim: width of the features.
            counts: number of items by role.
            device: device of the encoder.
        """
        return 0.0

    def num_bytes(self, dim: int, counts: Mapping[str, int]) -> int:
        """About how much memory the features take that it keeps: by default those of `cls` of all items. Arguments as above."""
        return 4 * dim * sum(counts.values())

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of all sources that it uses where they are given."""
        return (*self.needs, *self.takes)

    def run(self, encoder: Encoder, sources: Given, cache: FeatureCache | None = None) -> Result:
        """Score `encoder` as it is; its weights, mode and device are left alone.

        Args:
            encoder: the encoder, for the kind of items at hand.
            sources: what it is scored on, by role; give one `Sources` to several evaluators and they share the decoded items.
            cache: features of this encoder that were computed before; None computes them.

        Raises:
            ValueError: a source is missing or lacks something, the encoder cannot encode the items, or there are too few of them.
        """
        return self.compute(encoder, self._checked(encoder, sources), cache)

    def attempt(self, encoder: Encoder, sources: Given, cache: FeatureCache | None = None) -> Result:
        """`run` for callers that go on whatever comes of it: what cannot be scored is left out with the reason. Arguments as of `run`.

        Errors of torch count as well, such as a lack of memory on the device.
        """
        try:
            scores, chosen, left_out = self.run(encoder, sources, cache)
        except (ValueError, RuntimeError) as error:
            return Result({}, {}, dict.fromkeys(self.headlines, " ".join(str(error).split()) or type(error).__name__))
        lost = {name: f"its value is {score.value}" for name, score in scores.items() if not math.isfinite(score.value)}
        return Result({name: score for name, score in scores.items() if name not in lost}, chosen, {**left_out, **lost})

    def pictures(self, encoder: Encoder, sources: Given, cache: FeatureCache | None = None) -> dict[str, Figure]:
        """Figures by name for a person to look at, of what `run` scores. Arguments as there."""
        return self.draw(encoder, self._checked(encoder, sources), cache)

    def check(self, sources: Given) -> None:
        """Refuse sources that this evaluator cannot score, before anything is encoded.

        Raises:
            ValueError: a role is missing, or its source lacks what the evaluator needs.
        """
        sources = Sources.of(sources)
        with self._naming_itself():
            if missing := [role for role in self.needs if role not in sources]:
                causes = dict.fromkeys(sources.missing[role] for role in missing if role in sources.missing)
                raise ValueError("; ".join((f"needs the sources {missing}; given: {sorted(sources)}", *causes)))
            if self.truth is not None:
                require_truth(sources, [role for role in self.roles if role in sources], self.truth)
            self.check_items(sources)

    @property
    def protocol(self) -> dict[str, object]:
        """All settings of this score."""
        return asdict(self)

    def _checked(self, encoder: Encoder, sources: Given) -> Sources:
        sources = Sources.of(sources)
        self.check(sources)
        kind, name = encoder.card.modality, encoder.card.encoder
        if self.modality not in (None, kind):
            raise ValueError(f"encoder {name!r} is for {kind}; {type(self).__name__} accepts: {self.modality}")
        if self.num_axes is not None and (axes := len(encoder.grid(encoder.card.item_shape))) != self.num_axes:
            raise ValueError(f"encoder {name!r} has tokens on a grid of {axes} axes; {type(self).__name__} accepts: {self.num_axes}")
        for role in self.roles:
            given = sources.measured(role) if role in sources else None
            if isinstance(given, DecodedItems) and given.source.modality != kind:
                raise ValueError(
                    f"{role}: source {given.name!r} has items of kind {given.source.modality}; encoder {name!r} accepts: {kind}"
                )
        return sources if self.truth is None else sources.with_common_classes(self.roles)

    @contextmanager
    def _naming_itself(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error


def with_accuracy(scores: Mapping[str, Score], *, of: str, left_out: Mapping[str, str]) -> Result:
    """The result of an evaluator whose `accuracy` is one of its scores under a second name.

    Args:
        scores: scores that could be computed.
        of: name of the score that is the accuracy.
        left_out: the others, each with the reason.
    """
    both = {"accuracy": scores[of], **scores} if of in scores else dict(scores)
    return Result(both, {}, {**({"accuracy": left_out[of]} if of in left_out else {}), **left_out})


def require_truth(sources: Sources, roles: Sequence[str], truth: Truth) -> None:
    """Refuse items without labels or masks.

    Args:
        sources: the sources.
        roles: roles of those that are looked at.
        truth: what each of them must carry; the values of masks must have the same names in all of them.

    Raises:
        ValueError: a source lacks it, or the masks of two sources have different classes.
    """
    accepted: list[str] = []
    for role in roles:
        source = sources[role].source
        masks = ["masks"] if source.has_masks else []
        found = {"classes": list(source.classes), "mask_classes": list(source.mask_classes), "masks": masks}[truth]
        if not found:
            raise ValueError(f"source {source.name!r} has no {_LACKING[truth]}")
        accepted = accepted or found
        if truth != "classes" and found != accepted:
            raise ValueError(f"{role}: {truth} {found}; accepted: those of {roles[0]}, {accepted}")


def require_positive(name: str, value: float | Sequence[float]) -> None:
    """Refuse a setting that is not positive, or a sequence that is empty or has such a number.

    Raises:
        ValueError: names the setting and its value.
    """
    if isinstance(value, Sequence):
        if not value or min(value) <= 0:
            raise ValueError(f"{name}: {list(value)}; accepted: positive numbers")
    elif value <= 0:
        raise ValueError(f"{name}: {value}; accepted: a positive number")


def require_share(name: str, value: float) -> None:
    """Refuse a setting that is not between 0 and 1.

    Raises:
        ValueError: names the setting and its value.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name}: {value}; accepted: between 0 and 1")
