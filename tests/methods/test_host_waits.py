"""In losses and gradients the host does not wait for the device: it reads no number, and no shape depends on one."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from contract import build, fixed_batch
from shrinking import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RECIPES = sorted(ROOT.glob("*.yaml"))


class Waits(TorchDispatchMode):
    """Counts the operations for which a host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"):
            self.found[name] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.found[name] += any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=() if path.stem in ("dino", "ibot") else pytest.mark.slow) for path in RECIPES]
)
def test_losses_and_gradients_do_not_wait(path: Path, tmp_path: Path) -> None:
    training = build(path, tmp_path)
    model, batch = training.model, fixed_batch(training)
    with Waits() as waits:
        terms = model.averaged(model.losses(batch, 0.5), batch)
        torch.stack(list(terms.values())).sum().backward()
    assert not +waits.found


def test_a_wait_is_seen() -> None:
    with Waits() as waits:
        values = torch.arange(5)
        values[values > 2].sum().item()
    assert waits.found["index"] == waits.found["_local_scalar_dense"] == 1
