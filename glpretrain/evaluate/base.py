"""What a score is: an object that runs on an encoder and answers with named numbers, how sure they are and on how many things they rest.

Left out on purpose: training, methods and loggers. An evaluator sees an encoder and sources, so the same object serves during a
run, before it and after it.
"""

import inspect
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Protocol

from matplotlib.figure import Figure

from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.cache import FeatureCache

# What an evaluator may be given to look at: a constructor parameter of one of these names takes a source.
ROLES = ("train", "test", "masked_train", "masked", "videos")


class Scored(Protocol):
    """Items that a score was measured on."""

    @property
    def name(self) -> str:
        """Short name for tables."""

    def fingerprint(self) -> str:
        """SHA-256 of the content."""


class Score(NamedTuple):
    """One number."""

    value: float  # rates in percent
    ci: float  # half-width of the 95 % interval; infinite for a single observation
    n: int  # independent things it is a mean over: items, images, objects, videos


class Result(NamedTuple):
    """What one run of an evaluator found."""

    scores: dict[str, Score]
    chosen: dict[str, float]  # what the protocol chose on held-out data, such as a threshold; no scores


class Evaluator(ABC):
    """Scores of a frozen encoder. What does not depend on the encoder (decoded items) is kept from one run to the next.

    A subclass keeps every constructor parameter under its own name, which is what `protocol` reports.
    """

    headlines: ClassVar[tuple[str, ...]]  # names of the scores that a table shows

    @property
    @abstractmethod
    def scored(self) -> Scored:
        """The items whose scores are reported; those that only vote, fit or calibrate are others or a part of them."""

    @abstractmethod
    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        """Score `encoder` as it is; its weights, mode and device are left alone.

        Args:
            encoder: any for the items at hand.
            cache: features of this encoder that were computed before; None computes them.

        Raises:
            ValueError: the encoder cannot encode the items, or there are too few of them for a score.
        """

    def pictures(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> dict[str, Figure]:
        """Figures by name for a person to look at, of what `run` scores; none by default."""
        return {}

    @property
    def protocol(self) -> dict[str, object]:
        """Every parameter of this score, sources aside."""
        return {name: vars(self)[name] for name in inspect.signature(type(self)).parameters if name not in ROLES}
