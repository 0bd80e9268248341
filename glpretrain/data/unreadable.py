"""The items of a run that cannot be read: listed in a file of the run, each of them once, until there are too many.

Left out: what takes the place of such an item (`items`).
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from glpretrain.core.files import append_lines
from glpretrain.core.listing import printable

_log = logging.getLogger(__name__)
_LEAST_SEEN = 500  # the share of unreadable items is taken of at least this number, so that the first one stops no run


class Unreadable:
    """Logs, lists and counts items that cannot be read.

    Args:
        source: name of their source, for messages.
        most: share of the items seen, or of 500 where they are fewer, that may be unreadable.

    Raises:
        ValueError: `most` is no share.
    """

    def __init__(self, source: str, *, most: float) -> None:
        if not 0.0 <= most <= 1.0:
            raise ValueError(f"DataModule: max_unreadable is a share in [0, 1], not {most}")
        self.source, self.most = source, most
        self.num_seen = 0  # items that were read, or could not be
        self.folder = Path()  # where the list is written; a run sets it
        self._found = set[int]()

    def report(self, unreadable: Sequence[tuple[int, str]]) -> None:
        """Take dataset index and reason of items; those that were reported before do not count again.

        Raises:
            ValueError: there are too many of them.
        """
        fresh = [(index, reason) for index, reason in unreadable if index not in self._found]
        if not fresh:
            return
        path = self.folder / "unreadable.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        for index, reason in fresh:
            self._found.add(index)
            _log.warning("skipped, cannot be read: %s", printable(reason))
        append_lines(path, (reason for _, reason in fresh))
        if len(self._found) > self.most * max(self.num_seen, _LEAST_SEEN):
            raise ValueError(
                f"{self.source}: {len(self._found)} of {self.num_seen} items cannot be read, more than max_unreadable ="
                f" {self.most}; they are listed in {path}, the last: {fresh[-1][1]}"
            )
