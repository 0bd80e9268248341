"""How many operations something begins, and what a GPU would begin, without one."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glpretrain.core.types import EncoderCard
from glpretrain.data.views import ViewMaker, Views


class Operations(TorchDispatchMode):
    """Counts operations that compute: on a GPU each of them is a launch at least. Those that only look at memory otherwise are free."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.name() != "prim::device":
            self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


def made_of_fakes(maker: ViewMaker, parts: Mapping[str, Tensor], *, keys: Tensor, card: EncoderCard) -> tuple[Views, Counter[str]]:
    """Views without values, made as on a GPU, and the operations: whatever asks for a value, or a shape that depends on one, raises."""

    def fake(value: Tensor) -> Tensor:
        return torch.zeros(value.shape, dtype=value.dtype, device="cuda")

    drawn = maker.draw(keys)
    with FakeTensorMode():
        moved = {name: one._replace(numbers=fake(one.numbers), integers=fake(one.integers)) for name, one in drawn.items()}
        given, on_device = {name: fake(part) for name, part in parts.items()}, fake(keys)
        with Operations() as operations:
            views = maker.make(given, changes=moved, keys=on_device, card=card)
    return views, operations.found
