"""What became of the tensors of a file, in one line and in full."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """One loaded backbone.

    Args:
        title: the format and the file.
        architecture: the encoder in words.
        matched: names that the encoder got as the file has them.
        reshaped: names that it got for other channels or another grid, with both shapes.
        missing: names that it has and the file has not.
        shape_mismatch: names that the file has in another shape, with both shapes.
        unused: names of the file that the encoder has no place for.
        left_out: names of the file that only pretraining or classification needs.
        assumed: what the file did not say.
    """

    title: str
    architecture: str
    matched: tuple[str, ...]
    reshaped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    shape_mismatch: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def full_match(self) -> bool:
        """Whether every tensor of the encoder came from the file, and every tensor of the file has a place or is left out."""
        return not (self.missing or self.shape_mismatch or self.unused)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in self._kinds())
        return f"{self.title} as {self.architecture}: {counts}" + "".join(f"; {text}" for text in self.assumed)

    def lines(self) -> list[str]:
        """The names of every kind that has any, one line a kind."""
        return [f"{kind}: {', '.join(names)}" for kind, names in self._kinds() if names]

    def _kinds(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return (
            ("matched", self.matched),
            ("reshaped", self.reshaped),
            ("missing", self.missing),
            ("shape_mismatch", self.shape_mismatch),
            ("unused", self.unused),
            ("left out", self.left_out),
        )
