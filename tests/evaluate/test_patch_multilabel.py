"""Classes that appear in a patch: heads, labels and scores are the official ones, truth scores 100, noise chance, scikit-learn agrees."""

import pytest
import torch
from batches import largest_difference
from evaluate_stubs import StubEncoder, noise, position_of, with_classes
from golden import assert_matches, load, official_weights
from golden import noise as golden_noise
from sklearn.metrics import f1_score, recall_score
from torch import Tensor
from torch.nn import functional

from glpretrain.core.types import EncoderOutput
from glpretrain.data import Source
from glpretrain.evaluate import PatchMultilabel, Result
from glpretrain.evaluate.patches.multilabel import PatchTransformer, macro_f1, macro_recall, multilabel_scores, outcomes
from glpretrain.evaluate.patches.segmentation import class_shares

GOLDEN = load("patch_seg")
SIZE, PATCH, NUM_CLASSES = 12, 2, 4
NUM_PATCHES = (SIZE // PATCH) ** 2
FAST = {"num_steps": 200, "images_per_step": 8, "learning_rate": 0.03, "end_learning_rate": 0.003}


# The official code ----------------------------------------------------------------------------------------------------------


def test_the_transformer_head_and_its_gradients_are_those_of_patch_seg() -> None:
    head = PatchTransformer(12, num_patches=16, num_classes=5, num_heads=3)
    names = {name: name.replace("pos_embed", "position") for name in GOLDEN["shapes"]}
    head.load_state_dict({names[name]: value for name, value in official_weights(GOLDEN["shapes"]).items()})
    logits = head(golden_noise(3, 16, 12, name="patches"))
    assert_matches(logits.detach(), GOLDEN["logits"], atol=1e-5)
    labels = (golden_noise(3, 4, 4, 5, name="labels") > 0.2).flatten(1, 2)
    loss = functional.binary_cross_entropy_with_logits(logits, labels.float())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(GOLDEN["loss"], rel=1e-5)
    found = {name: head.get_parameter(ours).grad for name, ours in names.items()}
    assert largest_difference(found, GOLDEN["gradients"], GOLDEN["shapes"]) < 1e-5
    counts = outcomes(logits.sigmoid() > 0.5, labels, known=torch.ones(3, 16, dtype=torch.bool)).sum(dim=0)
    assert float(macro_recall(counts)) == pytest.approx(GOLDEN["macro_recall"], rel=1e-6)
    assert float(macro_f1(counts)) == pytest.approx(GOLDEN["macro_f1"], rel=1e-5)  # they add 1e-6 to a denominator


def test_labels_of_a_patch_are_those_of_patch_seg() -> None:
    """Theirs name pixels without a class 0, and take this label away where a patch shows a class; ours are -1."""
    classes = torch.floor(2.5 * (golden_noise(16, 16, name="map").double() + 1)).long().clamp(max=4) - 1
    found = class_shares(classes.unsqueeze(0), grid=(4, 4), num_classes=4)[0] > 0
    assert found.int().unflatten(0, (4, 4)).tolist() == torch.tensor(GOLDEN["union"])[..., 1:].tolist()


# Truth, chance, and another implementation ------------------------------------------------------------------------------------


def scene(position: int) -> Tensor:
    """Int[12 12]: classes 0 to 3, each in a quarter of the patches; some patches show two."""
    order = torch.argsort(noise(torch.tensor([position]), NUM_PATCHES, seed=7)[0])
    mask = (order % NUM_CLASSES).reshape(6, 6).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    mask[1::4, 1::4] = (mask[1::4, 1::4] + 1) % NUM_CLASSES
    return mask


def patches_of(items: Tensor) -> Tensor:
    """Int[B N 4], the classes of the pixels of each patch."""
    return items[:, 0].long().unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)


def output(patches: Tensor) -> EncoderOutput:
    return EncoderOutput(patches.mean(dim=1), patches)


def truth(items: Tensor) -> EncoderOutput:
    return output(functional.one_hot(patches_of(items), 8).amax(dim=2).float())


def chance(items: Tensor) -> EncoderOutput:
    return output(noise(position_of(items), NUM_PATCHES, 8, seed=5))


def elsewhere(items: Tensor) -> EncoderOutput:
    """What a patch shows stands in the patch at the opposite end of the image."""
    return output(truth(items).patches.flip(1))


def sources(masks: list[Tensor]) -> dict[str, Source]:
    train = with_classes([*masks, *masks, *masks], num_classes=NUM_CLASSES)  # more images than are scored
    train.items = train.items[len(masks) :]
    return {"masked": with_classes(masks, num_classes=NUM_CLASSES), "masked_train": train}


def scored(features, *, masks=None, **settings) -> Result:
    masks = [scene(position) for position in range(12)] if masks is None else masks
    return PatchMultilabel(**{**FAST, **settings}).run(StubEncoder(features, size=SIZE, patch=PATCH), sources(masks))


def test_features_that_know_the_classes_of_a_patch_score_100() -> None:
    scores = scored(truth).scores
    assert set(scores) == {"recall_linear", "recall_transformer", "f1_linear", "f1_transformer"}
    assert scores["recall_linear"].value == scores["f1_linear"].value == 100.0
    assert scores["recall_transformer"].value > 99.0 and scores["recall_linear"].n == 12


def test_patches_without_a_class_teach_nothing() -> None:
    """Most patches are unknown, and have the features of class 0."""
    masks = [scene(position) for position in range(6)]
    for mask in masks:
        mask[:, 2:10] = -1
    assert scored(truth, masks=masks).scores["recall_linear"].value == 100.0


def test_noise_finds_no_class_that_fewer_than_half_of_the_patches_show() -> None:
    assert scored(chance).scores["recall_linear"].value < 5.0


def test_only_the_transformer_finds_what_another_patch_says() -> None:
    scores = scored(elsewhere, num_steps=400, learning_rate=0.01, end_learning_rate=0.001).scores
    assert scores["recall_linear"].value < 40.0 and scores["recall_transformer"].value > scores["recall_linear"].value + 20.0


def test_scores_are_those_of_scikit_learn() -> None:
    predicted, labels = golden_noise(5, 7, 3, name="predicted") > 0, golden_noise(5, 7, 3, name="truth") > 0.3
    known = golden_noise(5, 7, name="known") > -0.6
    labels &= known.unsqueeze(2)
    scores = multilabel_scores(outcomes(predicted, labels, known=known), head="it")
    rows = predicted[known].numpy(), labels[known].numpy()
    assert not known.all()
    assert scores["recall_it"].value == pytest.approx(100 * recall_score(rows[1], rows[0], average="macro"))
    assert scores["f1_it"].value == pytest.approx(100 * f1_score(rows[1], rows[0], average="macro"))


def test_a_class_that_no_patch_shows_is_left_out_of_the_mean() -> None:
    predicted, labels = torch.ones(2, 3, 2, dtype=torch.bool), torch.tensor([True, False]).expand(2, 3, 2)
    counts = outcomes(predicted, labels, known=torch.ones(2, 3, dtype=torch.bool)).sum(dim=0)
    assert float(macro_recall(counts)) == float(macro_f1(counts)) == 1.0


def test_scores_are_the_same_again_and_move_no_random_numbers() -> None:
    encoder, given = StubEncoder(chance, size=SIZE, patch=PATCH), sources([scene(position) for position in range(4)])
    evaluator, before = PatchMultilabel(num_steps=5), torch.get_rng_state()
    first = evaluator.run(encoder, given)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert evaluator.run(encoder, given) == first


def test_heads_see_at_most_so_many_patches() -> None:
    few = scored(truth, max_patches=3 * NUM_PATCHES + 1, num_steps=20)
    assert few.scores.keys() == scored(truth, num_steps=20).scores.keys()
    with torch.no_grad():  # an evaluation in a run has no gradients
        assert scored(truth, max_patches=3 * NUM_PATCHES + 1, num_steps=20) == few


@pytest.mark.parametrize("setting", [{"num_steps": 0}, {"threshold": 1.0}, {"warmup": 1.0}, {"weight_decay": -0.1}, {"depth": 0}])
def test_settings_out_of_range_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError, match=f"PatchMultilabel: {next(iter(setting))}: "):
        PatchMultilabel(**setting)


def test_images_without_a_class_are_refused() -> None:
    with pytest.raises(ValueError, match="no pixel has a class"):
        scored(truth, masks=[torch.full((SIZE, SIZE), -1)] * 4)
