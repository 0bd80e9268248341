"""Detectors: area under the curve and error rates of frames and videos, thresholds of a development part."""

import pytest
import torch
from golden import load, noise
from torch import Tensor
from tuned_models import trained, vit

from glpretrain.data import FaceSwaps
from glpretrain.evaluate import ForgeryDetection
from glpretrain.evaluate.metrics.roc import Detections, eer_threshold, hter
from glpretrain.finetune import Classification, LabelledData, LabelledViews

METRICS = load("fsfm_finetune")["metrics"]


def detector(**settings: object) -> Classification:
    return Classification(vit(), ["real", "fake"], positive="fake", **settings)


def frames() -> tuple[Tensor, Tensor, Tensor]:
    """The logits, classes and videos of the official metrics' scores."""
    labels = torch.arange(60) // 5 % 2
    probability = (noise(60, name="scores").double() + 0.4 * labels + 1.0) / 2.5  # a monotone function of the scores, in (0, 1)
    return torch.stack([(1 - probability).log(), probability.log()], dim=1), labels, torch.arange(60) // 5


def test_scores_of_frames_and_videos_are_the_official_ones() -> None:
    logits, labels, videos = frames()
    model = detector()
    found = model.scores(model.outcomes(logits, labels), videos)
    assert found["auc"].value == pytest.approx(METRICS["frame_auc"]) and found["eer"].value == pytest.approx(100 * METRICS["frame_eer"])
    assert found["video_auc"].value == pytest.approx(METRICS["video_auc"])
    assert found["video_eer"].value == pytest.approx(100 * METRICS["video_eer"])
    assert found["accuracy"].value == pytest.approx(100 * (logits.argmax(dim=1) == labels).float().mean().item())
    assert "hter" not in found and "video_auc" not in model.scores(model.outcomes(logits, labels), None)
    assert (model.headline, model.probe) == ("auc", ForgeryDetection(positive="fake"))


def test_the_threshold_of_hter_is_that_of_the_development_part() -> None:
    logits, labels, videos = frames()
    model = detector()
    other = logits.flip(0) + 0.3
    other_labels = labels.flip(0)
    model.choosing = model.outcomes(other, other_labels), videos
    found = model.scores(model.outcomes(logits, labels), videos)
    chosen, asked = (
        Detections(scores.softmax(dim=1)[:, 1], truth == 1, videos) for scores, truth in ((other, other_labels), (logits, labels))
    )
    expected = hter(asked, torch.ones(1, 60), threshold=eer_threshold(chosen)).item()
    assert found["hter"].value == pytest.approx(100 * expected) and {"video_hter", "video_eer"} <= found.keys()


def test_items_of_the_development_part_choose_and_are_not_scored() -> None:
    development = FaceSwaps(size=16, split="test", frames=2)
    views = LabelledViews(16)
    data = LabelledData(FaceSwaps(size=16, frames=2), views, batch_size=160, num_workers=0, development=development)
    model = Classification(vit(), data.classes, positive="fake")
    trained(model, data, steps=2)  # one epoch
    assert (model.found["auc"].n, model.found["accuracy"].n) == (40, 80) and model.found["hter"].n == 40
    assert model.choosing is not None and len(model.choosing[0]) == 80
    with pytest.raises(ValueError, match="has the classes"):
        LabelledData(FaceSwaps(size=16), views, batch_size=4, development=Named(size=16))


def test_a_development_part_that_would_be_ignored_is_refused() -> None:
    development = FaceSwaps(size=16, split="test")
    data = LabelledData(FaceSwaps(size=16), LabelledViews(16), batch_size=4, num_workers=0, development=development)
    with pytest.raises(ValueError, match="face_swaps given; Classification has no threshold to choose: give positive"):
        trained(Classification(vit(), data.classes), data, steps=1)


class Named(FaceSwaps):
    """The same faces under other names."""

    classes = ("live", "attack")


def test_items_of_one_kind_only_have_no_area_under_the_curve() -> None:
    model = detector()
    logits, labels, _ = frames()
    one = labels == 0
    assert "auc" not in model.scores(model.outcomes(logits[one], labels[one]), None)


def test_a_class_that_is_not_there_cannot_be_found() -> None:
    with pytest.raises(ValueError, match="positive='forged' given; accepted: real, fake"):
        Classification(vit(), ["real", "fake"], positive="forged")
