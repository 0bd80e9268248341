"""Attention segmentation: masks are DINO's, the truth scores what keeping a share of the mass allows, noise scores chance."""

import math
from pathlib import Path

import pytest
import torch
from evaluate_stubs import StubEncoder, TableSource, half_width, masked, noise, position_of
from golden import load
from torch import Tensor
from torchmetrics.functional.classification import binary_jaccard_index

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import ViT
from glpretrain.encoders.attention import cls_attention
from glpretrain.evaluate import AttentionSegmentation, DecodedItems, Features, Result
from glpretrain.evaluate.encoding import evaluating, normalised
from glpretrain.evaluate.patches import attention_segmentation
from glpretrain.evaluate.patches.attention_segmentation import jaccard_index, keep_mass

SIZE, PATCH = 24, 2
GRID = (SIZE // PATCH, SIZE // PATCH)


def scene(position: int) -> Tensor:
    """Two rectangles on the patch grid."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.long)
    shift = 2 * (position % 3)
    mask[2 + shift : 10 + shift, 2:10] = 1
    mask[4:20, 14 : 18 + shift] = 2
    return mask


def encoder() -> StubEncoder:
    return StubEncoder(lambda items: EncoderOutput(items.flatten(1)[:, :8], items), size=SIZE, patch=PATCH)


def run(source: TableSource, **options) -> Result:
    return AttentionSegmentation(**options).run(encoder(), {"masked": source})


def looking(monkeypatch: pytest.MonkeyPatch, attention) -> None:
    """Let heads look as a function of the pixels that the source wrote says."""

    def made(encoder: StubEncoder, items: Tensor, *, block: int) -> Tensor:
        mean, std = torch.tensor(encoder.card.mean)[:, None, None], torch.tensor(encoder.card.std)[:, None, None]
        return attention(((items * std + mean) * 255).round())

    monkeypatch.setattr(attention_segmentation, "cls_attention", made)


def at_objects(items: Tensor) -> Tensor:
    """One head looks at all objects alike, one at the ground."""
    inside = (items[:, 0, ::PATCH, ::PATCH] > 0).float()
    return torch.stack(
        [inside / inside.sum((1, 2), keepdim=True).clamp_min(1), (1 - inside) / (1 - inside).sum((1, 2), keepdim=True)], dim=1
    )


def test_truth_scores_100_where_nearly_all_of_the_mass_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    looking(monkeypatch, at_objects)
    scores = run(masked([scene(p) for p in range(7)]), mass=0.999).scores
    assert scores["jaccard_best"].value == scores["jaccard_head1"].value == 100
    assert scores["jaccard_head2"].value == 0 and scores["jaccard_mean"].value == 50
    assert {score.n for score in scores.values()} == {7}


def test_truth_scores_the_share_of_patches_that_hold_the_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    looking(monkeypatch, at_objects)
    scores = run(masked([scene(p) for p in range(7)])).scores
    counts = [int((scene(p) > 0).sum()) // PATCH**2 for p in range(7)]
    # Of M equal values in ascending order, those whose running sum j / M exceeds 0.4 are kept.
    expected = [100 * (count - math.floor(0.4 * count + 1e-6)) / count for count in counts]
    assert scores["jaccard_best"].value == pytest.approx(sum(expected) / 7, abs=1e-3)


def test_noise_scores_chance_within_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chance is the score of masks that belong to other images."""
    scenes = [scene(p) for p in range(40)]

    def anywhere(items: Tensor) -> Tensor:
        return noise(position_of(items), 3, *GRID, seed=31).exp()

    looking(monkeypatch, anywhere)
    source = masked(scenes)
    scores = run(source).scores
    images = torch.stack([item.values for item in source.items])
    kept = keep_mass(anywhere(images.float()).flatten(2), mass=0.6).unflatten(2, GRID)
    kept = kept.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)  # [B heads H W]
    truth = torch.stack(scenes) > 0
    others = [
        ((kept.roll(shift, 0) & truth[:, None]).sum((2, 3)) / (kept.roll(shift, 0) | truth[:, None]).sum((2, 3))).mean().item()
        for shift in range(1, 40)
    ]
    chance = 100 * sum(others) / len(others)
    assert abs(scores["jaccard_mean"].value - chance) < 2 * half_width(scores["jaccard_mean"])
    assert scores["jaccard_best"].value > scores["jaccard_mean"].value  # the best of three is chosen by the truth


@pytest.mark.parametrize("case", load("dino_attention_masks")["cases"], ids=lambda case: f"{case['heads']} heads")
def test_masks_are_those_of_dino(case: dict) -> None:
    heads, rows, columns = case["heads"], case["rows"], case["columns"]
    ramp = torch.arange(heads * rows * columns, dtype=torch.float64)
    attention = torch.exp(2 * torch.sin(1.7 * ramp + 0.013 * ramp * ramp + case["phase"])).reshape(heads, -1)
    kept = keep_mass(attention, mass=case["mass"]).unflatten(1, (rows, columns))
    assert torch.equal(kept.repeat_interleave(2, 1).repeat_interleave(2, 2).int(), torch.tensor(case["kept"]).int())
    assert 0 < kept.float().mean() < 1


def test_a_vit_is_scored_as_torchmetrics_scores_its_maps() -> None:
    model = ViT("vit_tiny_patch16_224", img_size=SIZE, patch_size=4, embed_dim=24, depth=2, num_heads=3).eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.data = torch.sin(torch.arange(parameter.numel()) * 1.7 + number).reshape(parameter.shape) * 0.4
    scenes = [scene(p) for p in range(5)]
    for mask in scenes:
        mask[:, 12:14] = -1
    items = DecodedItems(masked(scenes))
    evaluator = AttentionSegmentation(features=Features(layer=0, batch_size=2))
    scores = evaluator.run(model, {"masked": items}).scores
    (batch,) = items.batches((3, SIZE, SIZE), resize="stretch", batch_size=64)
    with evaluating(model):
        maps = cls_attention(model, normalised(batch.items, model), block=0)
    kept = keep_mass(maps.flatten(2), mass=0.6).unflatten(2, (6, 6)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    expected = torch.stack(
        [
            torch.stack([binary_jaccard_index(mask[truth >= 0].int(), (truth > 0)[truth >= 0].int()) for mask in masks])
            for masks, truth in zip(torch.cat([kept, kept.any(1, keepdim=True)], 1), batch.instance_masks(), strict=True)
        ]
    )  # [B heads+1]
    for head in range(3):
        assert scores[f"jaccard_head{head + 1}"].value == pytest.approx(100 * expected[:, head].mean().item(), abs=1e-4)
    assert scores["jaccard_union"].value == pytest.approx(100 * expected[:, 3].mean().item(), abs=1e-4)
    assert scores["jaccard_best"].value == pytest.approx(100 * expected[:, :3].amax(1).mean().item(), abs=1e-4)
    assert evaluator.run(model, {"masked": items}).scores == scores


def test_images_without_an_object_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    looking(monkeypatch, at_objects)
    empty = torch.zeros(SIZE, SIZE, dtype=torch.long)
    scores = run(masked([scene(0), empty, scene(1)]), mass=0.999).scores
    assert scores["jaccard_best"].n == 2 and scores["jaccard_best"].value == 100
    with pytest.raises(ValueError, match="no image shows an object"):
        run(masked([empty]))


def test_ignored_pixels_do_not_count() -> None:
    predicted = torch.tensor([[[[True, True, False, True]]]])
    truth = torch.tensor([[[True, False, True, False]]])
    known = torch.tensor([[[True, True, True, False]]])
    assert jaccard_index(predicted, truth, known=known).item() == pytest.approx(1 / 3)


def test_pictures_show_every_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    looking(monkeypatch, at_objects)
    figures = AttentionSegmentation(mass=0.999).pictures(encoder(), {"masked": masked([scene(p) for p in range(3)])})
    axes = figures["heads"].axes
    assert len(axes) == 3 * 3 and axes[1].get_title() == "head 1: 100 %" and axes[1].title.get_fontweight() == "bold"
    figures["heads"].savefig(tmp_path / "heads.png")


def test_bad_input_is_named() -> None:
    scenes = masked([scene(0)])
    with pytest.raises(ValueError, match="mass: 1; accepted: between 0 and 1"):
        AttentionSegmentation(mass=1)
    with pytest.raises(ValueError, match="attention maps: StubEncoder given; accepted: a ViT"):
        run(scenes)
    pooled = ViT("vit_medium_patch16_gap_240", img_size=SIZE, patch_size=4, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="vit_medium_patch16_gap_240 has no class token"):
        AttentionSegmentation().run(pooled, {"masked": scenes})
    with pytest.raises(ValueError, match=r"features\.bf16: True; this evaluator does not use it"):
        AttentionSegmentation(features=Features(bf16=True))
