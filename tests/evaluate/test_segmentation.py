"""Segmentation by linear layer, clusters and nearest patches: truth scores 100, noise scores chance, scikit-learn agrees."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_stubs import StubEncoder, half_width, masked, noise, position_of, with_classes
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor
from torch.nn import functional

from glpretrain.core.types import EncoderOutput
from glpretrain.data import MaskedFolder
from glpretrain.evaluate import (
    ClusterSegmentation,
    DecodedItems,
    Evaluator,
    FeatureCache,
    Features,
    InContextSegmentation,
    LinearSegmentation,
    Result,
    Sources,
)
from glpretrain.evaluate.patches.clustering import matched
from glpretrain.evaluate.patches.in_context import attend
from glpretrain.evaluate.patches.linear_segmentation import fit_heads
from glpretrain.evaluate.probes import held_out_split

SIZE, PATCH, NUM_CLASSES = 24, 2, 4
GRID = (SIZE // PATCH, SIZE // PATCH)
CAMVID = Path(__file__).parents[3] / "shared" / "data" / "segmentation_camvid"


def scene(position: int) -> Tensor:
    """Classes 0 to 3 in rectangles on the patch grid."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.long)
    shift = 2 * (position % 3)
    mask[2 + shift : 12 + shift, 2:12] = 1
    mask[4:20, 14 : 18 + shift] = 2
    mask[20:, :12] = 3
    return mask


def shuffled(position: int) -> Tensor:
    """As many patches of each class, in an order that is the image's own."""
    order = torch.argsort(noise(torch.tensor([position]), GRID[0] * GRID[1], seed=7)[0])
    return (order % NUM_CLASSES).reshape(GRID).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)


def truth(items: Tensor) -> EncoderOutput:
    """One-hot of the class of each patch."""
    patches = functional.one_hot(items[:, 0, ::PATCH, ::PATCH].flatten(1).long(), 8).float()
    return EncoderOutput(patches.mean(dim=1), patches)


def chance(items: Tensor) -> EncoderOutput:
    patches = noise(position_of(items), GRID[0] * GRID[1], 8, seed=5)
    return EncoderOutput(patches.mean(dim=1), patches)


def mixed(items: Tensor) -> EncoderOutput:
    patches = truth(items).patches + 0.4 * chance(items).patches
    return EncoderOutput(patches.mean(dim=1), patches)


def made(name: str, **arguments) -> Evaluator:
    kind = {"linear": LinearSegmentation, "in_context": InContextSegmentation, "clusters": ClusterSegmentation}[name]
    fast = {"linear": {"num_steps": 150, "patches_per_step": 256}, "in_context": {"memory_size": 1500}, "clusters": {}}[name]
    return kind(**(fast | arguments))


def sources(masks) -> Sources:
    # Other images than those that are scored: the first ones, which hold other positions, come last.
    train = with_classes([*masks, *masks], num_classes=NUM_CLASSES)
    train.items = train.items[len(masks) :]
    return Sources({"masked": with_classes(masks, num_classes=NUM_CLASSES), "masked_train": train})


def run(name: str, masks, features, **arguments) -> Result:
    return made(name, **arguments).run(encoder(features), sources(masks))


def encoder(features) -> StubEncoder:
    return StubEncoder(features, size=SIZE, patch=PATCH)


NAMES = ("linear", "clusters", "in_context")


@pytest.mark.parametrize("name", NAMES)
def test_truth_scores_100(name: str) -> None:
    scores = run(name, [scene(position) for position in range(11)], truth).scores
    assert {key for key, score in scores.items() if score.value == 100} == {"miou", "accuracy", "iou_m0", "iou_m1", "iou_m2", "iou_m3"}
    assert {score.n for score in scores.values()} == {11} and {half_width(score) for score in scores.values()} == {0}


@pytest.mark.parametrize("name", NAMES)
def test_noise_scores_chance_within_its_interval(name: str) -> None:
    """A guess that knows nothing of equally frequent classes is right at one pixel in 4; its mIoU is at most p / (2 - p) with p = 1/4."""
    scores = run(name, [shuffled(position) for position in range(40)], chance).scores
    accuracy, miou = scores["accuracy"], scores["miou"]
    # Twice a 95 % half-width is 4 standard errors. Clusters are matched to what they overlap: up to a point above chance.
    assert abs(accuracy.value - 25) < 2 * half_width(accuracy) + (1 if name == "clusters" else 0)
    assert miou.value < 100 / 7 + 2 * half_width(miou) + (1 if name == "clusters" else 0)
    assert 0 < half_width(accuracy) < 1.5 and 0 < half_width(miou) < 1.5


@pytest.mark.parametrize("name", NAMES)
def test_noisy_features_lie_between_and_repeat_exactly(name: str) -> None:
    masks = [scene(position) for position in range(11)]
    first, second = (run(name, masks, mixed) for _ in range(2))
    assert first == second
    assert 40 < first.scores["miou"].value < 100


@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_neither_teach_nor_count(name: str) -> None:
    masks = [scene(position) for position in range(11)]
    clean = [mask.clone() for mask in masks]
    for mask in clean:
        mask[:, 12:14] = -1

    def garbled(items: Tensor) -> EncoderOutput:
        """The truth, but the ignored columns look like class 3."""
        ids = items[:, 0].clone()
        ids[:, :, 12:14] = 3
        patches = functional.one_hot(ids[:, ::PATCH, ::PATCH].flatten(1).long(), 8).float()
        return EncoderOutput(patches.mean(dim=1), patches)

    for mask in clean:  # what lies beside the ignored columns must not be won by their class in the interpolation
        mask[:, 10:12], mask[:, 14:16] = -1, -1
    assert run(name, clean, garbled).scores["accuracy"].value == 100


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_image_truth_and_prediction(name: str, tmp_path: Path) -> None:
    figures = made(name).pictures(encoder(mixed), sources([scene(position) for position in range(11)]))
    assert list(figures) == ["classes"]
    assert len(figures["classes"].axes) == 3 * 6
    assert [text.get_text() for text in figures["classes"].legends[0].get_texts()] == ["m0", "m1", "m2", "m3"]
    figures["classes"].savefig(tmp_path / "classes.png")


def soft_problem() -> tuple[Tensor, Tensor]:
    position = torch.arange(600)
    patches = noise(position, 6, seed=11)
    logits = patches @ torch.sin(torch.arange(6.0 * 3).reshape(6, 3) * 1.7)
    return patches, (logits + noise(position, 3, seed=12)).softmax(dim=-1) * torch.where(position % 5 == 0, 0.5, 1.0)[:, None]


def test_linear_layers_reach_the_optimum_of_scikit_learn() -> None:
    patches, shares = soft_problem()
    strengths = (1e-3, 1e-1)
    heads = fit_heads(patches, shares, learning_rates=(0.05, 0.05), l2=strengths, num_steps=400, patches_per_step=3000)
    for l2, weight, bias in zip(strengths, *heads, strict=True):
        # scikit-learn minimises C * sum of losses + |w|^2 / 2: each patch comes once per class, weighted with its share.
        reference = LogisticRegression(C=1 / (l2 * shares.sum().item()), max_iter=2000, tol=1e-8)
        reference.fit(patches.repeat_interleave(3, 0).numpy(), np.tile(np.arange(3), 600), sample_weight=shares.flatten().numpy())
        expected = reference.predict_proba(patches.numpy())
        found = (patches @ weight + bias).softmax(dim=-1).numpy()
        assert np.abs(found - expected).max() < 0.02  # draws with replacement are not the whole set


def test_candidates_side_by_side_are_those_that_are_fitted_alone() -> None:
    patches, shares = soft_problem()
    together = fit_heads(patches, shares, learning_rates=(0.01, 0.1), l2=(0.0, 1e-2), num_steps=50, patches_per_step=64)
    alone = fit_heads(patches, shares, learning_rates=(0.1,), l2=(1e-2,), num_steps=50, patches_per_step=64)
    torch.testing.assert_close(together.weight[1], alone.weight[0], rtol=1e-5, atol=1e-6)


def test_soft_shares_are_the_loss_of_all_pixels() -> None:
    """One patch of 3 pixels of class 0 and 1 of class 2 weighs as its 4 pixels do."""
    patches = noise(torch.arange(50), 6, seed=13)
    classes = torch.arange(200).reshape(50, 4) * 7 % 3
    shares = functional.one_hot(classes, 3).float().mean(dim=1)
    weight, bias = torch.sin(torch.arange(18.0)).reshape(6, 3), torch.tensor([0.1, -0.2, 0.3])
    of_pixels = functional.cross_entropy((patches @ weight + bias).repeat_interleave(4, 0), classes.flatten())
    of_patches = -(shares * (patches @ weight + bias).log_softmax(-1)).sum() / shares.sum()
    torch.testing.assert_close(of_patches, of_pixels)


def test_a_useless_candidate_is_not_chosen() -> None:
    masks = [scene(position) for position in range(11)]
    result = run("linear", masks, mixed, learning_rates=(1e-9, 0.03), l2=(10.0, 1e-5))
    assert result.chosen == {"learning_rate": 0.03, "l2": 1e-5}


def test_matching_is_the_best_of_all_permutations() -> None:
    counts = (torch.sin(torch.arange(25.0) * 2.3).reshape(5, 5) * 50 + 50).long()
    best = max(permutations(range(5)), key=lambda order: sum(counts[row, column].item() for row, column in enumerate(order)))
    assert tuple(matched(counts).tolist()) == best


def test_more_clusters_than_classes_vote() -> None:
    """Class 0 has two looks: 4 clusters must merge or mix classes, 5 can follow each and vote."""

    def looks(items: Tensor) -> EncoderOutput:
        ids = items[:, 0, ::PATCH, ::PATCH].long()  # [B h w]
        ids = torch.where((ids == 0) & (torch.arange(GRID[0])[:, None] < 6), 5, ids)
        patches = functional.one_hot(ids.flatten(1), 8).float() + 0.05 * chance(items).patches
        return EncoderOutput(patches.mean(dim=1), patches)

    masks = [scene(position) for position in range(11)]
    scores = run("clusters", masks, looks, num_overclusters=5, num_starts=5).scores
    assert scores["accuracy_over"].value == scores["miou_over"].value == 100
    assert scores["miou"].value < 90


def test_a_subset_of_the_patches_finds_the_same_clusters() -> None:
    masks = [scene(position) for position in range(11)]
    assert run("clusters", masks, truth, max_patches=200).scores["miou"].value == 100


def test_attention_over_neighbours_agrees_with_scikit_learn() -> None:
    memory, queries = noise(torch.arange(311), 8, seed=21), noise(torch.arange(53), 8, seed=22)
    values = noise(torch.arange(311), 3, seed=23).softmax(dim=-1)
    for k, temp in ((1, 0.02), (30, 0.1)):
        reference = KNeighborsRegressor(
            n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda distance, temp=temp: np.exp((1 - distance) / temp)
        ).fit(memory.numpy(), values.numpy())
        expected = torch.from_numpy(reference.predict(queries.numpy())).float()
        torch.testing.assert_close(attend(queries, memory, values, k=k, temp=temp), expected, rtol=1e-5, atol=1e-5)


def test_features_are_shared_with_one_another() -> None:
    masks = [scene(position) for position in range(11)]
    items = DecodedItems(with_classes(masks, num_classes=NUM_CLASSES))
    model = encoder(mixed)
    cache = FeatureCache(model)
    for evaluator in (LinearSegmentation(num_steps=5), InContextSegmentation(), ClusterSegmentation()):
        evaluator.run(model, {"masked": items, "masked_train": items}, cache)
    assert cache.num_computed == 1


def test_bad_input_is_named() -> None:
    masks = [scene(position) for position in range(3)]
    plain, source, other = masked(masks), with_classes(masks, num_classes=4), with_classes(masks, num_classes=5)
    with pytest.raises(ValueError, match=r"has no masks of classes \(mask_classes\)"):
        ClusterSegmentation().check({"masked": plain})
    with pytest.raises(ValueError, match=r"masked: mask_classes .*'m4'\]; accepted: those of masked_train"):
        LinearSegmentation().check({"masked_train": source, "masked": other})
    with pytest.raises(ValueError, match=r"learning_rates: \[0\.0\]"):
        LinearSegmentation(learning_rates=(0.0,))
    with pytest.raises(ValueError, match=r"l2: \[-1\]"):
        LinearSegmentation(l2=(-1,))
    with pytest.raises(ValueError, match="num_steps: 0"):
        LinearSegmentation(num_steps=0)
    with pytest.raises(ValueError, match="held_out_ratio: 1"):
        LinearSegmentation(held_out_ratio=1)
    with pytest.raises(ValueError, match="num_overclusters: 4; accepted: more than 4"):
        ClusterSegmentation(num_overclusters=4).check({"masked": source})
    with pytest.raises(ValueError, match="num_starts: 0"):
        ClusterSegmentation(num_starts=0)
    with pytest.raises(ValueError, match="k: 11; accepted: 1 to 10"):
        InContextSegmentation(k=11, memory_size=10)
    with pytest.raises(ValueError, match="temp: 0"):
        InContextSegmentation(temp=0)
    few = DecodedItems(source, max_items=1)
    with pytest.raises(ValueError, match="masked_train: 1 items are too few to choose among"):
        LinearSegmentation().run(encoder(truth), {"masked_train": few, "masked": source})
    nan = encoder(lambda items: EncoderOutput(items.flatten(1)[:, :8], torch.full((len(items), 144, 8), torch.nan)))
    for evaluator in (LinearSegmentation(), ClusterSegmentation(), InContextSegmentation()):
        with pytest.raises(ValueError, match="patch features are not finite"):
            evaluator.run(nan, {"masked_train": source, "masked": source})
    unknown = with_classes([torch.full((SIZE, SIZE), -1)] * 3, num_classes=4)
    with pytest.raises(ValueError, match="k: 30; only 0 patches of masked_train have a class"):
        InContextSegmentation().run(encoder(truth), {"masked_train": unknown, "masked": source})
    with pytest.raises(ValueError, match="no pixel has a class"):
        LinearSegmentation(learning_rates=(0.1,), l2=(0.1,)).run(encoder(truth), {"masked_train": unknown, "masked": source})
    with pytest.raises(ValueError, match="none of the 1 held-out items shows a class"):
        nothing = with_classes([*masks, masks[0], torch.full((SIZE, SIZE), -1)], num_classes=4)
        held_out = [int(held_out_split(5, ratio=0.2, seed=70)[0][0])]
        nothing.items[4], nothing.items[held_out[0]] = nothing.items[held_out[0]], nothing.items[4]
        LinearSegmentation(num_steps=1).run(encoder(truth), {"masked_train": nothing, "masked": source})
    lacking = with_classes(masks, num_classes=4)
    lacking.items[1] = lacking.items[1]._replace(semantic=None)
    with pytest.raises(ValueError, match=r"an item among \[0, 1, 2\] has no mask of classes"):
        ClusterSegmentation().run(encoder(truth), {"masked": lacking})


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"no CamVid in {CAMVID}")
def test_colour_and_place_say_much_about_a_street() -> None:
    lines = (CAMVID / "classes.csv").read_text().splitlines()[1:12]
    names = [line.partition(",")[2] for line in lines]
    train, test = (DecodedItems(MaskedFolder(CAMVID / split, ignore=11, mask_classes=names), max_items=24) for split in ("train", "val"))

    def colour(items: Tensor) -> EncoderOutput:
        means = functional.avg_pool2d(items, 8).flatten(2).transpose(1, 2) / 128 - 1  # [B N 3]
        place = torch.cartesian_prod(torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 12)).expand(len(items), -1, -1)
        patches = torch.cat([means, place, means * place[..., :1], means[..., :2] * place[..., 1:]], dim=-1)[..., :8]
        return EncoderOutput(patches.mean(dim=1), patches)

    model = StubEncoder(colour, size=72, patch=8)
    shared, both = {"features": Features(size=(72, 96))}, {"masked_train": train, "masked": test}
    truth_pixels = torch.cat([batch.semantic.flatten() for batch in test.batches((3, 72, 96), resize="stretch", batch_size=24)])
    shown = truth_pixels[truth_pixels >= 0].bincount(minlength=11)
    majority = 100 * (shown.max() / shown.sum()).item()
    linear = LinearSegmentation(num_steps=200, **shared).run(model, both).scores
    context = InContextSegmentation(**shared).run(model, both).scores
    clusters = ClusterSegmentation(num_starts=1, **shared).run(model, both).scores
    for scores in (linear, context):
        assert scores["accuracy"].value > majority + 15
        assert scores["iou_Road"].value > 50 and scores["iou_Sky"].value > 50
        assert scores["miou"].n == 24
        assert {f"iou_{name}" for name, count in zip(names, shown.tolist(), strict=True) if count} <= set(scores)
    # Clusters are spread over rare classes, which helps the mean over classes more than the accuracy.
    assert linear["accuracy"].value > clusters["accuracy"].value > 2 * 100 / 11
