"""Methods whose decoders and heads start as the official ones: the moments of every parameter as built, compared with those of a fresh
official model. The encoders alone are in tests/encoders/test_initial.py."""

from collections.abc import Callable

import pytest
import torch
from golden import assert_moments, load
from test_fsfm import ours as fsfm_name
from test_official_runs import mae_name

from glpretrain.encoders import ViT
from glpretrain.methods import FSFM, MAE
from glpretrain.methods.base import Method

ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 1, "num_heads": 3, "initial": "mae", "positions": "sincos"}
DECODER = {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 3}
FIXED = ("decoder_pos_embed", "rep_decoder_pos_embed")  # computed here, not kept


@pytest.mark.parametrize(
    ("make", "golden", "name_of"),
    [
        (lambda encoder: MAE(encoder, **DECODER, decoder_initial="mae"), "mae", mae_name),
        (lambda encoder: FSFM(encoder, **DECODER, rep_depth=1, rep_heads=3), "fsfm", fsfm_name),
    ],
    ids=["mae", "fsfm"],
)
def test_a_method_starts_as_the_official_one(make: Callable[[ViT], Method], golden: str, name_of: Callable[[str], str]) -> None:
    torch.manual_seed(0)
    model = make(ViT("vit_tiny_patch16_224", **ENCODER))
    found = {name: parameter for name, parameter in model.named_parameters() if not name.startswith("teacher.")}
    moments = load(f"initial_{golden}")["moments"][golden]
    expected = {name_of(name): values for name, values in moments.items() if name not in FIXED}
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert_moments(parameter, expected[name], name=name)


def test_maes_decoder_starts_otherwise_where_nobody_asks() -> None:
    """So the moments above can tell the rules apart."""
    torch.manual_seed(0)
    found = dict(MAE(ViT("vit_tiny_patch16_224", **ENCODER), **DECODER).named_parameters())
    name = "student.heads.decoder.embed.weight"
    with pytest.raises(AssertionError):
        assert_moments(found[name], load("initial_mae")["moments"]["mae"]["decoder_embed.weight"], name=name)
    with pytest.raises(ValueError, match="decoder: initial='timm' given; accepted: torch, mae"):
        MAE(ViT("vit_tiny_patch16_224", **ENCODER), **DECODER, decoder_initial="timm")
