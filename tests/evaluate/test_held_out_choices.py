"""Which items choose, which are fitted to and which are scored: an evaluator that mixes them up looks better than its encoder is."""

from collections.abc import Callable

import pytest
import torch
from evaluate_stubs import NUM_CLASSES, StubEncoder, TableSource, labelled, labels, masked, noisy, noisy_truth, truth, with_classes
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from glpretrain.core.types import EncoderOutput
from glpretrain.data.sources.base import Source
from glpretrain.evaluate import (
    DecodedItems,
    Evaluator,
    Features,
    ForgeryDetection,
    LinearProbe,
    LinearSegmentation,
    LinearSVM,
    LinearSweep,
    PromptSegmentation,
    default_evaluators,
    default_sources,
)
from glpretrain.evaluate.cls import linear_sweep
from glpretrain.evaluate.metrics.roc import Detections, eer_threshold
from glpretrain.evaluate.patches import linear_segmentation
from glpretrain.evaluate.patches.prompt_segmentation import THRESHOLDS, ObjectScore, calibration_images
from glpretrain.evaluate.points import linear_svm
from glpretrain.evaluate.probes import stratified_split
from glpretrain.evaluate.rows import LabelledFeatures


def rows(features: Callable[[Tensor], EncoderOutput], source: Source, *, max_items: int | None = None) -> LabelledFeatures:
    return Features().labelled(StubEncoder(features), DecodedItems(source, max_items=max_items))


def standardised(cls: Tensor) -> Tensor:
    return (cls - cls.mean(dim=0)) / cls.std(dim=0)


def test_default_evaluators_learn_from_the_first_source_and_score_the_second() -> None:
    train, test = labelled(labels(61), num_classes=NUM_CLASSES), labelled(labels(43), num_classes=NUM_CLASSES)
    evaluators, sources = default_evaluators("image"), default_sources((train, test), masked([torch.zeros(4, 4, dtype=torch.long)]))
    for name in ("knn", "linear"):
        assert evaluators[name].run(StubEncoder(truth), sources).scores["accuracy"].n == 43, name


def test_a_subset_is_of_all_classes_where_items_come_class_by_class() -> None:
    source = labelled([index // 200 for index in range(1000)], num_classes=NUM_CLASSES)
    found = rows(truth, source, max_items=100).labels.bincount(minlength=NUM_CLASSES)
    assert found.sum() == 100 and found.min() > 5


def striped(position: int) -> Tensor:
    """Int[8 8]: two classes side by side, the border being the image's own."""
    mask = torch.zeros(8, 8, dtype=torch.long)
    mask[:, 2 * (position % 3) + 2 :] = 1
    return mask


def of_patches(items: Tensor) -> EncoderOutput:
    patches = items[:, 0, ::2, ::2].flatten(1)[..., None].expand(-1, -1, 8)
    return EncoderOutput(patches.mean(dim=1), patches)


ITEMS = labelled([position % NUM_CLASSES for position in range(50)], num_classes=NUM_CLASSES)
MASKS = with_classes([striped(position) for position in range(10)], num_classes=2)


@pytest.mark.parametrize(
    ("owner", "fit", "evaluator", "features", "rows_of", "whole"),
    [
        (LinearProbe, "_fitted", LinearProbe(inverse_l2=(0.1, 1.0)), noisy, lambda args, given: len(args[1].cls), 50),
        (linear_svm, "svm_predict", LinearSVM(inverse_l2=(0.1, 1.0)), noisy, lambda args, given: len(args[0].cls), 50),
        (
            linear_sweep,
            "train_heads",
            LinearSweep(num_blocks=[1], num_steps=5),
            noisy,
            lambda args, given: len(given["order"].unique()),
            50,
        ),
        (
            linear_segmentation,
            "fit_heads",
            LinearSegmentation(num_steps=5),
            of_patches,
            lambda args, given: len(args[0]),
            160,
        ),  # 10 times 16 patches
    ],
    ids=["probe", "svm", "sweep", "segmentation"],
)
def test_candidates_are_fitted_to_four_fifths_and_the_chosen_one_to_all(
    owner: object,
    fit: str,
    evaluator: Evaluator,
    features: Callable[[Tensor], EncoderOutput],
    rows_of: Callable[[tuple, dict], int],
    whole: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    fitted = getattr(owner, fit)
    monkeypatch.setattr(owner, fit, lambda *args, **given: (seen.append(rows_of(args, given)), fitted(*args, **given))[1])
    encoder = StubEncoder(features, size=8 if isinstance(evaluator, LinearSegmentation) else 4)
    evaluator.run(encoder, {"train": ITEMS, "test": ITEMS, "masked_train": MASKS, "masked": MASKS})
    assert set(seen[:-1]) == {whole * 4 // 5} and seen[-1] == whole, seen


def test_a_linear_layer_is_scored_on_the_images_that_it_was_not_fitted_to() -> None:
    sources = {"masked_train": MASKS, "masked": with_classes([striped(position) for position in range(7)], num_classes=2)}
    scores = LinearSegmentation(num_steps=5).run(StubEncoder(of_patches, size=8), sources).scores
    assert {score.n for score in scores.values()} == {7}


def test_the_strength_of_the_probe_is_the_one_that_is_best_on_held_out_items() -> None:
    """With so weak features a strong penalty is better; what the probe was fitted to would prefer a weak one."""

    def weak(items: Tensor) -> EncoderOutput:
        return noisy_truth(items, scale=1.5)

    source, strengths = labelled(labels(60), num_classes=NUM_CLASSES), (0.003, 0.1, 100.0)
    found = rows(weak, source)
    cls, truths = standardised(found.cls), found.labels
    held_out, fitted = stratified_split(truths, None, ratio=0.2)

    def rates(train: Tensor, scored: Tensor) -> list[float]:
        probes = [LogisticRegression(C=strength, max_iter=500).fit(cls[train].numpy(), truths[train].numpy()) for strength in strengths]
        return [float(probe.score(cls[scored].numpy(), truths[scored].numpy())) for probe in probes]

    right, wrong = rates(fitted, held_out), rates(torch.arange(60), held_out)
    best = right.index(max(right))
    assert best not in (wrong.index(max(wrong)), right.index(min(right)))
    sources = {"train": source, "test": source}
    assert LinearProbe(inverse_l2=strengths).run(StubEncoder(weak), sources).chosen == {"inverse_l2": strengths[best]}


class Frames(TableSource):
    """Items of two classes, four frames to a video."""

    @property
    def groups(self) -> list[str]:
        return [f"video {index // 4}" for index in range(len(self))]


def test_frames_of_one_video_choose_or_are_fitted_to_together() -> None:
    plain = labelled([index // 4 % 2 for index in range(160)], num_classes=2)
    source = Frames(plain.items, classes=plain.classes)
    features = rows(noisy, source)
    cls, positive, videos = standardised(features.cls), features.labels == 1, torch.arange(160) // 4
    chooses = torch.zeros(160, dtype=torch.bool)
    chooses[stratified_split(features.labels, videos, ratio=0.2)[0]] = True
    assert videos[chooses].unique().numel() == 8 and chooses.sum() == 32
    assert features.labels[chooses].bincount().tolist() == [16, 16]
    probe = LogisticRegression(C=0.1, max_iter=500, class_weight="balanced").fit(cls[~chooses].numpy(), positive[~chooses].numpy())
    scores = torch.from_numpy(probe.predict_proba(cls[chooses].numpy())[:, 1])
    found = ForgeryDetection(positive="c1", inverse_l2=[0.1]).run(StubEncoder(noisy), {"train": source, "test": source}).chosen
    expected = eer_threshold(Detections(scores, positive[chooses], torch.arange(int(chooses.sum()))))
    assert found["threshold"] == pytest.approx(expected, rel=1e-4)


def peak(at: int, height: float) -> Tensor:
    """Float[T]: an IoU that is highest at one threshold."""
    return height - 0.01 * (torch.arange(len(THRESHOLDS)) - at).abs().float()


def test_thresholds_are_those_of_the_images_that_calibrate_and_scores_those_of_the_others() -> None:
    """Either kind of click has a threshold of its own."""
    items = DecodedItems(masked([torch.zeros(4, 4, dtype=torch.long)] * 8))
    calibrate = calibration_images(items, share=0.25)
    assert len(calibrate) == 2
    objects = [
        ObjectScore(image, -1, *((peak(30, 0.9), peak(60, 0.9)) if image in calibrate else (peak(35, 0.5), peak(80, 0.7))))
        for image in range(8)
    ]
    scores, chosen, _ = PromptSegmentation()._summary(objects, items)
    assert chosen == {"threshold": THRESHOLDS[30].item(), "threshold_centre": THRESHOLDS[60].item()}
    found = {name: round(scores[name].value, 3) for name in ("miou", "miou_centre", "miou_oracle")}
    assert found == {"miou": 45.0, "miou_centre": 50.0, "miou_oracle": 50.0}
    assert {score.n for score in scores.values()} == {6}
