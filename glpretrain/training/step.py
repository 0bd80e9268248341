"""A step is all or nothing: weights, teacher, centres and queues move together, or not at all where a loss or a gradient is not finite.

Left out: what a refused step was made of (`glpretrain.replay` keeps it), and the loss scale of float16 (Lightning).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glpretrain.training.memory import moving_buffers, states_of


class Step:
    """The optimizer step at hand: its losses, and what has to be put back if it is refused.

    One number is read per step, between backward and optimizer. Gradients and losses are the same in every process at that moment, so all
    processes decide alike without another collective.

    Args:
        max_refused: number of steps in a row that may be refused before the run stops.
    """

    def __init__(self, *, max_refused: int) -> None:
        self.max_refused = max_refused
        self.num_refused = 0  # in this run
        self.norms: dict[str, Tensor] = {}  # of the gradients of the last step, before clipping
        self.reason = ""  # why the last step was refused; empty if it was accepted
        self.asks_save = self.asks_stop = False  # set by a callback of one process, before a step
        self.save_agreed = self.stop_agreed = False  # what any process asked for before the last step, the same in all of them
        self.is_moving = False  # True from the moment that the optimizer moves until the last state has moved
        self._in_a_row = 0
        self._wishes: Sequence[Tensor] = ()
        self.terms: list[dict[str, Tensor]] = []  # of the micro-batches of the step at hand, or of the one that has just ended
        self.is_open = False  # True from the first micro-batch of a step to its end
        self.buffers_before: dict[str, Tensor] = {}  # what a forward pass moves, such as statistics of batch norms, before this step

    def begin(self, method: nn.Module) -> None:
        """Remember what a forward pass moves; called before every micro-batch, and acts at the first one of a step."""
        if not self.is_open:
            self.is_open, self.terms = True, []
            self.buffers_before = {name: buffer.clone() for name, buffer in moving_buffers(method).items()}

    def wishes(self, like: Tensor) -> list[Tensor]:
        """What this process asks for, Float[] each, to be summed over the processes with the terms: to save, and to stop."""
        return [like.new_full((), float(wish)) for wish in (self.asks_save, self.asks_stop)]

    def keep(self, terms: dict[str, Tensor], wishes: Sequence[Tensor] = ()) -> None:
        """Keep what a micro-batch gave.

        Args:
            terms: terms, Float[] each, averaged over the processes.
            wishes: sums of `wishes` over the processes.
        """
        self.terms.append(terms)
        self._wishes = wishes

    def accept(self, norms: dict[str, Tensor], *, number: int, counts: bool = True) -> bool:
        """Whether the step may move anything.

        Args:
            norms: L2 norms of the gradients, Float[] each, by the name of the parameter.
            number: number of the step, counted from 1, for messages.
            counts: whether a refusal counts towards `max_refused`; it does not while a loss scale is still being lowered.

        Raises:
            ValueError: too many steps in a row were refused.
        """
        self.norms = norms
        values = torch.stack([*norms.values(), *(value for terms in self.terms for value in terms.values())])
        is_finite, *wishes = torch.stack([torch.isfinite(values).all().to(values), *self._wishes]).tolist()
        self.save_agreed, self.stop_agreed = (wish > 0.0 for wish in wishes or (0.0, 0.0))
        self.asks_save = False
        if is_finite:
            self.reason, self._in_a_row = "", 0
            return True
        self.num_refused += 1
        self._in_a_row += counts
        self.reason = f"step {number}: {self._what(norms)}"
        if self._in_a_row > self.max_refused:
            raise ValueError(
                f"{self.reason}; this was step {self._in_a_row} in a row that moved nothing, more than max_refused = {self.max_refused};"
                " try a lower lr, or precision 32-true"
            )
        return False

    def _what(self, norms: dict[str, Tensor]) -> str:
        """The terms or the gradients that are not finite."""
        for terms in self.terms:
            if not all(math.isfinite(value) for value in terms.values()):
                return f"the loss is not finite ({', '.join(f'{name} = {value:.4g}' for name, value in terms.items())})"
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        return f"{len(bad)} of {len(norms)} gradients are not finite, such as that of {bad[-1]}"

    def end(self, method: nn.Module, *, progress: float) -> None:
        """Move the states after the optimizer, or drop what they gathered and put the statistics back if the step was refused."""
        if self.reason:
            for name, buffer in moving_buffers(method).items():
                buffer.copy_(self.buffers_before[name])
        for state in states_of(method):
            if self.reason:
                state.discard()
            else:
                state.advance(progress)
        self.is_open, self.buffers_before = False, {}
