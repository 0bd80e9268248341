"""Object discovery: boxes are LOST's, truth scores 100, noise scores chance."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluate_stubs import StubEncoder, TableSource, half_width, masked, noise, position_of
from golden import load
from torch import Tensor
from torchvision.ops import box_iou as reference_iou

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import ViT
from glpretrain.evaluate import Features, ObjectDiscovery, Result
from glpretrain.evaluate.patches.discovery import box_iou, lost_box, object_boxes

SIZE, PATCH = 24, 2
GRID = (SIZE // PATCH, SIZE // PATCH)


def scene(position: int) -> Tensor:
    """Two rectangles on the patch grid, the first the smaller."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.long)
    shift = 2 * (position % 3)
    mask[2 + shift : 10 + shift, 2:10] = 1
    mask[4:22, 14 : 18 + shift] = 2
    return mask


def encoder(features) -> StubEncoder:
    def made(items: Tensor) -> EncoderOutput:
        patches = features(items)
        return EncoderOutput(patches.mean(dim=1), patches)

    return StubEncoder(made, size=SIZE, patch=PATCH)


def run(features, source: TableSource, **options) -> Result:
    return ObjectDiscovery(**options).run(encoder(features), {"masked": source})


def truth(items: Tensor) -> Tensor:
    """One-hot of the object of each patch."""
    return F.one_hot(items[:, 0, ::PATCH, ::PATCH].flatten(1).long(), 8).float()


def chance(items: Tensor) -> Tensor:
    patches = noise(position_of(items), GRID[0] * GRID[1], 3, seed=5)
    return patches - patches.mean(dim=1, keepdim=True) + 3.0  # what all patches share is taken off again


def golden_features(case: dict) -> Tensor:
    rows, columns, dim, phase = case["rows"], case["columns"], case["dim"], case["phase"]
    ramp = torch.arange(rows * columns * dim, dtype=torch.float64)
    values = torch.sin(1.7 * ramp + 0.013 * ramp * ramp + phase).reshape(rows, columns, dim)
    amount = torch.full((rows, columns), -0.6, dtype=torch.float64)
    amount[rows // 3 : 2 * rows // 3 + 1, columns // 4 : columns // 2 + 1] = 1.5
    return (values + amount[..., None] * torch.sin(2.3 * torch.arange(dim, dtype=torch.float64) + phase)).flatten(0, 1)


@pytest.mark.parametrize("case", load("lost")["cases"], ids=lambda case: f"{case['rows']}x{case['columns']}, k={case['k_patches']}")
def test_boxes_are_those_of_the_official_code(case: dict) -> None:
    box = 8 * lost_box(golden_features(case), grid=(case["rows"], case["columns"]), k_patches=case["k_patches"])
    assert box.tolist() == case["box"]
    iou = box_iou(box, torch.tensor(case["others"]))
    torch.testing.assert_close(iou, torch.tensor(case["iou"], dtype=torch.float64), rtol=0, atol=1e-5)


def test_iou_agrees_with_torchvision() -> None:
    boxes = torch.tensor([[0, 0, 7, 5], [3, 2, 11, 13], [7, 0, 9, 5], [20, 20, 21, 22]])
    for box in boxes:
        torch.testing.assert_close(box_iou(box, boxes), reference_iou(box[None].double(), boxes.double())[0])


def test_truth_scores_100() -> None:
    scores = run(truth, masked([scene(p) for p in range(11)])).scores
    assert scores["corloc"].value == 100 and scores["iou"].value == 100
    assert scores["corloc"].n == 11 and 0 < half_width(scores["corloc"]) < 20


def test_noise_scores_chance_within_its_interval() -> None:
    """Chance is the share of images whose objects are met by the boxes of other images."""
    scenes = [scene(p) for p in range(36)]
    source = masked(scenes)
    scores = run(chance, source).scores
    found = [lost_box(chance(item.values[None].float())[0] - 3.0, grid=GRID, k_patches=100) * PATCH for item in source.items]
    hits = torch.tensor([[box_iou(box, object_boxes(mask)).max() >= 0.5 for mask in scenes] for box in found]).double()
    hits.fill_diagonal_(0)
    level = (hits.sum() / (36 * 35)).item()
    assert abs(scores["corloc"].value / 100 - level) < 4 * math.sqrt(max(level * (1 - level), 1 / 36) / 36)
    whole = [box_iou(torch.tensor([0, 0, SIZE, SIZE]), object_boxes(mask)).max().item() for mask in scenes]
    assert scores["corloc_whole"].value == pytest.approx(100 * sum(value >= 0.5 for value in whole) / 36)


def test_features_that_say_nothing_find_one_patch_or_everything() -> None:
    assert lost_box(torch.zeros(12, 3), grid=(3, 4), k_patches=100).tolist() == [0, 0, 1, 1]
    assert lost_box(torch.ones(12, 3), grid=(3, 4), k_patches=100).tolist() == [0, 0, 4, 3]


def test_the_box_is_the_component_of_the_seed() -> None:
    """Two places of one object that do not touch: only the one with the seed is boxed."""
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[1, 1:3] = mask[3, 4:6] = True
    features = torch.stack([mask.flatten().float(), (~mask).flatten().float()], dim=1)
    assert lost_box(features, grid=(5, 7), k_patches=100).tolist() == [1, 1, 3, 2]


def test_boxes_of_objects_end_behind_their_last_pixel() -> None:
    mask = torch.zeros(6, 9, dtype=torch.long)
    mask[1:4, 2:8], mask[5, 0], mask[0] = 2, 5, -1
    assert object_boxes(mask).tolist() == [[2, 1, 8, 4], [0, 5, 1, 6]]
    assert object_boxes(torch.zeros(3, 3, dtype=torch.long)).shape == (0, 4)


def test_images_without_an_object_are_left_out() -> None:
    empty = torch.zeros(SIZE, SIZE, dtype=torch.long)
    scores = run(truth, masked([scene(0), empty, scene(1)])).scores
    assert scores["corloc"].n == 2 and scores["corloc"].value == 100
    with pytest.raises(ValueError, match="no image shows an object"):
        run(truth, masked([empty]))


def test_keys_of_a_vit_are_scored_and_repeat_exactly() -> None:
    model = ViT("vit_tiny_patch16_224", img_size=SIZE, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    for number, parameter in enumerate(model.parameters()):
        parameter.data = torch.sin(torch.arange(parameter.numel()) * 1.7 + number).reshape(parameter.shape) * 0.4
    source, evaluator = masked([scene(p) for p in range(5)]), ObjectDiscovery(tokens="keys", features=Features(batch_size=2))
    first, second = (evaluator.run(model, {"masked": source}) for _ in range(2))
    assert first == second and first.scores["corloc"].n == 5
    assert model.training


def test_pictures_show_found_and_true_boxes(tmp_path: Path) -> None:
    figures = ObjectDiscovery().pictures(encoder(truth), {"masked": masked([scene(p) for p in range(3)])})
    axes = figures["boxes"].axes
    assert [axis.get_title() for axis in axes] == ["IoU 100 %"] * 3
    assert [len(axis.patches) for axis in axes] == [3] * 3  # two objects and the box
    figures["boxes"].savefig(tmp_path / "boxes.png")


def test_bad_input_is_named() -> None:
    scenes = masked([scene(0)])
    with pytest.raises(ValueError, match="tokens: 'values'; accepted: 'patches', 'keys'"):
        ObjectDiscovery(tokens="values")
    with pytest.raises(ValueError, match="k_patches: 0"):
        ObjectDiscovery(k_patches=0)
    with pytest.raises(ValueError, match="attention maps: StubEncoder given; accepted: a ViT"):
        run(truth, scenes, tokens="keys")
    with pytest.raises(ValueError, match="patch features are not finite"):
        run(lambda items: truth(items) * torch.nan, scenes)
