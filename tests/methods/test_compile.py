"""Blocks that torch compiles: the same names, and the same losses and gradients."""

from pathlib import Path

import pytest
import torch
from contract import build, fixed_batch
from shrinking import ROOT

from glpretrain.encoders import FeatureMap
from glpretrain.encoders.blocks import compile_blocks

COMPILED = ("--model.init_args.optimization.compile", "true")


def test_every_block_of_student_and_teacher_is_compiled_and_keeps_its_names(tmp_path: Path) -> None:
    plain, compiled = build(ROOT / "dino.yaml", tmp_path).model, build(ROOT / "dino.yaml", tmp_path, *COMPILED).model
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for branch in (compiled.student, compiled.teacher_branch):
        assert all(block._compiled_call_impl is not None for block in branch.encoder.model.blocks)
    assert all(block._compiled_call_impl is None for block in plain.student.encoder.model.blocks)


def test_an_encoder_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="compile=True given for FeatureMap; accepted: encoders with blocks, such as ViT"):
        compile_blocks(FeatureMap("test_convnext", img_size=32))


@pytest.mark.slow  # the compiler takes half a minute for each
@pytest.mark.parametrize("recipe", ["dino", "ibot", "mae"])
def test_losses_and_gradients_are_those_of_the_blocks_as_they_are(recipe: str, tmp_path: Path) -> None:
    found = []
    for arguments in ((), COMPILED):
        training = build(ROOT / f"{recipe}.yaml", tmp_path, *arguments)
        model, batch = training.model, fixed_batch(training)
        terms = model.averaged(model.losses(batch, 0.5), batch)
        torch.stack(list(terms.values())).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        found.append({**{f"term {name}": value for name, value in terms.items()}, **gradients})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
