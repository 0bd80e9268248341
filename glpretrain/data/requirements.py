"""Compares what a method uses with what the data makes, before the first step.

Missing data is an error, and so is data that the method does not use, because it would only cost time.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol, runtime_checkable

from glpretrain.core.batch import Uses
from glpretrain.core.types import EncoderCard
from glpretrain.data.sources.base import Source


class Tokens(Protocol):
    """The part of an encoder that data needs; every `Encoder` has it."""

    @property
    def card(self) -> EncoderCard:
        """Mean, standard deviation and number of channels."""
        ...

    def grid(self, item_shape: Sequence[int], /) -> tuple[int, ...]:
        """Tokens along each axis."""
        ...


class Processes(Protocol):
    """The part of Lightning's strategy that a comparison of processes needs."""

    def broadcast(self, obj: str, /) -> str:
        """What the first process gives."""
        ...

    def reduce_boolean_decision(self, decision: bool, /, all: bool) -> bool:
        """Whether all processes give True."""
        ...


@runtime_checkable
class Consumer(Protocol):
    """The part of a method that data needs; every `Method` has it."""

    @property
    def encoder(self) -> Tokens:
        """The encoder whose tokens are masked and for which views are normalised."""
        ...

    @property
    def uses(self) -> Mapping[str, Uses]:
        """The groups of views that it uses."""
        ...


class Made(NamedTuple):
    """One group of views that a data module makes."""

    num_views: int
    parts: frozenset[str]
    num_sizes: int = 1  # that its views may have


class Setting(NamedTuple):
    """The setting that makes a group or a part of one, for messages."""

    name: str
    example: str


_MASKED, _CORRUPTED = "data.mask", "data.corruption"
_SETTINGS: Mapping[str, Setting] = {
    "global": Setting("data.views.global_views", "[{size: 224, scale: [0.25, 1.0], count: 2}]"),
    "local": Setting("data.views.local_views", "[{size: 96, scale: [0.05, 0.4], count: 8}]"),
    "student": Setting("data.views.student_views", "[{size: 224, scale: [0.25, 1.0], count: 2}]"),
    "clean": Setting("data.views.clean_size", "448, beside model.gram.views clean"),
    "coarse_*": Setting("data.views.coarse_views", "[{points: 256, count: 2}], for clouds of points"),
    "global.mask": Setting(_MASKED, "glpretrain.masking.BlockMask"),
    "global.region_mask": Setting(_MASKED, "glpretrain.masking.CRFRPMask"),
    "global.corrupted": Setting(_CORRUPTED, "glpretrain.masking.GroupCorruption"),
    "global.corruption": Setting(_CORRUPTED, "glpretrain.masking.GroupCorruption"),
    "student.strong": Setting("data.views.student_views", "[{size: 224, scale: [0.25, 1.0], count: 2}]"),
}


def check_uses(method: str, uses: Mapping[str, Uses], made: Mapping[str, Made]) -> None:
    """Check that the data makes what the method uses, and nothing else.

    Args:
        method: name of the method, for messages.
        uses: what the method uses, by the name of a group or by a pattern such as `coarse_*`.
        made: what the data makes, by the name of a group.

    Raises:
        ValueError: names the setting to change.
    """
    for pattern, use in uses.items():
        groups = {name: group for name, group in made.items() if fnmatchcase(name, pattern)}
        missing = [pattern] if use.required and not groups else []
        missing += [f"{pattern}.{part}" for group in groups.values() for part in use.needs if part not in group.parts]
        for name in missing:
            setting = _setting(name)
            raise ValueError(f"{method} needs {setting.name}: set it, for example to {setting.example}")
        paired = [group.num_views for name, group in made.items() if any(fnmatchcase(name, other) for other in use.paired_with)]
        if use.paired_with and sum(paired) < 2:
            others = " or ".join(_setting(name).name for name in use.paired_with if name != pattern)
            raise ValueError(
                f"{method} compares a {pattern} view of the teacher with another view of the student, so it needs at least two views of an"
                f" item, not {sum(paired)}: set count: 2 in {_setting(pattern).name}" + (f", or add {others}" if others else "")
            )
        for name, group in groups.items():
            if use.num_views not in (None, group.num_views):
                raise ValueError(f"{method} needs {use.num_views} {name} views, not {group.num_views}: set count in {_setting(name).name}")
            if use.one_size and group.num_sizes > 1:
                raise ValueError(f"{method} needs {name} views of one size, not of {group.num_sizes}: leave data.views.other_sizes out")
    for name, group in made.items():
        users = [use for pattern, use in uses.items() if fnmatchcase(name, pattern)]
        makers = {_setting(name).name, *(_setting(f"{name}.{part}").name for part in group.parts)}
        # A setting is used if any part that it makes is used: a region mask also makes the mask of all hidden tokens.
        used = {_setting(name).name for _ in users}
        used |= {_setting(f"{name}.{part}").name for use in users for part in (*use.needs, *use.takes)}
        for setting in sorted(makers - used):
            raise ValueError(f"{method} does not use {setting}: leave it out")


def check_same_items(source: Source, processes: Processes) -> None:
    """Check that all processes have listed the same items. Otherwise an index would not mean the same in all of them.

    Args:
        source: source of this process.
        processes: the processes of the run, all of which call this.

    Raises:
        ValueError: the processes have listed different items.
    """
    own = source.fingerprint()
    if not processes.reduce_boolean_decision(processes.broadcast(own) == own, all=True):
        raise ValueError(
            f"DataModule: {source.name}: the processes of this run have listed different items, this one {len(source)}; files were added,"
            " removed or renamed meanwhile, or lie on several machines: make them equal and start again"
        )


def _setting(name: str) -> Setting:
    """The setting that makes a group or, as `group.part`, a part of one; a group that is not listed is made by the views."""
    found = [setting for pattern, setting in _SETTINGS.items() if fnmatchcase(name, pattern) and pattern.count(".") == name.count(".")]
    return found[0] if found else Setting("data.views", f"views that make {name}")
