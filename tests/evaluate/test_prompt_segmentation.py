"""Prompt segmentation and patch similarity: truth scores 100, noise its floor, torchmetrics and scikit-learn agree."""

import numpy as np
import pytest
import torch
from evaluate_stubs import StubEncoder, TableSource, half_width, masked, noise, position_of
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import binary_jaccard_index

from glpretrain.core.types import EncoderOutput
from glpretrain.evaluate import DecodedItems, Features, PromptSegmentation, Result
from glpretrain.evaluate.metrics.intervals import mean_interval
from glpretrain.evaluate.patches.prompt_segmentation import THRESHOLDS, calibration_images, centre_patch, iou_at_thresholds, occupancy
from glpretrain.evaluate.patches.similarity import auc, histogram, histogram_auc, overlap

SIZE, PATCH = 24, 2
GRID = (SIZE // PATCH, SIZE // PATCH)


def scene(position: int) -> Tensor:
    """Two rectangles on the patch grid, apart from one another."""
    instances = torch.zeros(SIZE, SIZE, dtype=torch.long)
    shift = 2 * (position % 3)
    instances[2 + shift : 10 + shift, 2:10] = 1
    instances[4:20, 14 : 18 + shift] = 2
    return instances


def truth(items: Tensor) -> EncoderOutput:
    """One-hot of the instance id of each patch."""
    ids = items[:, 0, ::PATCH, ::PATCH].flatten(1).long()
    patches = functional.one_hot(ids, 8).float()
    return EncoderOutput(patches.mean(dim=1), patches)


def chance(items: Tensor) -> EncoderOutput:
    patches = noise(position_of(items), GRID[0] * GRID[1], 8, seed=5)
    return EncoderOutput(patches.mean(dim=1), patches)


def run(features, scenes=None, **arguments) -> dict[str, float]:
    return {name: score.value for name, score in result(features, scenes, **arguments).scores.items()}


def result(features, scenes=None, **arguments) -> Result:
    scenes = [scene(position) for position in range(11)] if scenes is None else scenes
    return of(features, masked(scenes), **arguments)


def of(features, source: TableSource, **arguments) -> Result:
    return PromptSegmentation(**arguments).run(StubEncoder(features, size=SIZE, patch=PATCH), {"masked": source})


def test_truth_scores_100():
    scores = run(truth)
    for name in ("miou", "miou_oracle", "miou_fixed", "miou_centre", "auc"):
        assert scores[name] == 100, name
    assert scores["ovl"] == 0
    assert scores["intra"] == pytest.approx(1) and scores["inter"] == 0
    assert result(truth).scores["miou"].n == 2 * 8  # 11 images, a quarter of them (3) calibrate


def test_noise_scores_chance():
    scores = run(chance)
    assert abs(scores["auc"] - 50) < 2 * half_width(result(chance).scores["auc"]) + 0.5
    assert scores["ovl"] > 90
    # Nothing beats calling every pixel the object by much: the lowest threshold's IoU is close to the object's share.
    share = torch.cat([torch.tensor([(scene(p) == 1).float().mean(), (scene(p) == 2).float().mean()]) for p in range(11)]).mean().item()
    assert 100 * share / 2 < scores["miou"] < 100 * share + 5
    assert scores["miou_oracle"] >= scores["miou"]


def test_centring_takes_away_what_all_patches_share_and_no_mask_is_looked_at_for_it():
    def lit(items: Tensor) -> EncoderOutput:
        patches = truth(items).patches
        patches[..., 7] = 30.0  # the same number in every patch: all cosines are above the last threshold
        return EncoderOutput(patches.mean(dim=1), patches)

    scores = run(lit)
    assert scores["miou"] < 30 and scores["ovl"] > 50
    assert scores["miou_centred"] > 95 and scores["auc_centred"] == 100 and scores["ovl_centred"] == 0
    plain = run(truth)
    assert plain["miou_centred"] > 95 and plain["auc_centred"] == plain["auc"]  # nothing is shared: centring costs little

    scenes = [scene(position) for position in range(11)]
    encoder, evaluator = StubEncoder(lit, size=SIZE, patch=PATCH), PromptSegmentation()
    means = []
    images = masked(scenes)
    for source in (images, TableSource([item._replace(instances=torch.zeros_like(item.instances)) for item in images.items])):
        means.append(evaluator.mean_token(encoder, DecodedItems(source), None))
    assert means[0].equal(means[1]) and means[0].norm() > 0.99


def maps() -> tuple[Tensor, Tensor, Tensor]:
    similarity = torch.sin(torch.arange(3 * 4 * 5) * 1.7).reshape(3, 4, 5)
    mask = torch.zeros(12, 20, dtype=torch.bool)
    mask[3:9, 5:16] = True
    known = torch.ones(12, 20, dtype=torch.bool)
    known[:2] = False
    return similarity, mask, known


def test_iou_agrees_with_torchmetrics_at_every_threshold():
    similarity, mask, known = maps()
    iou = iou_at_thresholds(similarity, mask, known=known)  # [M T]
    upsampled = functional.interpolate(similarity[:, None], size=(12, 20), mode="bilinear")[:, 0]
    for row, image in zip(iou, upsampled, strict=True):
        for value, threshold in zip(row, THRESHOLDS, strict=True):
            reference = binary_jaccard_index((image > threshold)[known].int(), mask[known].int())
            assert value.item() == pytest.approx(reference.item(), abs=1e-6)  # both are a ratio of the same two counts


def test_a_similarity_equal_to_the_threshold_is_not_the_object():
    mask = torch.tensor([[True, False]])
    iou = iou_at_thresholds(torch.tensor([[[0.5, 0.5]]]), mask, known=torch.ones(1, 2, dtype=torch.bool))[0]
    at = int((THRESHOLDS == 0.5).nonzero())
    assert iou[at] == 0 and iou[at - 1] == 0.5
    assert len(THRESHOLDS) == 120 and THRESHOLDS[0] == pytest.approx(-0.2) and THRESHOLDS[-1] == pytest.approx(0.99)


def test_auc_agrees_with_scikit_learn_with_ties():
    positive = (torch.sin(torch.arange(311) * 0.7) * 20).round() / 20 + 0.05
    negative = (torch.sin(torch.arange(503) * 1.3) * 20).round() / 20
    truth_labels = torch.cat([torch.ones(311), torch.zeros(503)])
    reference = roc_auc_score(truth_labels.numpy(), torch.cat([positive, negative]).numpy())
    assert auc(positive, negative) == pytest.approx(reference, abs=1e-9)
    binned = histogram_auc(histogram(positive), histogram(negative)).item()
    assert binned == pytest.approx(reference, abs=0.02)  # values 0.05 apart fall on edges of bins 0.01 wide


def test_overlap_is_one_for_equal_and_half_for_half_shared():
    first = torch.zeros(200)
    first[10:20] = 3
    second = torch.zeros(200)
    second[15:25] = 7
    assert overlap(first, first * 5).item() == pytest.approx(1)
    assert overlap(first, second).item() == pytest.approx(0.5)


def test_careful_click_is_far_from_the_border_of_picture_and_object():
    mask = torch.zeros(12, 20, dtype=torch.bool)
    mask[0:12, 0:12] = True
    assert centre_patch(mask, (6, 10)) in {2 * 10 + 2, 2 * 10 + 3, 3 * 10 + 2, 3 * 10 + 3}
    assert occupancy(mask, (6, 5)).tolist() == [[1, 1, 1, 0, 0]] * 6


def test_ignored_pixels_do_not_count():
    scenes = [scene(position) for position in range(11)]
    for instances in scenes:
        instances[:, 10:14] = -1

    def spill(items: Tensor) -> EncoderOutput:
        """The truth, but the ignored columns look like object 1."""
        ids = items[:, 0].clone()
        ids[:, :, 10:12] = 1
        return EncoderOutput(items.flatten(1)[:, :8], functional.one_hot(ids[:, ::PATCH, ::PATCH].flatten(1).long(), 8).float())

    # Object 1 must not touch rows that differ beside the ignored columns: use its full height.
    for position, instances in enumerate(scenes):
        instances[:, :10] = 1
        instances[:, 14:] = 0
        scenes[position] = instances
    scores = run(spill, scenes)
    assert scores["miou_fixed"] == 100
    assert scores["inter"] == 0


def test_small_objects_are_left_out_and_none_at_all_is_an_error():
    small = torch.zeros(SIZE, SIZE, dtype=torch.long)
    small[:2, :6] = 1  # three patches
    with pytest.raises(ValueError, match="0 objects to calibrate on and 0 to score"):
        run(truth, [small] * 5)
    assert run(truth, [small] * 5, min_patches=3)["miou"] == 100


def test_fewer_prompts_estimate_the_mean_over_all():
    def noisy(items: Tensor) -> EncoderOutput:
        patches = truth(items).patches + 0.3 * chance(items).patches
        return EncoderOutput(patches.mean(dim=1), patches)

    every, some = run(noisy), run(noisy, max_prompts=8)
    assert every["miou"] != some["miou"]
    assert abs(every["miou"] - some["miou"]) < 5  # a mean over 8 clicks in place of 16 to 48, and 16 objects
    assert every["miou_centre"] == some["miou_centre"]


def test_bad_input_is_named():
    scenes = masked([scene(0)])
    with pytest.raises(ValueError, match="calibration_share: 1"):
        PromptSegmentation(calibration_share=1)
    with pytest.raises(ValueError, match="min_patches: 0"):
        PromptSegmentation(min_patches=0)
    with pytest.raises(ValueError, match="accepted: multiples of 2"):
        PromptSegmentation(features=Features(size=25)).run(StubEncoder(truth, size=SIZE, patch=PATCH), {"masked": scenes})
    blank = masked([scene(0)])
    blank.items[0] = blank.items[0]._replace(instances=None)
    with pytest.raises(ValueError, match="has no masks"):
        PromptSegmentation().check({"masked": blank})


class Named(TableSource):
    """Scenes that say what their masks show: the left object of scene p is of class p % 3, the right one a bat."""

    mask_classes = ("ant", "bat", "cat", "dog")

    def __init__(self, count: int) -> None:
        items = masked([scene(position) for position in range(count)]).items
        for position, item in enumerate(items):
            semantic = torch.full_like(item.instances, -1)
            semantic[item.instances == 1] = position % 3
            semantic[item.instances == 2] = 1
            semantic[4:6, 14:18] = 2  # a few pixels of the right object say otherwise: the commonest counts
            items[position] = item._replace(semantic=semantic)
        super().__init__(items)


def noisy(items: Tensor) -> EncoderOutput:
    patches = truth(items).patches + 0.3 * chance(items).patches
    return EncoderOutput(patches.mean(dim=1), patches)


def test_scores_of_classes_agree_with_loops_over_objects_and_clicks():
    source = Named(11)
    scores, chosen, _ = of(noisy, source)
    calibration = calibration_images(DecodedItems(source), share=0.25)
    found: dict[str, list[float]] = {"ant": [], "bat": [], "cat": []}
    images: dict[str, list[int]] = {"ant": [], "bat": [], "cat": []}
    for position, item in enumerate(source.items):
        if position in calibration:
            continue
        patches = functional.normalize(noisy(item.values[None].float()).patches[0], dim=1)
        for identity in (1, 2):
            mask = item.instances == identity
            overlaps = []
            for row in range(GRID[0]):
                for column in range(GRID[1]):
                    cell = mask[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
                    if cell.float().mean() >= 0.5:
                        cosines = (patches @ patches[row * GRID[1] + column]).reshape(1, 1, *GRID)
                        segment = functional.interpolate(cosines, size=(SIZE, SIZE), mode="bilinear")[0, 0] > chosen["threshold"]
                        overlaps.append(((segment & mask).sum() / (segment | mask).sum()).item())
            name = "bat" if identity == 2 else source.mask_classes[position % 3]
            images[name].append(position)
            found[name].append(sum(overlaps) / len(overlaps))
    for name, values in found.items():
        assert scores[f"iou_{name}"].value == pytest.approx(100 * sum(values) / len(values), abs=1e-3), name
        films = torch.tensor(images[name])
        assert half_width(scores[f"iou_{name}"]) == pytest.approx(100 * mean_interval(torch.tensor(values), films), rel=1e-3)
        assert scores[f"iou_{name}"].n == len(values)
    assert "iou_dog" not in scores  # no object shows one
    assert {len(values) for values in found.values()} != {1}
    per_class = [scores[f"iou_{name}"] for name in found]
    assert scores["miou_classes"].value == pytest.approx(sum(score.value for score in per_class) / 3)
    assert half_width(scores["miou_classes"]) == pytest.approx(np.linalg.norm([half_width(score) for score in per_class]) / 3)
    assert scores["miou_classes"].n == sum(score.n for score in per_class) == scores["miou"].n == 16
    objects = [value for values in found.values() for value in values]
    assert scores["miou"].value == pytest.approx(100 * sum(objects) / 16, abs=1e-3)
    assert scores["miou"].value != pytest.approx(scores["miou_classes"].value, abs=1e-3)  # there are more bats


def test_truth_scores_100_in_every_class_and_noise_its_floor():
    right, wrong = of(truth, Named(11)).scores, of(chance, Named(11)).scores
    for name in ("iou_ant", "iou_bat", "iou_cat", "miou_classes"):
        assert right[name].value == 100 and wrong[name].value < 22 + 5, name  # the largest object covers 22 % of a scene
    assert set(right) == set(wrong)


def test_objects_without_a_class_count_only_among_objects():
    source = Named(11)
    for position, item in enumerate(source.items):
        semantic = item.semantic.clone()
        semantic[item.instances == 1] = -1
        source.items[position] = item._replace(semantic=semantic)
    scores = of(noisy, source).scores
    assert [name for name in scores if name.startswith("iou_")] == ["iou_bat"]
    assert scores["iou_bat"].n == 8 and scores["miou"].n == 16


def test_similarity_plot_shows_the_two_distributions_and_their_numbers():
    evaluator, items = PromptSegmentation(), DecodedItems(masked([scene(position) for position in range(11)]))
    encoder = StubEncoder(noisy, size=SIZE, patch=PATCH)
    figure = evaluator.pictures(encoder, {"masked": items})["similarity"]
    scores = evaluator.run(encoder, {"masked": items}).scores
    (axis,) = figure.axes
    ((_, samples),) = evaluator.measure(encoder, items, None)
    lines = {line.get_label(): line for line in axis.lines}
    for name, part in (("same object (intra)", 0), ("inside and outside (inter)", 1)):
        values = torch.cat([sample[part] for sample in samples])
        density, edges = np.histogram(values.clamp(-1, 1).numpy(), bins=200, range=(-1, 1), density=True)
        assert lines[name].get_ydata() == pytest.approx(density, abs=0.02)  # a value on an edge may fall on either side of it
        assert lines[name].get_xdata() == pytest.approx((edges[1:] + edges[:-1]) / 2, abs=1e-6)
    shaded = axis.collections[0].get_label()
    assert shaded == f"overlap {scores['ovl'].value:.1f} %"
    assert axis.get_title(loc="left") == f"AUC {scores['auc'].value:.1f} %, 11 images"


def test_prompts_picture_shows_images_that_did_not_calibrate_and_their_iou():
    encoder, source = StubEncoder(truth, size=SIZE, patch=PATCH), masked([scene(position) for position in range(11)])
    figure = PromptSegmentation().pictures(encoder, {"masked": source})["prompts"]
    titles = [axis.get_title() for axis in figure.axes]
    assert titles.count("IoU 100 %") == 6  # the truth's features, at a threshold that upsampling crosses at the object's rim
    assert len(figure.axes) == 3 * 6
