"""What the base writes once for all methods and no method's own test would notice."""

from pathlib import Path

import pytest
import torch
from contract import build
from shrinking import ROOT


@pytest.mark.parametrize(("share", "frozen"), [(1.0, True), (0.0, False)])
def test_prototypes_stay_for_the_share_of_the_run_that_freezes_them(share: float, frozen: bool, tmp_path: Path) -> None:
    training = build(ROOT / "dino.yaml", tmp_path, "--model.init_args.freeze_prototypes", str(share))
    projection, prototypes = training.model.student.heads["cls"]
    before = prototypes.directions.detach().clone(), projection.mlp[0].weight.detach().clone()
    training.fit()
    assert torch.equal(prototypes.directions, before[0]) is frozen
    assert not torch.equal(projection.mlp[0].weight, before[1])
