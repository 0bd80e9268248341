"""The user's own items: which source reads a folder or a file that is named without saying what is in it."""

import inspect
from pathlib import Path
from typing import NamedTuple

from glpretrain import modalities
from glpretrain.data.sources.base import Source


class SourceSpec(NamedTuple):
    """A source as a configuration names it."""

    class_path: str
    init_args: dict[str, str | int]

    def arguments(self, name: str) -> list[str]:
        """The source as arguments of the command line, under this name."""
        return [f"--{name}", self.class_path, *(f"--{name}.init_args.{key}={value}" for key, value in self.init_args.items())]


def source_for(path: str | Path, modality: str) -> str:
    """Import path of the source that reads the user's items.

    Args:
        path: a folder, or a file.
        modality: name of the kind of items; its sources are asked one after the other.

    Raises:
        ValueError: none of them reads the path.
    """
    for class_path in modalities.get(modality).own_sources:
        source = modalities.imported(class_path)
        assert isinstance(source, type) and issubclass(source, Source)
        if source.reads(Path(path).expanduser()):
            return class_path
    raise ValueError(f"{path}: no source of the kind {modality} reads it; accepted: {', '.join(modalities.get(modality).own_sources)}")


def source_spec(path: str | Path, class_path: str, *, channels: int | None = None) -> SourceSpec:
    """The source of a path.

    Args:
        path: a folder, or a file.
        class_path: import path of the source.
        channels: number of channels of every item, where the source can be told.
    """
    first, *others = inspect.signature(modalities.imported(class_path)).parameters
    return SourceSpec(class_path, {first: str(path)} | ({"channels": channels} if channels is not None and "channels" in others else {}))
