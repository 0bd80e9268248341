"""What every reader hands over: tensors under the wrapped library's names, and what builds an encoder for them."""

from dataclasses import dataclass

from torch import Tensor

State = dict[str, Tensor]
Arguments = dict[str, str | int | float | bool | list[int] | list[float] | None]


@dataclass(frozen=True)
class LoadedWeights:
    """A backbone as it was read.

    Args:
        title: the format, as people write it.
        encoder: name in the encoder registry.
        arguments: of its builder, for the channels and the size that the tensors were made for.
        state: the wrapped library's names.
        pretraining: start of the names that only pretraining or classification needs, as a regular expression.
        left_out: names that were left out before renaming.
        assumed: what the file did not say.
    """

    title: str
    encoder: str
    arguments: Arguments
    state: State
    pretraining: str = r"(?!)"
    left_out: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
