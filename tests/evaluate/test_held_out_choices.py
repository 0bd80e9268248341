"""Which items choose, which are fitted to and which are scored: an evaluator that mixes them up looks better than its encoder is."""

from collections.abc import Callable

import pytest
import torch
from evaluate_stubs import NUM_CLASSES, StubEncoder, TableSource, labelled, labels, masked, noisy, noisy_truth, truth, with_classes
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from glpretrain.core.types import EncoderOutput
from glpretrain.evaluate import ForgeryDetection, LinearProbe, LinearSegmentation, LinearSVM, LinearSweep, Pixels, default_evaluators
from glpretrain.evaluate.cls import linear, linear_sweep
from glpretrain.evaluate.cls.linear import held_out_split
from glpretrain.evaluate.features import cls_features
from glpretrain.evaluate.metrics.roc import Detections, eer_threshold
from glpretrain.evaluate.patches import linear_segmentation
from glpretrain.evaluate.patches.prompt_segmentation import THRESHOLDS, ObjectScore, calibration_images, prompt_result
from glpretrain.evaluate.points import linear_svm


def test_default_evaluators_learn_from_the_first_source_and_score_the_second() -> None:
    train, test = labelled(labels(61), num_classes=NUM_CLASSES), labelled(labels(43), num_classes=NUM_CLASSES)
    evaluators = default_evaluators((train, test), masked([torch.zeros(4, 4, dtype=torch.long)]))
    for name in ("knn", "linear"):
        assert evaluators[name].run(StubEncoder(truth)).scores["accuracy"].n == 43, name


def test_a_subset_is_of_all_classes_where_items_come_class_by_class() -> None:
    source = labelled([index // 200 for index in range(1000)], num_classes=NUM_CLASSES)
    found = cls_features(StubEncoder(truth), Pixels(source, max_items=100)).labels.bincount(minlength=NUM_CLASSES)
    assert found.sum() == 100 and found.min() > 5


def striped(position: int) -> Tensor:
    """Int[8 8]: two classes side by side, the border being the image's own."""
    mask = torch.zeros(8, 8, dtype=torch.long)
    mask[:, 2 * (position % 3) + 2 :] = 1
    return mask


def of_patches(items: Tensor) -> EncoderOutput:
    patches = items[:, 0, ::2, ::2].flatten(1)[..., None].expand(-1, -1, 8)
    return EncoderOutput(patches.mean(dim=1), patches)


ITEMS = labelled(labels(50), num_classes=NUM_CLASSES)
MASKS = with_classes([striped(position) for position in range(10)], num_classes=2)


@pytest.mark.parametrize(
    ("module", "fit", "evaluator", "features", "rows_of", "whole"),
    [
        (linear, "_fit", LinearProbe(ITEMS, ITEMS, inverse_l2=(0.1, 1.0)), noisy, lambda args: len(args[0].cls), 50),
        (linear_svm, "svm_predict", LinearSVM(ITEMS, ITEMS, inverse_l2=(0.1, 1.0)), noisy, lambda args: len(args[0].cls), 50),
        (linear_sweep, "train_heads", LinearSweep(ITEMS, ITEMS, num_blocks=[1], num_steps=5), noisy, lambda args: len(args[1].cls), 50),
        (
            linear_segmentation,
            "fit_heads",
            LinearSegmentation(MASKS, MASKS, num_steps=5),
            of_patches,
            lambda args: len(args[0]),
            160,  # ten images of 16 patches
        ),
    ],
    ids=["probe", "svm", "sweep", "segmentation"],
)
def test_candidates_are_fitted_to_four_fifths_and_the_chosen_one_to_all(
    module: object,
    fit: str,
    evaluator: LinearProbe | LinearSVM | LinearSweep | LinearSegmentation,
    features: Callable[[Tensor], EncoderOutput],
    rows_of: Callable[[tuple], int],
    whole: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    fitted = vars(module)[fit]
    monkeypatch.setattr(module, fit, lambda *args, **given: (seen.append(rows_of(args)), fitted(*args, **given))[1])
    encoder = StubEncoder(features, size=8 if isinstance(evaluator, LinearSegmentation) else 4)
    evaluator.run(encoder)
    assert set(seen[:-1]) == {whole * 4 // 5} and seen[-1] == whole, seen


def test_the_strength_of_the_probe_is_the_one_that_is_best_on_held_out_items() -> None:
    """With so weak features a strong penalty is better; what the probe was fitted to would prefer a weak one."""

    def weak(items: Tensor) -> EncoderOutput:
        return noisy_truth(items, scale=1.5)

    source, strengths = labelled(labels(60), num_classes=NUM_CLASSES), (0.003, 0.1, 100.0)
    cls, truths = cls_features(StubEncoder(weak), Pixels(source))
    cls = (cls - cls.mean(dim=0)) / cls.std(dim=0)
    held_out, fitted = held_out_split(60, ratio=0.2)

    def rates(train: Tensor, scored: Tensor) -> list[float]:
        probes = [LogisticRegression(C=strength, max_iter=500).fit(cls[train].numpy(), truths[train].numpy()) for strength in strengths]
        return [float(probe.score(cls[scored].numpy(), truths[scored].numpy())) for probe in probes]

    right, wrong = rates(fitted, held_out), rates(torch.arange(60), held_out)
    best = right.index(max(right))
    assert best not in (wrong.index(max(wrong)), right.index(min(right)))
    assert LinearProbe(source, source, inverse_l2=strengths).run(StubEncoder(weak)).chosen == {"inverse_l2": strengths[best]}


class Frames(TableSource):
    """Items of two classes, four frames to a video."""

    @property
    def groups(self) -> list[str]:
        return [f"video {index // 4}" for index in range(len(self))]


def test_frames_of_one_video_choose_or_are_fitted_to_together() -> None:
    plain = labelled([index // 4 % 2 for index in range(160)], num_classes=2)
    source = Frames(plain.items, classes=plain.classes)
    cls, truths = cls_features(StubEncoder(noisy), Pixels(source))
    cls, positive, videos = (cls - cls.mean(dim=0)) / cls.std(dim=0), truths == 1, torch.arange(160) // 4
    chooses = torch.isin(videos, held_out_split(40, ratio=0.2)[0])
    probe = LogisticRegression(C=0.1, max_iter=500, class_weight="balanced").fit(cls[~chooses].numpy(), positive[~chooses].numpy())
    scores = torch.from_numpy(probe.predict_proba(cls[chooses].numpy())[:, 1])
    found = ForgeryDetection(source, source, positive="c1", inverse_l2=[0.1]).run(StubEncoder(noisy)).chosen
    expected = eer_threshold(Detections(scores, positive[chooses], torch.arange(int(chooses.sum()))))
    assert found["threshold"] == pytest.approx(expected, rel=1e-4)


def peak(at: int, height: float) -> Tensor:
    """Float[T]: an IoU that is highest at one threshold."""
    return height - 0.01 * (torch.arange(len(THRESHOLDS)) - at).abs().float()


def test_thresholds_are_those_of_the_images_that_calibrate_and_scores_those_of_the_others() -> None:
    """Either kind of click has a threshold of its own."""
    pixels = Pixels(masked([torch.zeros(4, 4, dtype=torch.long)] * 8))
    calibrate = calibration_images(pixels, share=0.25)
    assert len(calibrate) == 2
    objects = [
        ObjectScore(image, -1, *((peak(30, 0.9), peak(60, 0.9)) if image in calibrate else (peak(35, 0.5), peak(80, 0.7))))
        for image in range(8)
    ]
    scores, chosen = prompt_result(objects, masked=pixels, calibration_share=0.25, min_patches=1)
    assert chosen == {"threshold": THRESHOLDS[30].item(), "threshold_centre": THRESHOLDS[60].item()}
    found = {name: round(scores[name].value, 3) for name in ("miou", "miou_centre", "miou_oracle")}
    assert found == {"miou": 45.0, "miou_centre": 50.0, "miou_oracle": 50.0}
    assert {score.n for score in scores.values()} == {6}
