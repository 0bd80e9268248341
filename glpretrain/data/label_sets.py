"""Several labels for one item: a class name that holds them, one behind the other, such as `dog;rain`.

Sources know one class of each item. Where items have any number of labels, the name of the class lists them, and what stands here tells
them apart again. So lists, folders, shards and columns hold labels of either kind without a format of their own.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SEPARATOR = ";"


class LabelSets:
    """The labels that the classes of a source stand for.

    Args:
        classes: class names; each is any number of labels, in any order. A name of separators alone has no label.
        separator: what stands between two labels.

    Raises:
        ValueError: the separator is empty.
    """

    def __init__(self, classes: Sequence[str], *, separator: str = SEPARATOR) -> None:
        if not separator:
            raise ValueError("separator: '' given; accepted: what stands between two labels, such as ';'")
        numbers: dict[str, int] = {}
        members: list[int] = []
        starts = [0]
        for name in classes:
            found = dict.fromkeys(label for part in name.split(separator) if (label := part.strip()))
            members += [numbers.setdefault(label, len(numbers)) for label in found]
            starts.append(len(members))
        # By name, so that the order does not depend on which sets of labels there are.
        place = np.empty(len(numbers), dtype=np.int64)
        place[[numbers[name] for name in sorted(numbers)]] = np.arange(len(numbers))
        self.names = sorted(numbers)
        self._starts, self._members = np.array(starts), place[np.array(members, dtype=np.int64)]

    def __len__(self) -> int:
        return len(self.names)

    def targets(self, classes: Tensor) -> Tensor:
        """Float[B K] of zeros and ones: which of the K labels the classes Int[B] of the source stand for."""
        found = torch.zeros(len(classes), len(self.names))
        for row, number in enumerate(classes.tolist()):
            found[row, self._members[self._starts[number] : self._starts[number + 1]]] = 1.0
        return found.to(classes.device)


def joined(labels: Sequence[str], *, separator: str = SEPARATOR) -> str:
    """The class name that stands for some labels; the separator where there is none."""
    return separator.join(sorted(labels)) or separator
