"""Point-MAE against the official code, what DCGLR compares, and images and clouds through one MMC."""

import re
from pathlib import Path

import pytest
import torch
from batches import batch_of
from golden import assert_matches, load, noise, official_weights
from torch import Tensor

from glpretrain.encoders import PointTransformer, ViT
from glpretrain.methods import DCGLR, IBOT, MAE, MMC, LocalContrast, PointMAE
from glpretrain.objectives.chamfer import ChamferL1
from glpretrain.objectives.contrastive import InfoNCE, NPair
from glpretrain.weights.published import read_published_file

SMALL = {"num_points": 40, "points_per_token": 4, "group_size": 6, "embed_dim": 24, "depth": 2, "num_heads": 3}


def cloud(*shape: int, name: str = "cloud") -> Tensor:
    return noise(*shape, 3, name=name)


def small(name: str = "pos_bert_base", **arguments) -> PointTransformer:
    torch.manual_seed(0)
    return PointTransformer(name, **{**SMALL, **arguments})


def official_point_mae() -> tuple[PointMAE, dict]:
    reference = load("point_mae")
    state = official_weights(reference["shapes"])
    imported = read_published_file({"base_model": state}, {"num_heads": 3}, path=Path("point_mae"))
    method = PointMAE(PointTransformer("point_mae", **SMALL), decoder_depth=1, decoder_heads=3)
    own = method.encoder.backbone_state()
    method.encoder.load_backbone_state({name: tensor for name, tensor in imported.state.items() if name in own})
    names = {"mask_token": "mask_token", "increase_dim.0.": "predict.", "decoder_pos_embed.": "position."}
    decoder = {}
    for name, tensor in state.items():
        if name.startswith("MAE_decoder."):
            decoder[re.sub(r"^MAE_decoder\.(blocks\.|norm\.)", r"\1", name)] = tensor
        for start, new in names.items():
            if name.startswith(start):
                decoder[new + name.removeprefix(start)] = tensor.flatten() if start == "mask_token" else tensor
    decoder["predict.weight"] = decoder["predict.weight"].squeeze(2)
    method.student.heads["decoder"].load_state_dict(decoder)
    return method.train(), reference


def test_point_mae_has_the_official_loss_and_gradients() -> None:
    method, reference = official_point_mae()
    mask = torch.tensor(reference["mask"])
    loss = method.losses(batch_of(noise(3, 40, 3, name="points").unsqueeze(0), mask=mask.unsqueeze(0)), 0.0)["points"].mean()
    assert_matches(loss.detach(), reference["loss"])
    loss.backward()
    parameters = dict(method.student.named_parameters())
    norms = reference["gradient_norms"]
    pairs = {
        "heads.decoder.predict.weight": "increase_dim.0.weight",
        "heads.decoder.mask_token": "mask_token",
        "heads.decoder.blocks.0.attn.qkv.weight": "MAE_decoder.blocks.0.attn.qkv.weight",
        "heads.decoder.position.2.weight": "decoder_pos_embed.2.weight",
        "encoder.model.blocks.1.mlp.fc1.weight": "MAE_encoder.blocks.blocks.1.mlp.fc1.weight",
        "encoder.model.position.0.weight": "MAE_encoder.pos_embed.0.weight",
        "encoder.model.tokens.second.0.weight": "MAE_encoder.encoder.second_conv.0.weight",
        "encoder.model.tokens.first.1.weight": "MAE_encoder.encoder.first_conv.1.weight",
        "encoder.model.tokens.first.0.weight": "MAE_encoder.encoder.first_conv.0.weight",
    }
    for ours, theirs in pairs.items():
        assert_matches(parameters[ours].grad.norm(), norms[theirs], rtol=1e-4)  # float32 sums through batch norms on both sides


def test_a_cloud_has_the_mean_of_its_own_views() -> None:
    """Three views of two clouds: what belongs to a view and what to a cloud cannot be confused."""
    method = PointMAE(small("point_mae"), decoder_depth=1, decoder_heads=3).eval()
    views, mask = cloud(3, 2, 40), noise(3, 2, 10, name="order").argsort(dim=2) < 6
    found = method.losses(batch_of(views, mask=mask), 0.0)["points"]
    batches = [batch_of(view.unsqueeze(0), mask=hidden.unsqueeze(0)) for view, hidden in zip(views, mask, strict=True)]
    alone = [method.losses(batch, 0.0)["points"] for batch in batches]
    torch.testing.assert_close(found, torch.stack(alone).mean(dim=0))


def test_point_mae_takes_another_distance_and_points_only() -> None:
    method = PointMAE(small("point_mae"), decoder_depth=1, decoder_heads=3, objective=ChamferL1())
    mask = torch.arange(10).expand(1, 2, -1) < 6
    assert method.losses(batch_of(cloud(1, 2, 40), mask=mask), 0.0)["points"].isfinite().all()
    with pytest.raises(ValueError, match="encoder ViT given; accepted: PointTransformer"):
        PointMAE(ViT("vit_tiny_patch16_224", img_size=32, depth=1))
    with pytest.raises(ValueError, match="MAE: predicts pixels, the encoder is for points; give one of images, or use PointMAE"):
        MAE(small())
    with pytest.raises(ValueError, match="LocalContrast: patches are matched by their places on a grid of 3 axes"):
        LocalContrast(small())


def dcglr(**arguments) -> DCGLR:
    small_heads = {"num_prototypes": 7, "hidden_dim": 16, "bottleneck_dim": 8, "contrast_hidden_dim": 16, "contrast_dim": 8}
    return DCGLR(small(), **small_heads, **arguments)


def test_dcglr_sees_views_of_every_size() -> None:
    batch = batch_of(
        cloud(2, 5, 40), local_views=cloud(3, 5, 24, name="l"), coarse_views=(cloud(2, 5, 16, name="c"), cloud(1, 5, 8, name="d"))
    )
    method = dcglr()
    seen: list[tuple[int, ...]] = []
    method.student.encoder.register_forward_pre_hook(lambda module, args: seen.extend(tuple(items.shape) for items in args[0]))
    terms = method.losses(batch, 0.5)
    assert seen == [(10, 40, 3), (15, 24, 3), (10, 16, 3), (5, 8, 3)]
    assert set(terms) == {"cls", "contrast"} and all(value.isfinite().all() for value in terms.values())


def test_dcglr_contrasts_pairs_of_a_teacher_view_and_another_student_view() -> None:
    method, batch = dcglr(contrast=InfoNCE(temp=0.3)), batch_of(cloud(2, 5, 40), local_views=cloud(1, 5, 24, name="l"))
    calls: list[tuple[Tensor, Tensor]] = []
    forward = method.contrast_objective.forward
    method.contrast_objective.forward = lambda queries, keys: calls.append((queries, keys)) or forward(queries=queries, keys=keys)
    contrast = method.losses(batch, 0.5)["contrast"]
    assert len(calls) == 2 * 3 - 2 and all(not keys.requires_grad and queries.requires_grad for queries, keys in calls)
    expected = torch.stack([forward(queries=queries, keys=keys) for queries, keys in calls]).mean(dim=0)
    torch.testing.assert_close(contrast, expected)


def test_dcglr_with_npair_has_no_other_head() -> None:
    method = dcglr(contrast=NPair())
    assert set(method.student.heads) == {"cls"}
    method.losses(batch_of(cloud(2, 5, 40)), 0.5)["contrast"].mean().backward()
    assert any(parameter.grad is not None for parameter in method.encoder.parameters())


def test_ibot_on_clouds_has_a_centre_for_every_place_as_pos_bert() -> None:
    method = IBOT(small(), num_prototypes=7, hidden_dim=16, bottleneck_dim=8, patch_centre="position")
    mask = noise(2, 5, 10, name="hidden") > 0.2
    assert method.losses(batch_of(cloud(2, 5, 40), mask=mask), 0.0)["patch"].isfinite().all()
    method.patch_objective.advance()
    centre = method.patch_objective.centre
    assert centre.shape == (10, 7) and len(centre.unique(dim=0)) == 10
    with pytest.raises(ValueError, match="patch_centre='one' given; accepted: shared, position"):
        IBOT(small(), patch_centre="one")


def test_clouds_give_every_term_of_mmc_a_gradient() -> None:
    sizes = {"num_prototypes": 7, "hidden_dim": 16, "bottleneck_dim": 8, "num_layers": 1, "contrast_hidden_dim": 16, "contrast_dim": 8}
    method = MMC(small("point_bert"), **sizes, decoder_depth=1, decoder_heads=3, max_distance=2.0)
    batch = batch_of(cloud(2, 5, 40), mask=noise(2, 5, 10, name="hidden").argsort(dim=2) < 4)
    frame = torch.eye(3, 4).repeat(2, 5, 1, 1)
    terms = method.losses(batch._replace(views={"global": batch.views["global"]._replace(frame=frame)}), 0.5)
    for name, value in terms.items():
        (gradient,) = torch.autograd.grad(value.mean(), method.encoder.model.tokens.first[0].weight, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name
    with pytest.raises(ValueError, match="decoder_dim=64 given; the decoder of clouds is as wide as the encoder"):
        MMC(small("point_bert"), decoder_dim=64)
