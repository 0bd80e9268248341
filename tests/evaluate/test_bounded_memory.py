"""What is computed a part at a time is what is computed at once, and what is remembered of an item does not hold its patches."""

import weakref

import pytest
import torch
from evaluate_stubs import NUM_CLASSES, StubEncoder, labels, masked, noise, noisy, position_of, with_classes
from evaluate_stubs import labelled as items_of
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.core.types import EncoderOutput
from glpretrain.evaluate import (
    KNN,
    ClusterSegmentation,
    DecodedItems,
    Evaluator,
    Features,
    FewShot,
    Health,
    InContextSegmentation,
    LinearProbe,
    LinearSegmentation,
    LinearSweep,
    ObjectDiscovery,
    PromptSegmentation,
    Result,
    Retrieval,
    encoding,
    health,
    probes,
)
from glpretrain.evaluate import items as items_module
from glpretrain.evaluate.cls import knn, linear_sweep, retrieval
from glpretrain.evaluate.encoding import encode_batch
from glpretrain.evaluate.metrics import intervals
from glpretrain.evaluate.patches import in_context, similarity
from glpretrain.evaluate.patches.segmentation import TokenSample, class_shares, taken
from glpretrain.evaluate.probes import held_out_split, standardiser
from glpretrain.evaluate.reading import read_all

SIZE, PATCH = 24, 2
NUM_PATCHES = (SIZE // PATCH) ** 2


def scene(position: int) -> Tensor:
    """Int[24 24]: three classes in rectangles."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.long)
    mask[2 : 12 + 2 * (position % 3), 2:12] = 1
    mask[4:20, 14 : 18 + 2 * (position % 3)] = 2
    return mask


def mixed(items: Tensor) -> EncoderOutput:
    """One-hot of the class of each patch, with noise."""
    truth = functional.one_hot(items[:, 0, ::PATCH, ::PATCH].flatten(1).long(), 8).float()
    patches = truth + 0.4 * noise(position_of(items), NUM_PATCHES, 8, seed=5)
    return EncoderOutput(patches.mean(dim=1), patches)


SCENES = with_classes([scene(position) for position in range(13)], num_classes=3)
MASKED = {"masked": SCENES, "masked_train": SCENES}


def segmented(evaluator: Evaluator) -> Result:
    return evaluator.run(StubEncoder(mixed, size=SIZE, patch=PATCH), MASKED)


def classified(evaluator: Evaluator) -> Result:
    items = items_of(labels(160), num_classes=NUM_CLASSES)
    test = items_of(labels(230), num_classes=NUM_CLASSES)
    test.items = test.items[160:]
    return evaluator.run(StubEncoder(noisy), {"train": items, "test": test})


@pytest.mark.parametrize(
    ("owner", "bound", "evaluator"),
    [
        (knn, "_TABLE_CELLS", KNN()),
        (retrieval, "_TABLE_CELLS", Retrieval()),
        (probes, "_SCORES", LinearProbe(inverse_l2=(0.1, 1.0))),
        (probes, "_SCORES", FewShot(num_draws=2)),
        (probes, "_SCORES", LinearSweep(num_blocks=(1,), num_steps=20)),
    ],
    ids=["knn", "retrieval", "probe", "few shot", "sweep"],
)
def test_scores_of_cls_in_parts_are_those_at_once(owner, bound: str, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = classified(evaluator)
    monkeypatch.setattr(owner, bound, 500)
    assert classified(evaluator) == whole


@pytest.mark.parametrize(
    "evaluator", [LinearSegmentation(num_steps=20), InContextSegmentation(memory_size=999), ClusterSegmentation(num_overclusters=5)]
)
def test_scores_of_masks_in_parts_are_those_at_once(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = segmented(evaluator)
    monkeypatch.setattr(in_context, "_TABLE_CELLS", 3000)
    monkeypatch.setattr(intervals, "_DRAWS", 100)
    found = segmented(evaluator)
    assert found.scores.keys() == whole.scores.keys() and found.chosen == whole.chosen
    for name, score in whole.scores.items():
        assert found.scores[name] == pytest.approx(score, rel=1e-12), name  # sums of float64 in another order


def test_heads_classify_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = linear_sweep.Heads(noise(torch.arange(7), 3, 5, seed=1), noise(torch.arange(3), 5, seed=2))
    features = noise(torch.arange(101), 7, seed=3)
    whole = heads.classes(features)
    assert torch.equal(whole, heads.logits(features).argmax(dim=-1))
    monkeypatch.setattr(probes, "_SCORES", 4 * 3 * 5)
    assert torch.equal(heads.classes(features), whole)


def test_resamples_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = intervals.drawn_counts(37)
    assert whole.shape == (200, 37) and (whole.sum(dim=1) == 37).all()
    monkeypatch.setattr(intervals, "_DRAWS", 37 * 13)
    parts = list(intervals.drawn_counts(37))
    assert len(parts) == 16 and torch.equal(torch.cat(parts), whole)
    assert {len(part) for part in intervals.drawn_counts(37, spread_over=37 * 13)} == {1}


def test_a_draw_in_parts_is_the_draw_at_once() -> None:
    key = torch.tensor([3, 5])
    whole = keys.integers(key, 0, 1000, 7, 11)
    assert torch.equal(torch.cat([keys.integers(key, 0, 1000, 4, 11), keys.integers(key, 0, 1000, 3, 11, first=44)], dim=1), whole)


def test_a_sample_of_tokens_takes_as_many_of_each_item_and_no_more_than_it_may() -> None:
    items = DecodedItems(items_of([0] * 30, num_classes=1))
    index = torch.arange(30)
    for at_most, num_items, of_item in ((30 * 7, 30, 7), (30 * 7 - 1, 30, 6), (65, 30, 2), (30, 30, 1), (29, 29, 1), (4, 4, 1)):
        sample = TokenSample(items, num_tokens=7, at_most=at_most, seed=5)
        places = sample.places(torch.tensor(sample.items.indices))
        assert places.shape == (num_items, of_item) and num_items * of_item <= at_most
        assert all(len(set(row)) == of_item for row in places.tolist()) and set(sample.items.indices) <= set(range(30))
        assert of_item == 7 or num_items < 30 or len({tuple(row) for row in places.tolist()}) > 5  # other ones of each item
        again = TokenSample(items, num_tokens=7, at_most=at_most, seed=5)  # the same, in whatever batches
        assert torch.equal(again.places(index[3:8]), again.places(index)[3:8]) and again.items.indices == sample.items.indices
    tokens = noise(index, 7, 3, seed=4)
    places = TokenSample(items, num_tokens=7, at_most=65, seed=5).places(index)
    assert torch.equal(taken(tokens, places)[11, 1], tokens[11, places[11, 1]])


def test_a_linear_layer_sees_a_sample_and_whole_held_out_images_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 5 patches of each of 13 images, and for one whole image."""
    seen: list[Tensor] = []
    scored: list[Tensor] = []
    fit, evaluator = LinearSegmentation._heads, LinearSegmentation(num_steps=5, max_patches=NUM_PATCHES)
    at_most = NUM_PATCHES // 13
    monkeypatch.setattr(LinearSegmentation, "_heads", lambda self, tokens, *others: (seen.append(tokens), fit(self, tokens, *others))[1])
    fitted = LinearSegmentation.fitted

    def watched(self, *args, rate, **given):
        return fitted(self, *args, rate=lambda layer, queries, truth: (scored.append(queries), rate(layer, queries, truth))[1], **given)

    monkeypatch.setattr(LinearSegmentation, "fitted", watched)
    segmented(evaluator)
    pixels = torch.stack([item.values for item in SCENES.items]).float()
    patches = mixed(pixels).patches  # [B N D]
    places = TokenSample(DecodedItems(SCENES), num_tokens=NUM_PATCHES, at_most=NUM_PATCHES, seed=72).places(torch.arange(13))
    held_out, others = held_out_split(13, ratio=0.2, seed=70)
    sample = taken(patches, places)
    standardised = standardiser(sample)
    assert sample.shape == (13, at_most, 8) and [len(tokens) for tokens in seen] == [len(others), 13]
    torch.testing.assert_close(seen[0], standardised(sample)[others])
    torch.testing.assert_close(seen[1], standardised(sample))
    assert len(scored) == 4 and len(held_out) > 1
    torch.testing.assert_close(scored[0], standardised(patches[held_out[:1]]))


def test_a_memory_that_is_smaller_than_the_images_takes_a_patch_of_some() -> None:
    evaluator = InContextSegmentation(k=2, memory_size=7)
    memory, shares = evaluator._memory(StubEncoder(mixed, size=SIZE, patch=PATCH), DecodedItems(SCENES), (12, 12), None)
    assert memory.shape == (7, 8) and shares.shape == (7, 3)
    every = mixed(torch.stack([item.values for item in SCENES.items]).float()).patches.flatten(0, 1)
    assert torch.cdist(memory, every, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).max() < 1e-6
    assert class_shares(torch.stack([scene(0)]), grid=(12, 12), num_classes=3).shape == (1, NUM_PATCHES, 3)
    assert segmented(evaluator).scores["accuracy"].value > 20


def test_uniformity_of_many_rows_is_that_of_a_fixed_part(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = functional.normalize(noise(torch.arange(500), 5, seed=6), dim=1)
    whole = health.uniformity(rows)
    monkeypatch.setattr(health, "_PAIRED_ROWS", 499)
    part = health.uniformity(rows)
    assert part.n == 499 and part == health.uniformity(rows) and part != whole
    assert part.value == pytest.approx(whole.value, abs=0.05)
    monkeypatch.setattr(health, "_PAIRED_ROWS", 500)
    assert health.uniformity(rows) == whole


def test_pairs_of_many_images_are_fewer_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert similarity.max_pairs(2000) == 2000 and similarity.max_pairs(100_000) == 41 and similarity.max_pairs(10**9) == 1
    whole = segmented(PromptSegmentation())
    monkeypatch.setattr(similarity, "_ALL_PAIRS", 13 * 100)
    seen: list[int] = []
    scored = similarity.pair_scores
    monkeypatch.setattr(
        "glpretrain.evaluate.patches.prompt_segmentation.pair_scores",
        lambda pairs: (seen.extend(len(part) for pair in pairs for part in pair), scored(pairs))[1],
    )
    part = segmented(PromptSegmentation())
    assert set(seen) == {100} and part.scores["miou"] == whole.scores["miou"]
    assert part.scores["auc"].value == pytest.approx(whole.scores["auc"].value, abs=3)


def bytes_kept(*tensors: Tensor) -> int:
    """Bytes that stay in memory as long as these tensors do."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_what_prompts_remember_of_an_object_is_two_curves() -> None:
    evaluator = PromptSegmentation()
    ((objects, _),) = evaluator.measure(StubEncoder(mixed, size=SIZE, patch=PATCH), DecodedItems(masked([scene(0)] * 3)), None)
    for one in objects:
        assert bytes_kept(one.any_patch, one.centre) == 2 * 4 * len(one.centre)


def test_what_health_remembers_of_an_item_is_three_vectors_and_a_curve() -> None:
    moments = Health()._moments(StubEncoder(mixed, size=SIZE, patch=PATCH), DecodedItems(SCENES), None)
    assert bytes_kept(moments.cls, moments.mean_patch, moments.mean_unit, moments.decay) == 13 * 4 * (3 * 8 + 11)


FEW = Features(batch_size=2)


@pytest.mark.parametrize(
    "evaluator",
    [
        KNN(k=(1,), features=FEW),
        Retrieval(features=FEW),
        LinearProbe(inverse_l2=(0.1,), features=FEW),
        LinearSweep(num_blocks=(1,), num_steps=3, features=FEW),
        FewShot(shots=(1,), num_draws=2, features=FEW),
        Health(features=FEW),
        LinearSegmentation(num_steps=3, features=FEW),
        InContextSegmentation(k=2, features=FEW),
        ClusterSegmentation(num_overclusters=5, features=FEW),
        PromptSegmentation(features=FEW),
        ObjectDiscovery(features=FEW),
    ],
    ids=lambda evaluator: type(evaluator).__name__,
)
@pytest.mark.parametrize("num_items", [26, 104])
def test_pictures_masks_and_patches_of_few_batches_are_there_at_a_time(
    evaluator: Evaluator, num_items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever holds a part of a tensor keeps all of it alive."""
    alive: dict[str, list[weakref.ref]] = {"pictures": [], "masks": [], "patches": []}
    most = dict.fromkeys(alive, 0)

    def watched(kind: str, tensor: Tensor) -> Tensor:
        array = tensor.numpy().copy()
        alive[kind] = [other for other in alive[kind] if other() is not None] + [weakref.ref(array)]
        most[kind] = max(most[kind], len(alive[kind]))
        return torch.from_numpy(array)

    def reads(*args, **given):
        for decoded in read_all(*args, **given):
            masks = watched("masks", decoded.semantic)
            yield decoded._replace(values=watched("pictures", decoded.values), instances=masks, semantic=masks)

    def encodes(*args, **given):
        outputs = encode_batch(*args, **given)
        return {layer: output._replace(patches=watched("patches", output.patches)) for layer, output in outputs.items()}

    monkeypatch.setattr(items_module, "read_all", reads)
    monkeypatch.setattr(items_module, "_CACHE_BYTES", 0)
    monkeypatch.setattr(encoding, "encode_batch", encodes)
    source = with_classes([scene(position) for position in range(num_items)], num_classes=3)
    source.items = [item._replace(label=position % 3) for position, item in enumerate(source.items)]
    source._classes = ["a", "b", "c"]
    evaluator.run(StubEncoder(mixed, size=SIZE, patch=PATCH), dict.fromkeys(("train", "test", "masked_train", "masked"), source))
    assert most["pictures"] and max(most.values()) <= 4, most  # those of this batch, and those of the last, which loops still name
