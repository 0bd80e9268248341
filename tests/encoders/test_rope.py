"""Positions of DINOv3 that move in training: the official numbers, what they are drawn from, and who has none of it."""

import copy

import pytest
import torch
from golden import load, noise
from torch import Tensor

from glpretrain.core.keys import item_keys
from glpretrain.encoders import ViT, build
from glpretrain.encoders import vit as vit_module
from glpretrain.encoders.blocks import Packing
from glpretrain.encoders.rope import AugmentedRope, RopeAugmentation, drawn_positions
from glpretrain.training import Branch
from glpretrain.training.teacher import EMATeacher

GOLDEN = load("dinov3_rope")
NAME = "vit_small_patch16_dinov3"
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "init_values": 1.0}
ALL = {"shift": 0.3, "jitter": 1.5, "rescale": 2.0}
COUNT = 3
KEYS = [item_keys(seed=seed, epoch=0, index=torch.arange(COUNT)) for seed in (0, 1)]
VIEWS = [noise(COUNT, 3, 32, 32, name="large"), noise(COUNT, 3, 16, 24, name="small")]


def vit(**moved: float) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(NAME, **SIZE, rope_augmentation=RopeAugmentation(**moved) if moved else None).train()
    encoder.add_mask_token()
    for block in encoder.model.blocks:  # fresh ones hardly look at positions
        block.attn.qkv.weight.data.mul_(20.0)
    return encoder


def rope_of(encoder: ViT) -> AugmentedRope:
    assert isinstance(encoder.model.rope, AugmentedRope)
    return encoder.model.rope


@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_the_positions_of_every_block_are_dinov3s_for_the_same_draws(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = GOLDEN["cases"][number]
    moved = {name: case[name] for name in ALL if case[name] is not None}
    rope = rope_of(vit(**(moved or ALL))).train(bool(moved))
    draws = (noise(2, 5, name="draws") + 1.0) / 2.0
    monkeypatch.setattr(rope, "_draws", lambda like: draws)
    found = rope.get_embed(case["grid"])
    for own, block in zip(found if moved else [found, found], case["blocks"], strict=True):
        # Both sides compute in float32; the largest angles are 25, so their rounding is up to 2e-6 and that of most of them far less.
        expected = torch.cat([torch.tensor(block["sin"]), torch.tensor(block["cos"])], dim=1)
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)


def test_every_option_of_the_official_code_was_run() -> None:
    assert {tuple(name for name in ALL if case[name] is not None) for case in GOLDEN["cases"]} == {
        *((), ("shift",), ("jitter",), ("rescale",), tuple(ALL)),
    }


def tables(encoder: ViT, number: int, keys: Tensor | None) -> Tensor:
    with drawn_positions(encoder, keys):
        return rope_of(encoder).get_embed(encoder.grid(VIEWS[number].shape[1:]))


def test_draws_are_those_of_the_first_item_and_others_for_every_block_and_group() -> None:
    encoder = vit(**ALL)
    state = torch.get_rng_state()
    one, again = tables(encoder, 0, KEYS[0]), tables(encoder, 0, KEYS[0][:1])
    assert torch.equal(one, again) and torch.equal(state, torch.get_rng_state())
    assert rope_of(encoder).key is None
    other = tables(encoder, 0, KEYS[1])
    assert one.shape == (2, 16, 16)
    for left, right in ((one[0], one[1]), (one[0], other[0]), (one[1], other[1]), (one[0], other[1])):
        assert not torch.allclose(left, right, atol=1e-2)


def test_draws_reach_the_whole_range_and_lie_in_it() -> None:
    """Of 4000 blocks: a coordinate of 0.5 is between (0.5 - 0.3) / 3 and (0.5 + 0.3) * 3; logarithms are uniform."""
    settings = RopeAugmentation(**ALL)
    many = AugmentedRope(rope_of(vit(**ALL)).rope, augmentation=settings, num_blocks=4000)
    with drawn_positions(many, KEYS[0]):
        draws = many._draws(torch.ones(()))
    moved = settings.moved(torch.tensor([[0.5, 0.5]]), draws=draws)[:, 0]  # [L 2]
    assert 0.2 / 3.0 <= float(moved.min()) < 0.09 and 2.0 < float(moved.max()) <= 2.4
    rescaled = RopeAugmentation(rescale=2.0).moved(torch.tensor([[1.0, 1.0]]), draws=draws)[:, 0]
    assert torch.equal(rescaled[:, 0], rescaled[:, 1])
    logarithms = rescaled[:, 0].log() / torch.tensor(2.0).log()
    # Three standard errors of the mean and of the variance of a uniform number in [-1, 1].
    assert abs(float(logarithms.mean())) < 3 * (1 / 3 / 4000) ** 0.5 and abs(float(logarithms.var()) - 1 / 3) < 3 * (4 / 45 / 4000) ** 0.5
    jittered = RopeAugmentation(jitter=1.5).moved(torch.tensor([[1.0, 1.0]]), draws=draws)[:, 0]
    assert not torch.equal(jittered[:, 0], jittered[:, 1])


@pytest.mark.parametrize("cls_only", [False, [False, True]])
@pytest.mark.parametrize("recomputed", [False, True])
def test_one_sequence_has_the_features_and_gradients_of_a_pass_per_size(
    cls_only: bool | list[bool], recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, packed = [], []
    monkeypatch.setattr(Packing, "__init__", _noted(Packing.__init__, packed))
    mask = [torch.arange(COUNT * 16).reshape(COUNT, 16) % 3 == 0, None]
    for pays in (False, True):
        encoder = vit(**ALL)
        encoder.activation_checkpointing = recomputed
        monkeypatch.setattr(vit_module, "packing_pays", lambda *args, pays=pays, **kwargs: pays)
        outputs = encoder(VIEWS, keys=KEYS, mask=mask, cls_only=cls_only)
        (outputs[0].patches.square().mean() + sum((one.cls * noise(*one.cls.shape, name="weights")).sum() for one in outputs)).backward()
        gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
        found.append({**gradients, "large": outputs[0].patches, "small": outputs[1].cls})
        assert bool(packed) == pays
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    still = vit()
    assert not torch.allclose(still(VIEWS, keys=KEYS, mask=mask)[0].patches, found[0]["large"], atol=1e-3)


def _noted(function, calls: list):
    def noting(self, *args, **kwargs) -> None:
        calls.append(args)
        function(self, *args, **kwargs)

    return noting


def test_kept_tokens_have_the_moved_positions_of_their_places() -> None:
    encoder = vit(**ALL)
    keep = torch.arange(16).expand(COUNT, -1)
    whole, kept = encoder(VIEWS[0], keys=KEYS[0]), encoder(VIEWS[0], keys=KEYS[0], keep=keep)
    torch.testing.assert_close(kept.patches, whole.patches, rtol=1e-4, atol=1e-5)


def test_positions_move_in_training_alone_and_not_for_a_teacher() -> None:
    encoder, still = vit(**ALL), vit()
    assert encoder.state_dict().keys() == still.state_dict().keys()
    teacher = EMATeacher(Branch(encoder, {})).train().branch
    expected = still.eval()(VIEWS[0]).patches
    assert torch.equal(copy.deepcopy(encoder).eval()(VIEWS[0], keys=KEYS[0]).patches, expected)
    assert torch.equal(teacher.encode(VIEWS[0]).patches, expected)
    assert not torch.allclose(encoder(VIEWS[0], keys=KEYS[0]).patches, expected, atol=1e-3)


def test_the_card_and_an_export_do_not_know_that_positions_moved() -> None:
    encoder, still = vit(**ALL), vit()
    assert encoder.card == still.card
    again = build(encoder.card)
    again.load_backbone_state(encoder.backbone_state())
    assert torch.equal(again.eval()(VIEWS[0]).patches, still.eval()(VIEWS[0]).patches)


def test_without_keys_positions_are_drawn_by_torch_and_a_branch_refuses_it() -> None:
    encoder = vit(**ALL)
    first = encoder(VIEWS[0]).patches
    assert not torch.allclose(encoder(VIEWS[0]).patches, first, atol=1e-3)
    with pytest.raises(ValueError, match="rope_augmentation is set, but views without keys were given"):
        Branch(encoder, {}).encode(VIEWS[0])


@pytest.mark.parametrize(
    ("moved", "message"),
    [
        ({}, "nothing given that changes positions"),
        ({"shift": 0.0}, "shift=0.0 given; accepted: above 0"),
        ({"jitter": 1.0}, "jitter=1.0 given; accepted: above 1"),
        ({"rescale": float("nan")}, "rescale=nan given; accepted: above 1"),
    ],
)
def test_settings_that_move_nothing_are_refused(moved: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeAugmentation(**moved)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"])
def test_models_without_positions_of_dinov3_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"rope_augmentation given; {name} has no rotary positions of DINOv3"):
        ViT(name, img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, rope_augmentation=RopeAugmentation(rescale=2.0))
