"""Hybrid Distillation: what is zero when, and what the student's tokens are compared with."""

import copy
from pathlib import Path

import pytest
import torch
from contract import build, fixed_batch
from shrinking import ROOT

from glpretrain.encoders import ViT
from glpretrain.encoders.attention import attention_inputs
from glpretrain.methods import HybridDistillation
from glpretrain.training.teacher import FrozenTeacher

RECIPE = ROOT / "hybrid.yaml"


def small(**changes) -> ViT:
    encoder = ViT("vit_tiny_patch16_224", **({"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3} | changes))
    with torch.no_grad():
        for index, parameter in enumerate(encoder.parameters()):
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape) * 0.7 + index))
    return encoder


def test_relations_are_zero_between_a_student_and_itself_and_not_to_another(tmp_path: Path) -> None:
    batch, student = fixed_batch(build(RECIPE, tmp_path)), small()
    settings = {"contrastive": FrozenTeacher(small()), "num_relation_heads": 4, "masked_depth": 1.0}
    same = HybridDistillation(student, masked=FrozenTeacher(copy.deepcopy(student)), **settings)
    assert same.losses(batch, 0.5)["relation"].tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    other = HybridDistillation(student, masked=FrozenTeacher(small(embed_dim=36)), **settings)
    assert (other.losses(batch, 0.5)["relation"] > 1e-4).all()


def test_kept_tokens_are_compared_with_the_same_places_of_the_experts(tmp_path: Path) -> None:
    """With nothing hidden, dropping nothing is the same as no mask at all; with half hidden it is another loss, and finite."""
    batch = fixed_batch(build(RECIPE, tmp_path))
    model = HybridDistillation(small(), contrastive=FrozenTeacher(small()), masked=FrozenTeacher(small()), num_relation_heads=4)
    whole = model.losses(batch, 0.5)
    hidden = torch.zeros(2, 4, 36, dtype=torch.bool)
    group = batch.views["global"]
    nothing = model.losses(batch._replace(views={"global": group._replace(mask=hidden)}), 0.5)
    for name in model.terms:
        torch.testing.assert_close(nothing[name], whole[name])
    hidden[..., ::2] = True
    half = model.losses(batch._replace(views={"global": group._replace(mask=hidden)}), 0.5)
    assert all(torch.isfinite(half[name]).all() and (half[name] != whole[name]).all() for name in model.terms)


def test_mask_recipe_trains(tmp_path: Path) -> None:
    options = ["--data.mask", "glpretrain.masking.RandomMask", "--data.mask.init_args.ratio", "0.5"]
    assert build(RECIPE, tmp_path, *options).fit().results["steps"] == 4


def test_blocks_are_shares_of_the_depth() -> None:
    experts = {"contrastive": FrozenTeacher(small()), "masked": FrozenTeacher(small(depth=8))}
    model = HybridDistillation(small(), **experts)
    assert (model.masked_block, model.student_block) == (5, 1)
    with pytest.raises(ValueError, match=r"masked_depth: accepted are shares in \(0, 1\], not 0"):
        HybridDistillation(small(), **experts, masked_depth=0.0)


def test_experts_on_another_grid_are_refused(tmp_path: Path) -> None:
    batch = fixed_batch(build(RECIPE, tmp_path))
    model = HybridDistillation(small(), contrastive=FrozenTeacher(small(), size=96), masked=FrozenTeacher(small()), num_relation_heads=4)
    with pytest.raises(ValueError, match=r"contrastive: its grid is \(12, 12\), the student's \(6, 6\); set its size"):
        model.losses(batch, 0.5)


def test_attention_inputs_carry_the_gradient_and_are_the_blocks_own() -> None:
    encoder = small()
    items = torch.sin(torch.arange(2 * 3 * 48 * 48.0)).reshape(2, 3, 48, 48)
    with attention_inputs(encoder, block=0) as seen:
        output = encoder(items)
    (inputs,) = seen
    assert inputs.queries.shape == inputs.keys.shape == inputs.values.shape == (2, 3, 36, 8)
    assert torch.equal(encoder(items).cls, output.cls)  # watching changes nothing
    inputs.keys.square().sum().backward()
    assert encoder.model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    block = encoder.model.blocks[0]
    tokens = block.norm1(encoder.model._pos_embed(encoder.model.patch_embed(items)))
    fused = block.attn.qkv(tokens).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)  # [3 B heads T d]
    torch.testing.assert_close(torch.stack(inputs), fused[:, :, :, 1:])
