"""Which files hold one kind of item, for code that finds files of any kind."""

from typing import NamedTuple


class FileKind(NamedTuple):
    """The files that a source reads, and the words for its messages."""

    owner: str  # class of the source
    item: str  # what a file holds, such as image or sound
    endings: tuple[str, ...]  # in lower case, with their dot
