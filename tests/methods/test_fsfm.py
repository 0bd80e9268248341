"""FSFM against the official model with the same weights: terms, projections and gradients; and what the covered region adds."""

import re
from pathlib import Path

import pytest
import torch
from batches import batch_of, value_of
from golden import assert_matches, load, noise, official_weights
from shrinking import ROOT, shrunk
from torch import Tensor

from glpretrain.cli.training import Training
from glpretrain.core.batch import Batch
from glpretrain.encoders import ViT
from glpretrain.methods import FSFM
from glpretrain.objectives.contrastive import InfoNCE

GOLDEN = load("fsfm")
# Official names to ours; the first that fits is taken, and what fits none is the encoder's, in timm's names.
_RENAMED = (
    (r"^mask_token$", "student.heads.rep.mask_token"),
    (r"^rep_decoder_blocks\.(\d+)\.", r"student.heads.rep.blocks.\1."),
    (r"^rep_decoder_embed\.", "student.heads.rep.embed."),
    (r"^rep_decoder_norm\.", "student.heads.rep.norm."),
    (r"^rep_decoder_pred\.", "student.heads.rep.predict."),
    (r"^decoder_blocks\.(\d+)\.", r"decoder.blocks.\1."),
    (r"^decoder_embed\.", "decoder.embed."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "decoder.predict."),
    (r"^projector\.projection_head\.", "student.heads.projector."),
    (r"^predictor\.projection_head\.", "predictor."),
    (r"^", "student.encoder.model."),
)
_BLOCK = (
    ("attn.qkv.weight", "self_attn.in_proj_weight"),
    ("attn.qkv.bias", "self_attn.in_proj_bias"),
    ("attn.proj.", "self_attn.out_proj."),
    ("mlp.fc1.", "linear1."),
    ("mlp.fc2.", "linear2."),
)


def ours(official: str) -> str:
    pattern, replacement = next(pair for pair in _RENAMED if re.search(pair[0], official))
    name = re.sub(pattern, replacement, official, count=1)
    for old, new in _BLOCK if "decoder_blocks" in official else ():
        name = name.replace(old, new)
    return name


def model(similarity: InfoNCE | None = None) -> FSFM:
    """The official small model: weights of student and target by formula."""
    encoder = ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    widths = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "rep_depth": 1, "rep_heads": 3}
    method = FSFM(encoder, **widths, hidden_dim=10, projection_dim=6, similarity=similarity)
    weights = {ours(name): value for name, value in official_weights(GOLDEN["shapes"]).items()}
    for name, value in official_weights(GOLDEN["target_shapes"]).items():
        weights[ours(name.removeprefix("target.")).replace("student.", "teacher.branch.")] = value
    state = method.state_dict()
    assert weights.keys() == state.keys(), sorted(weights.keys() ^ state.keys())
    method.load_state_dict({name: value.reshape(state[name].shape) for name, value in weights.items()})
    return method


def batch() -> Batch:
    order = noise(4, 16, name="order").argsort(dim=1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(16).expand(4, 16))
    return batch_of(
        1.7 * noise(1, 4, 3, 32, 32, name="images"),
        mask=(rank < 12).unsqueeze(0),
        region_mask=(rank < torch.tensor([[3], [0], [5], [12]])).unsqueeze(0),
    )


@pytest.mark.parametrize("term", FSFM.terms)
def test_terms_and_gradients_are_the_official_ones(term: str) -> None:
    method = model()
    value = value_of(method.losses(batch(), 0.5)[term])
    assert_matches(value.detach(), GOLDEN["losses"][term])
    value.backward()
    gradients: dict[str, Tensor | None] = {name: parameter.grad for name, parameter in method.named_parameters()}
    fixed = {"student.encoder.model.pos_embed"}  # learns here, does not there
    for official, (projection, norm) in GOLDEN["gradients"][term].items():
        gradient = gradients[ours(official)].double().reshape(GOLDEN["shapes"][official])
        tolerance = 1e-5 * max(norm, 1e-3)
        assert abs(float(gradient.norm()) - norm) <= tolerance, official
        assert abs(float((gradient * noise(*gradient.shape, name=f"gradient {official}").double()).sum()) - projection) <= 3 * tolerance, (
            official
        )
    touched = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert touched - fixed == {ours(official) for official in GOLDEN["gradients"][term]} - {
        ours(official) for official, (_, norm) in GOLDEN["gradients"][term].items() if norm == 0.0
    }


def test_the_other_choice_of_similarity_is_the_official_one() -> None:
    assert_matches(value_of(model(InfoNCE(temp=0.1)).losses(batch(), 0.5)["similarity"]).detach(), GOLDEN["info_nce"])


def test_the_target_gets_no_gradient_and_moves_towards_the_student() -> None:
    method = model()
    sum(value_of(term) for term in method.losses(batch(), 0.5).values()).backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert {name.split(".")[1] for name, _ in method.teacher.branch.heads.named_parameters(prefix="heads")} == {"rep", "projector"}


def test_a_region_that_no_item_has_costs_nothing() -> None:
    method, seen = model(), batch()
    group = seen.views["global"]
    nothing = group._replace(region_mask=torch.zeros_like(group.region_mask))
    term = value_of(method.losses(seen._replace(views={"global": nothing}), 0.5)["region"])
    assert term.item() == 0.0
    term.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in method.parameters())


def test_positions_of_the_rep_decoder_are_an_option() -> None:
    """Without, as officially, the target cannot tell where its tokens lie once the encoder has run."""
    encoder = ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    tokens, order = noise(2, 16, 24, name="tokens"), torch.arange(16).flip(0)
    for positions, equal in (("none", True), ("sincos", False)):
        rep = FSFM(encoder, rep_heads=3, decoder_dim=16, decoder_depth=1, decoder_heads=2, rep_positions=positions).student.heads["rep"]
        results = [rep(tokens[:, 0], patches, grid=(4, 4)) for patches in (tokens, tokens[:, order])]
        assert torch.allclose(*results, atol=1e-6) is equal
    with pytest.raises(ValueError, match="positions: 'learned' given; accepted: none, sincos"):
        FSFM(encoder, rep_positions="learned")


def test_default_weights_are_the_official_ones() -> None:
    assert model().weights == {"pixels": 1.0, "region": 0.007, "similarity": 0.1}


def test_masks_and_methods_that_do_not_fit_are_named_and_mae_takes_any(tmp_path: Path) -> None:
    """MAE with the mask of FSFM is the comparison that the paper makes; FSFM has to know what is covered."""
    mask = [
        "--data.mask",
        "glpretrain.masking.CRFRPMask",
        "--data.source",
        "glpretrain.data.LFWSubset",
        "--data.source.init_args.size",
        "48",
    ]
    options = [
        "--trainer.logger",
        "false",
        "--evaluate",
        "false",
        "--report",
        "false",
        "--runs",
        str(tmp_path / "runs"),
        "--trainer.enable_progress_bar",
        "false",
    ]
    fitted = Training(["--config", str(shrunk(ROOT / "mae.yaml", tmp_path)), *mask, *options]).fit()
    assert (fitted.folder / "backbone").is_dir()
    wrong = ["--data.mask", "glpretrain.masking.FRPMask"]
    with pytest.raises(ValueError, match=r"FSFM needs data.mask: set it, for example to glpretrain.masking.CRFRPMask"):
        Training(["--config", str(shrunk(ROOT / "fsfm.yaml", tmp_path)), *wrong, *options]).fit()
