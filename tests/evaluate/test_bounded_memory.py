"""What is computed a part at a time is what is computed at once, and what is remembered of an item does not hold its patches."""

import pytest
import torch
from evaluate_stubs import noise

from glpretrain.evaluate.cls import linear_sweep


def test_heads_classify_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = linear_sweep.Heads(noise(torch.arange(7), 3, 5, seed=1), noise(torch.arange(3), 5, seed=2))
    features = noise(torch.arange(101), 7, seed=3)
    whole = heads.classes(features)
    assert torch.equal(whole, heads.logits(features).argmax(dim=-1))
    monkeypatch.setattr(linear_sweep, "_LOGITS", 4 * 3 * 5)
    assert torch.equal(heads.classes(features), whole)
