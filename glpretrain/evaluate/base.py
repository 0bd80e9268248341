"""What a score is: an object that runs on an encoder and answers with named numbers, and how sure those numbers are.

Left out on purpose: training, methods and loggers. An evaluator sees an encoder and sources, so the same object serves during a
run, before it and after it.
"""

import math
from abc import ABC, abstractmethod

from torch import Tensor

from glpretrain.encoders.base import Encoder

_Z95 = 1.959964  # two-sided 95 % of the standard normal


class Evaluator(ABC):
    """Scores of a frozen encoder. What does not depend on the encoder (decoded items) is kept from one run to the next."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name, the middle part of `eval/<name>/<score>`."""

    @abstractmethod
    def run(self, encoder: Encoder) -> dict[str, float]:
        """Score `encoder` as it is; its weights, mode and device are left alone.

        Returns:
            Named scores, rates in percent. `<score>_ci` is the half-width of that score's 95 % interval.

        Raises:
            ValueError: the encoder cannot encode the items, or there are too few of them for a score.
        """


def rate_interval(rate: float, *, count: int) -> float:
    """Half-width of Wilson's 95 % interval of a rate in [0, 1]: unlike the plain normal one it is not zero at 0 and 1."""
    centre = rate * (1 - rate) / count + _Z95**2 / (4 * count**2)
    return _Z95 * math.sqrt(centre) / (1 + _Z95**2 / count)


def mean_interval(values: Tensor) -> float:
    """Half-width of the normal 95 % interval of a mean.

    Args:
        values: Float[B], taken as independent.

    Returns:
        Infinity for a single value.
    """
    count = len(values)
    return math.inf if count < 2 else _Z95 * values.std().item() / math.sqrt(count)
