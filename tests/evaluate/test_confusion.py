"""Counts of pixels and their scores: torchmetrics agrees, absent classes are left out, n and intervals are those of images."""

import math

import pytest
import torch
from evaluate_stubs import half_width
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from glpretrain.evaluate.metrics.confusion import areas, class_iou, confusion, mean_iou, segmentation_scores
from glpretrain.evaluate.patches.segmentation import best_class, class_shares

NUM_CLASSES = 5
NAMES = [f"c{n}" for n in range(NUM_CLASSES)]


def masks(count: int = 7) -> tuple[Tensor, Tensor]:
    """Int[B 12 20] truth, -1 to 3 with class 4 absent, and a prediction that is right here and there."""
    ramp = torch.arange(count * 12 * 20).reshape(count, 12, 20)
    truth = (torch.sin(ramp * 0.07) * 2.4 + 1.0).round().long()
    predicted = torch.where(torch.sin(ramp * 1.3) > 0.2, truth, (torch.sin(ramp * 0.9) * 2 + 2).round().long()).clamp(0, 4)
    return truth, predicted


def scores(truth: Tensor, predicted: Tensor):
    return segmentation_scores(areas(confusion(truth, predicted, num_classes=NUM_CLASSES, num_predicted=NUM_CLASSES)), classes=NAMES)


def test_scores_agree_with_torchmetrics() -> None:
    truth, predicted = masks()
    assert set(truth.unique().tolist()) == {-1, 0, 1, 2, 3} and 4 in predicted
    found = scores(truth, predicted)
    per_class = multiclass_jaccard_index(predicted, truth, num_classes=NUM_CLASSES, average="none", ignore_index=-1)
    for number in range(4):
        assert found[f"iou_c{number}"].value == pytest.approx(100 * per_class[number].item(), abs=1e-4)
    assert found["miou"].value == pytest.approx(100 * per_class[:4].mean().item(), abs=1e-4)
    assert "iou_c4" not in found
    accuracy = multiclass_accuracy(predicted[truth >= 0], truth[truth >= 0], num_classes=NUM_CLASSES, average="micro")
    assert found["accuracy"].value == pytest.approx(100 * accuracy.item(), abs=1e-4)


def test_counts_are_kept_image_by_image() -> None:
    truth, predicted = masks()
    counts = confusion(truth, predicted, num_classes=NUM_CLASSES, num_predicted=NUM_CLASSES)
    for image in range(len(truth)):
        for row, column in ((0, 0), (1, 3), (3, 4)):
            assert counts[image, row, column] == ((truth[image] == row) & (predicted[image] == column)).sum()
    assert counts.sum() == (truth >= 0).sum()


def test_a_class_without_a_true_pixel_is_left_out_of_the_mean() -> None:
    summed = torch.tensor([[6.0, 0.0, 2.0], [8.0, 0.0, 4.0], [8.0, 3.0, 2.0]], dtype=torch.float64)
    assert class_iou(summed)[0] == 0.6 and class_iou(summed)[1].isnan() and class_iou(summed)[2] == 0.5
    assert mean_iou(summed) == 0.55


def test_n_counts_images_and_one_image_has_no_interval() -> None:
    truth, predicted = masks()
    truth[:, :2][truth[:, :2] == 3] = 0
    truth[1:][truth[1:] == 3] = 0
    truth[5] = -1
    found = scores(truth, predicted)
    assert found["miou"].n == found["accuracy"].n == 6
    assert found["iou_c3"].n == 1 and half_width(found["iou_c3"]) == math.inf
    assert 0 < half_width(found["miou"]) < 20 and found["iou_c0"].n == 6
    assert half_width(scores(truth[:1], predicted[:1])["miou"]) == math.inf


def test_the_interval_shrinks_with_the_square_root_of_the_images() -> None:
    truth, predicted = masks(11)
    few, many = scores(truth, predicted), scores(truth.repeat(16, 1, 1), predicted.repeat(16, 1, 1))
    assert many["miou"].value == pytest.approx(few["miou"].value)
    assert half_width(few["accuracy"]) / half_width(many["accuracy"]) == pytest.approx(4, rel=0.25)  # 200 draws know a deviation to 5 %


def test_no_pixel_at_all_is_an_error() -> None:
    truth, predicted = masks()
    with pytest.raises(ValueError, match="no image has a pixel with a class"):
        scores(torch.full_like(truth, -1), predicted)


def test_class_shares_are_counted_pixel_by_pixel() -> None:
    truth, _ = masks(3)
    shares = class_shares(truth, grid=(3, 5), num_classes=NUM_CLASSES)
    assert shares.shape == (3, 15, NUM_CLASSES)
    for image, row, column in ((0, 0, 0), (1, 2, 3), (2, 1, 4)):
        block = truth[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        expected = torch.tensor([(block == number).float().mean() for number in range(NUM_CLASSES)])
        torch.testing.assert_close(shares[image, row * 5 + column], expected)


def test_patches_keep_their_places_when_scores_are_upsampled() -> None:
    classes = torch.arange(6) % 3
    scores = torch.nn.functional.one_hot(classes, 3).float()[None]
    found = best_class(scores, grid=(2, 3), size=(4, 6))
    assert found[0].tolist() == classes.reshape(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1).tolist()
