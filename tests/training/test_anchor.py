"""When snapshots are taken and what they hold; the weight of the term; which settings are refused."""

import math

import pytest
import torch
from torch import nn

from glpretrain.core.schedule import Schedule
from glpretrain.encoders import ViT
from glpretrain.training.anchor import Gram, Snapshot
from glpretrain.training.teacher import FrozenTeacher

# DINOv3's first copy after 40 steps, then every 10, three in all, as shares of a run of 100.
SHARES = (0.4, 0.5, 0.6)


class Counter(nn.Module):
    """In place of a backbone: a weight that counts the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("number", torch.zeros((), dtype=torch.int64))


def copies(snapshot: Snapshot, backbone: Counter, *, start: int, end: int, total: int = 100) -> list[float]:
    """The weights that were copied in the steps from `start` to `end`, each time that another one is there."""
    found = []
    for step in range(start, end):
        before = snapshot.taken
        for _ in range(2):  # two micro-batches
            snapshot.begin(step / total, backbone=backbone)
        if snapshot.taken > before:
            found.append(float(snapshot.encoder.weight))
        with torch.no_grad():
            backbone.weight += 1.0  # what the step moves
        snapshot.advance(step / total)
    return found


def test_copies_are_made_after_as_many_steps_as_officially() -> None:
    backbone = Counter()
    snapshot = Snapshot(backbone, shares=SHARES)
    assert copies(snapshot, backbone, start=0, end=100) == [40.0, 50.0, 60.0]


@pytest.mark.parametrize("cut", [39, 40, 41, 45, 50, 60, 99])
def test_a_resumed_run_neither_loses_nor_repeats_a_copy(cut: int) -> None:
    backbone = Counter()
    first, second = (Snapshot(backbone, shares=SHARES) for _ in range(2))
    found = copies(first, backbone, start=0, end=cut)
    assert second.taken == 0
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.encoder.weight, first.encoder.weight)
    assert found + copies(second, backbone, start=cut, end=100) == [40.0, 50.0, 60.0]


def test_a_lengthened_run_makes_the_copies_that_are_left() -> None:
    backbone = Counter()
    snapshot = Snapshot(backbone, shares=SHARES)
    assert copies(snapshot, backbone, start=0, end=55) == [40.0, 50.0]
    assert copies(snapshot, backbone, start=55, end=200, total=200) == [120.0]


def test_a_copy_forgets_what_was_there_before() -> None:
    """Not 0 * old + new: a NaN would survive."""
    backbone = Counter()
    snapshot = Snapshot(backbone, shares=(0.0,))
    snapshot.encoder.weight.data.fill_(math.nan)
    backbone.number.add_(3)
    snapshot.begin(0.0, backbone=backbone)
    assert snapshot.encoder.weight == 0.0 and snapshot.encoder.number == 3


def test_a_snapshot_does_not_learn_or_train_and_stays_when_the_backbone_moves() -> None:
    backbone = ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    snapshot = Snapshot(backbone, shares=(0.0,)).train()
    snapshot.begin(0.0, backbone=backbone)
    assert not snapshot.encoder.training and not any(parameter.requires_grad for parameter in snapshot.parameters())
    views = torch.linspace(-1.0, 1.0, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    before = snapshot(views).patches
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1.0)
    assert torch.equal(snapshot(views).patches, before) and not before.requires_grad


def test_the_weight_rises_by_half_a_cosine_and_stays() -> None:
    """DINOv3's Gram stage: 0 for a million steps, then to 2 within 1000. Its ramp holds both ends, so it is one step ahead."""
    gram = Gram(start=1_000_000 / 1_200_000, ramp=1000 / 1_200_000)
    weights = [gram.weight_at(step / 1_200_000) for step in (999_999, 1_000_000, 1_000_250, 1_000_500, 1_000_999, 1_001_000, 1_199_999)]
    assert weights[0] is None and weights[1:] == pytest.approx([0.0, 0.293, 1.0, 2.0, 2.0, 2.0], abs=2e-3)


def test_the_weight_follows_its_schedule_after_the_ramp() -> None:
    gram = Gram(start=0.5, ramp=0.0, weight=Schedule(4.0, 0.0, shape="linear"))
    assert [gram.weight_at(share) for share in (0.4, 0.5, 0.75)] == [None, 2.0, 1.0]


def expert() -> FrozenTeacher:
    return FrozenTeacher(ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.1}, r"start=0.1 given; accepted: shares from snapshot_at=0.2 on"),
        ({"snapshot_at": 0.9}, r"start=0.8 given; accepted: shares from snapshot_at=0.9 on"),
        ({"snapshot_at": 1.0}, r"\{'snapshot_at': 1.0\} given; accepted: shares of the run in \[0, 1\)"),
        ({"start": -0.1}, r"\{'start': -0.1\} given"),
        ({"refresh_at": (0.85, 1.5)}, r"\{'refresh_at\[1\]': 1.5\} given"),
        ({"refresh_at": (0.7,)}, r"refresh_at=\(0.7,\) given; accepted: ascending shares .* from start=0.8 on"),
        ({"refresh_at": (0.9, 0.85)}, r"refresh_at=\(0.9, 0.85\) given; accepted: ascending"),
        ({"ramp": 0.3}, r"ramp=0.3 given; accepted: from 0 to what is left after start=0.8"),
        ({"ramp": -0.1}, r"ramp=-0.1 given"),
        ({"source": "student"}, r"source='student' given; accepted: snapshot, ema"),
        ({"source": "ema", "snapshot_at": 0.1}, r"snapshot_at and refresh_at would be ignored"),
        ({"source": "ema", "refresh_at": (0.9,)}, r"snapshot_at and refresh_at would be ignored"),
        ({"source": expert(), "snapshot_at": 0.1}, r"snapshot_at and refresh_at would be ignored"),
        ({"source": "ema", "views": "clean"}, r"views=clean would be ignored"),
        ({"antialias": True}, r"antialias would be ignored"),
        ({"tokens": "masked"}, r"tokens=masked given; images differ in their number: set level to batch"),
        ({"tokens": "cls"}, r"tokens='cls' given; accepted: all, masked, unmasked"),
        ({"level": "item"}, r"level='item' given; accepted: image, batch"),
        ({"views": "local"}, r"views='local' given; accepted: global, clean"),
        ({"weight": Schedule(-1.0)}, r"gram.weight: base is -1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gram(**settings)


def test_a_moving_teacher_or_a_file_needs_no_snapshot() -> None:
    assert Gram(source="ema", start=0.0).taken_at == () and Gram(source=expert(), start=0.0).taken_at == ()
    assert Gram().taken_at == (0.2,) and Gram(refresh_at=(0.85, 0.9)).taken_at == (0.2, 0.85, 0.9)
