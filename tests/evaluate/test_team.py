"""Two processes that encode together give what one gives, to the last bit, and neither waits for ever for the other."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from evaluate_stubs import TableSource, labelled
from processes import Ended, together

from glpretrain.core.types import EncoderOutput
from glpretrain.data import Scenes
from glpretrain.encoders import ViT
from glpretrain.evaluate import (
    KNN,
    ClusterSegmentation,
    DecodedItems,
    Evaluator,
    FeatureCache,
    Features,
    Health,
    InContextSegmentation,
    LinearSweep,
    PromptSegmentation,
    Retrieval,
    Sources,
)
from glpretrain.evaluate import encoding as encoding_module
from glpretrain.evaluate.encoding import shared_encoding

FEW = Features(batch_size=7)
EVALUATORS: dict[str, Evaluator] = {
    "knn": KNN(features=FEW),
    "again": KNN(k=(1,), features=FEW),
    "sweep": LinearSweep(num_blocks=(1, 2), num_steps=3, features=FEW),
    "retrieval": Retrieval(features=FEW),
    "health": Health(features=FEW),
    "clusters": ClusterSegmentation(num_starts=1, features=FEW),
    "memory smaller than the images": InContextSegmentation(k=2, memory_size=9, features=FEW),
    "prompts": PromptSegmentation(min_patches=1, features=FEW),
}


def encoder() -> ViT:
    made = ViT("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3).eval()
    for number, parameter in enumerate(made.parameters()):
        parameter.data = torch.sin(torch.arange(parameter.numel()) * 1.7 + number).reshape(parameter.shape) * 0.3
    return made


def given() -> Sources:
    """Of one role only a part, and of another one the last batches cannot be read."""
    damaged = labelled([position % 3 for position in range(40)], num_classes=3, size=16)
    damaged.unreadable = {2, *range(28, 40)}
    test = labelled([position % 4 for position in range(30)], num_classes=4, size=16)
    test._classes = ["c1", "c0", "c2", "c3"]  # in another order
    scenes = Scenes(23, size=16)
    return Sources({"train": DecodedItems(damaged), "test": DecodedItems(test, max_items=25), "masked": scenes, "masked_train": scenes})


def scored(cache: FeatureCache, sources: Sources) -> dict[str, tuple]:
    found = {name: evaluator.run(cache.encoder, sources, cache) for name, evaluator in EVALUATORS.items()}
    return {name: (result.scores, result.chosen, dict(result.left_out)) for name, result in found.items()}


def team_of_two(folder: Path, first: Callable[[FeatureCache, Sources], object], sources: Callable[[int], Sources]) -> list[Ended]:
    """What `first` returns in the first process, and how many batches each of two processes has encoded."""

    def run(rank: int) -> tuple[object, int]:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
        model, own, passes = encoder(), sources(rank), []
        model.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
        value: object = None
        for number in range(2):
            with shared_encoding(f"evaluation {number}", model, own) as team:
                assert (team is None) == (rank > 0)
                if team is not None:
                    value = first(FeatureCache(model, team=team), own)
        dist.barrier()
        return value, len(passes)

    return together(run, count=2)


def test_two_processes_give_the_scores_of_one_and_encode_half_each(tmp_path: Path) -> None:
    model, passes = encoder(), []
    model.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    expected = scored(FeatureCache(model), given())
    first, second = team_of_two(tmp_path, scored, lambda rank: given())
    assert (first.error, second.error) == ("", "")
    found, num_first = first.value
    assert found == expected
    _, num_second = second.value
    assert num_first + num_second == 2 * len(passes)  # of two evaluations
    assert abs(num_first - num_second) < 0.3 * len(passes)


def test_features_of_two_processes_come_in_order(tmp_path: Path) -> None:
    def features(cache: FeatureCache, sources: Sources) -> list[list]:
        found = FEW.labelled(cache.encoder, sources["train"], cache)
        return [found.cls.tolist(), found.labels.tolist(), found.index.tolist()]

    expected = features(FeatureCache(encoder()), given())
    first, second = team_of_two(tmp_path, features, lambda rank: given())
    assert not second.error and first.value[0] == expected


def test_what_stops_half_way_stops_in_both(tmp_path: Path) -> None:
    def some(cache: FeatureCache, sources: Sources) -> int:
        for batch, _ in FEW.encode(cache.encoder, sources["masked"], resize="crop", cache=cache):
            return len(batch.index)
        raise AssertionError

    first, second = team_of_two(tmp_path, some, lambda rank: given())
    assert (first.error, second.error) == ("", "") and first.value[0] == 7


def test_what_the_other_process_cannot_do_is_said_by_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(cache: FeatureCache, sources: Sources) -> set[str]:
        return set(KNN(features=FEW).attempt(cache.encoder, sources, cache).left_out.values())

    def other(rank: int) -> Sources:
        source = labelled([0, 1] * (10 + rank), num_classes=2, size=16)
        return Sources({"train": source, "test": source})

    first, second = team_of_two(tmp_path, attempt, other)
    reason = "process 1: train: 22 items in process 1, 20 in the first; give all the same data"
    assert (first.error, second.error) == ("", "") and first.value[0] == {reason}

    def no_memory(items: torch.Tensor) -> EncoderOutput:
        raise RuntimeError("out of memory")

    encode = encoding_module.encode_batch
    monkeypatch.setattr(
        encoding_module, "encode_batch", lambda *args, **given: no_memory(args[1]) if dist.get_rank() else encode(*args, **given)
    )
    (tmp_path / "again").mkdir()
    first, second = team_of_two(tmp_path / "again", attempt, lambda rank: given())
    assert (first.error, second.error) == ("", "") and first.value[0] == {"process 1: out of memory"}


def test_a_process_is_a_few_batches_ahead_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = encoding_module.encode_batch

    def counted(*args, **options) -> dict[int, EncoderOutput]:
        if dist.get_rank():
            dist.distributed_c10d._get_default_store().add("encoded", 1)
        return encode(*args, **options)

    def slow(cache: FeatureCache, sources: Sources) -> list[int]:
        found = []
        for number, _ in enumerate(FEW.encode(cache.encoder, sources["train"], resize="crop", cache=cache)):
            if number == 3:  # the second one of the other process has come
                time.sleep(1.0)
                found.append(dist.distributed_c10d._get_default_store().add("encoded", 0))
        return [*found, number]

    monkeypatch.setattr(encoding_module, "encode_batch", counted)
    source = TableSource(labelled([0] * 210, num_classes=1, size=16).items, classes=["c0"])
    first, second = team_of_two(tmp_path, slow, lambda rank: Sources({"train": source}))
    assert (first.error, second.error) == ("", "")
    encoded, last = first.value[0]
    assert last == 29 and encoded - 15 == 2 + 4 + 1  # of two evaluations: taken, left to be taken, and waiting to be left
