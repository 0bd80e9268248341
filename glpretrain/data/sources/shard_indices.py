"""Index files that lie beside tar shards, as NVIDIA's `wds2idx` writes them for WebDataset (v1.2): `shard.idx` beside `shard.tar`.

Such a file says where the members are, so their headers need not be read. Nothing ties it to the bytes of its shard, so it is used only
where it is not older, where its members lie side by side and fill the shard to its end, and where a few headers that are read agree. In any
other case the headers are read: both ways give the same members. Left out: how headers are read (`tar_files`).
"""

import posixpath
from pathlib import Path

from glpretrain.core.listing import State
from glpretrain.data.sources.tar_files import BLOCK, Contents, Member, collected, read_header

_VERSION = "v1.2"
_READ = 16  # headers that are compared
_LONGEST_END = 1 << 16  # bytes of zeros behind the last member


def indexed_contents(shard: Path) -> Contents | None:
    """What the index beside a shard says; None where there is none, or where it may be that of another file.

    Raises:
        OSError: the shard cannot be read.
    """
    index = shard.with_name(f"{shard.name.split('.')[0]}.idx")
    try:
        if State.of(index).modified < State.of(shard).modified:
            return None
        lines = index.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    members = _members(shard, lines)
    if not members or not _fill(shard, members):
        return None
    names = [posixpath.normpath(member.name) for member in members]
    return collected((name, member._replace(name=name)) for name, member in zip(names, members, strict=True))


def _members(shard: Path, lines: list[str]) -> list[Member] | None:
    """The members in their order; None where the lines are not those of an index."""
    if not lines or lines[0].split() != [_VERSION, str(len(lines) - 1)]:
        return None
    members: list[Member] = []
    for line in lines[1:]:
        words = line.split(" ")
        if len(words) % 4:
            return None  # names with white space, or an older version
        for place in range(0, len(words), 4):
            key, offset, size, name = words[place : place + 4]
            if not (offset.isdecimal() and size.isdecimal()) or name.rpartition("/")[2].partition(".")[2] != key or "\\" in name:
                return None  # tar writes odd names with escapes
            members.append(Member(shard, name, int(offset), int(size)))
    return members


def _fill(shard: Path, members: list[Member]) -> bool:
    """Whether the members are all that there is in the shard, as far as this can be told without reading all headers."""
    end = 0
    for member in members:
        if member.offset != end + BLOCK:  # something else lies between, such as a link or a long name
            return False
        end = member.offset + member.size + -member.size % BLOCK
    with shard.open("rb") as file:
        length = file.seek(0, 2)
        file.seek(end)
        if not 2 * BLOCK <= length - end <= _LONGEST_END or file.read(length - end).strip(b"\0"):
            return False
        last = len(members) - 1
        for place in {last * part // (_READ - 1) for part in range(_READ)}:
            member = members[place]
            header = read_header(file, member.offset - BLOCK)
            if header is None or not header.isreg() or (header.name, header.size) != (member.name, member.size):
                return False
    return True
