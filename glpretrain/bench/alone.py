"""A method that is trained without a trainer: the step of `Method` in Lightning's order, for a plan of memory and beside official code.

Left out: data, logging, several processes, accumulation, and float16, whose loss scale is Lightning's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from glpretrain.core.batch import Batch
from glpretrain.methods.base import Method
from glpretrain.training.optim import gradient_norms

During = Callable[[str], AbstractContextManager[object]]
_PROGRESS = 0.5  # share of the run that is done, so that nothing is frozen or warms up


class Alone:
    """A method with its optimizer.

    Args:
        method: method in training mode, on its device.
        num_items: items of a step, which the learning rate may depend on.
        dtype: type of autocast; None computes in the precision of the weights.
        caches_casts: whether autocast casts a weight once per step, or in every pass as under Lightning.
    """

    def __init__(self, method: Method, *, num_items: int, dtype: torch.dtype | None = None, caches_casts: bool = True) -> None:
        self.method, self.dtype, self.caches_casts = method, dtype, caches_casts
        method.optimization = method.optimization.for_batch(num_items)
        self.optimizer = method.configure_optimizers()

    def step(self, batch: Batch) -> None:
        """One optimizer step, over the items of a batch."""
        self.compute(batch)
        self.move()

    def compute(self, batch: Batch, *, during: During = lambda name: nullcontext()) -> None:
        """The losses and the gradients of a step.

        Args:
            batch: its items.
            during: context in which `losses` and `backward` are computed, by these names.
        """
        method = self.method
        method.begin_step(_PROGRESS)
        casts = torch.autocast(batch.index.device.type, dtype=self.dtype, enabled=self.dtype is not None, cache_enabled=self.caches_casts)
        with during("losses"), casts:
            terms = method.averaged(method(batch, _PROGRESS), batch)
            total = method.total(terms, _PROGRESS)
        method.step.keep({name: value.detach() for name, value in terms.items()})
        self.optimizer.zero_grad(set_to_none=True)
        with during("backward"):
            total.backward()

    def move(self) -> None:
        """What moves by the gradients: weights, teacher, states."""
        method = self.method
        method.optimization.set_step(self.optimizer, _PROGRESS)
        norms = gradient_norms(method)
        if method.step.accept(norms, number=1):
            method.optimization.clip_gradients(method, norms, _PROGRESS)
            self.optimizer.step()
        method.zero_grad(set_to_none=True)
        if method.teacher is not None and method.momentum is not None:
            method.teacher.update(method.student, momentum=method.momentum(_PROGRESS))
        method.step.end(method, progress=_PROGRESS)
