"""Forgery detection: truth scores 100, noise scores chance, scikit-learn agrees; videos, several sets, thresholds chosen elsewhere."""

import math

import numpy as np
import pytest
import torch
from evaluate_stubs import StubEncoder, TableSource, chance, half_width, labelled, noise, noisy, truth
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from glpretrain.data import FaceSwaps, ImageFolder, Source
from glpretrain.evaluate import ForgeryDetection, Result
from glpretrain.evaluate.metrics.roc import Detections, auc, eer, eer_threshold, hter, numbered


class Frames(TableSource):
    """Items of two classes, five frames to a video."""

    @property
    def groups(self) -> list[str]:
        return [f"video {index // 5}" for index in range(len(self))]


def items(count: int, *, skip: int = 0, frames: bool = False) -> Source:
    """Of classes c0 and c1, with features that other items (`skip`) do not share."""
    labels = [(index // 5 if frames else index) % 2 for index in range(skip + count)]
    source = labelled(labels, num_classes=2)
    return (Frames if frames else TableSource)(source.items[skip:], classes=source.classes)


def run(features, train: Source | None = None, test: Source | None = None, *, more: dict[str, Source] | None = None, **options) -> Result:
    sources = {"train": train or items(200), "test": test or items(300, skip=200)} | (more or {})
    return ForgeryDetection(positive="c1", **options).run(StubEncoder(features), sources)


def detections(count: int, *, ties: bool) -> Detections:
    positive = noise(torch.arange(count), seed=4) > 0.5
    scores = noise(torch.arange(count), seed=5) + positive * 0.8
    return Detections((scores * 2).round() / 2 if ties else scores, positive, torch.arange(count))


def official_eer(positive, scores) -> float:
    false, true, _ = roc_curve(positive, scores)
    return brentq(lambda x: 1.0 - x - interp1d(false, true)(x), 0.0, 1.0)


# Truth, chance, an independent implementation --------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [False, True])
def test_truth_scores_100(frames: bool) -> None:
    sets = items(200, frames=frames), items(300, skip=200, frames=frames)
    scores = run(truth, *sets).scores
    assert all(score.value == (100 if name.endswith("auc") else 0) for name, score in scores.items())
    assert {score.n for score in scores.values()} == {60 if frames else 300}
    assert len(scores) == (6 if frames else 3)


def test_noise_scores_chance_within_the_interval() -> None:
    scores = run(chance).scores
    for name, score in scores.items():
        assert abs(score.value - 50) < 2 * half_width(score), name
        assert 3 < half_width(score) < 12


@pytest.mark.parametrize("ties", [False, True])
def test_area_and_equal_error_are_scikit_learns(ties: bool) -> None:
    found = detections(257, ties=ties)
    ones = torch.ones(1, 257)
    assert math.isclose(auc(found, ones), roc_auc_score(found.positive, found.scores), abs_tol=1e-9)
    assert math.isclose(eer(found, ones), official_eer(found.positive, found.scores), abs_tol=1e-9)


def test_weights_count_items_as_often_as_they_were_drawn() -> None:
    found = detections(60, ties=True)
    weights = torch.tensor([[index % 3 for index in range(60)], [1] * 60]).float()
    repeated = torch.arange(60).repeat_interleave(weights[0].long())
    drawn = Detections(found.scores[repeated], found.positive[repeated], torch.arange(len(repeated)))
    for statistic in (auc, eer, lambda one, many: hter(one, many, threshold=0.4)):
        together = statistic(found, weights)
        assert torch.allclose(together[:1], statistic(drawn, torch.ones(1, len(repeated))), atol=1e-9)
        assert torch.allclose(together[1:], statistic(found, weights[1:]), atol=1e-9)


def test_half_total_error_is_that_of_the_confusion_matrix() -> None:
    found = detections(257, ties=False)
    said, positive = (found.scores >= 0.3).numpy(), found.positive.numpy()
    expected = 0.5 * ((said & ~positive).sum() / (~positive).sum() + (~said & positive).sum() / positive.sum())
    assert math.isclose(hter(found, torch.ones(1, 257), threshold=0.3), expected, abs_tol=1e-9)


def test_at_the_chosen_threshold_the_error_rates_are_as_equal_as_can_be() -> None:
    found = detections(257, ties=True)
    levels = np.unique(found.scores.numpy())
    misses = [(found.scores[found.positive] < level).float().mean() for level in levels]
    alarms = [(found.scores[~found.positive] >= level).float().mean() for level in levels]
    differences = [abs(miss - alarm) for miss, alarm in zip(misses, alarms, strict=True)]
    threshold = eer_threshold(found)
    best = levels[int(np.argmin(differences))]
    assert threshold <= best and not ((found.scores >= threshold) & (found.scores < best)).any()


def test_the_probe_is_scikit_learns_and_its_strength_is_chosen_on_held_out_items() -> None:
    train, test = items(200), items(300, skip=200)
    encoder = StubEncoder(noisy)
    result = run(noisy, train, test, inverse_l2=[0.1])
    rows = [encoder(torch.stack([(item.values.float() / 255 - torch.tensor(encoder.card.mean)[:, None, None])
            / torch.tensor(encoder.card.std)[:, None, None] for item in source.items])).cls for source in (train, test)]  # fmt: skip
    mean, std = rows[0].mean(dim=0), rows[0].std(dim=0)
    truths = [[item.label for item in source.items] for source in (train, test)]
    probe = LogisticRegression(C=0.1, max_iter=500, class_weight="balanced").fit(((rows[0] - mean) / std).numpy(), truths[0])
    scores = probe.predict_proba(((rows[1] - mean) / std).numpy())[:, 1]
    assert result.scores["auc"].value == pytest.approx(100 * roc_auc_score(truths[1], scores), abs=1e-3)
    assert result.scores["eer"].value == pytest.approx(100 * official_eer(truths[1], scores), abs=1e-3)
    assert result.chosen.keys() == {"inverse_l2", "threshold"}


# Videos, several sets, thresholds ---------------------------------------------------------------------------------------------


def test_a_video_scores_the_mean_of_its_frames() -> None:
    found = Detections(torch.tensor([0.9, 0.1, 0.4, 0.2, 0.8]), torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([1, 1, 0, 0, 2]))
    videos = found.averaged()
    assert torch.allclose(videos.scores, torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64))
    assert videos.positive.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="a video has items of both classes"):
        found._replace(positive=torch.tensor([1, 0, 0, 0, 0]).bool()).averaged()


def test_averaging_frames_helps_where_their_noise_is_independent() -> None:
    sets = items(300, frames=True), items(400, skip=300, frames=True)
    scores = run(noisy, *sets).scores
    assert scores["video_auc"].value > scores["auc"].value
    assert scores["video_auc"].n == scores["auc"].n == 80


def test_several_sets_have_a_score_each_and_their_mean() -> None:
    others = {"small": items(60, skip=500), "large": items(400, skip=560)}
    result = run(noisy, more=others, others=["small", "large"])
    alone = run(noisy, test=others["small"])
    assert result.scores["small_auc"] == alone.scores["auc"]
    for score in ("auc", "eer", "hter"):
        rows = [result.scores[name] for name in (score, f"small_{score}", f"large_{score}")]
        assert result.scores[f"mean_{score}"].value == pytest.approx(sum(row.value for row in rows) / 3)
        assert result.scores[f"mean_{score}"].n == 760
    assert ForgeryDetection(others=["small"]).protocol["others"] == ["small"]
    assert set(run(noisy, more=others).scores) == {"auc", "eer", "hter"}  # roles that nobody asks for


def test_the_threshold_is_never_chosen_on_what_is_scored() -> None:
    first = run(noisy).chosen
    assert first == run(noisy, test=items(77, skip=700)).chosen
    moved = run(noisy, more={"development": items(90, skip=900)}).chosen
    assert moved["threshold"] != first["threshold"] and moved["inverse_l2"] == first["inverse_l2"]


def test_a_repeat_gives_equal_scores() -> None:
    assert run(noisy) == run(noisy)


# Groups and mistakes ------------------------------------------------------------------------------------------------------------


def test_numbers_of_names_are_in_the_order_of_their_first_item() -> None:
    assert numbered(["b", "a", "b"], count=3).tolist() == [0, 1, 0] and numbered((), count=3).tolist() == [0, 1, 2]


def test_frames_of_one_folder_or_one_name_are_a_video(tmp_path) -> None:
    for name in ("real/a/1.png", "real/a/2.png", "fake/a/1.png", "fake/c_frame_1.png", "fake/c_frame_2.png", "fake/d.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    groups = ImageFolder(tmp_path).groups
    assert groups == ["fake/a", "fake/c", "fake/c", "fake/d.png", "real/a", "real/a"]
    assert FaceSwaps(split="test", frames=3).groups[:4] == ["0", "0", "0", "1"] and not FaceSwaps(split="test").groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": "attack"}, "positive: 'attack'; table has the classes ['c0', 'c1']; accepted: one of at least two"),
        ({"held_out_ratio": 1.0}, "held_out_ratio: 1.0; accepted: between 0 and 1"),
        ({"inverse_l2": [0.0]}, "inverse_l2: [0.0]; accepted: positive numbers"),
        ({"others": ["test"]}, "others: ['test'] given; these roles have a use of their own; name other roles"),
        ({"others": ["wild"], "positive": "c1"}, "others: needs the sources ['wild']; given: ['test', 'train']"),
    ],
)
def test_mistakes_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ForgeryDetection(**options).check({"train": items(200), "test": items(300, skip=200)})
    assert str(caught.value) == f"ForgeryDetection: {message}"


def test_a_set_of_one_class_is_named() -> None:
    one = TableSource(items(40).items[::2], classes=["c0", "c1"])
    with pytest.raises(ValueError, match="a set has items of one class only"):
        run(noisy, test=one)
    with pytest.raises(ValueError, match="train: its held-out part lacks one of the two classes"):
        run(noisy, one, items(200))
