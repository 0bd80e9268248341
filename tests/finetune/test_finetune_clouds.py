"""Views of clouds, votes, and what a model of clouds reads: which points are taken, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden import noise
from torch import Tensor
from tuned_models import trained

from glpretrain.core.clouds import farthest_points, in_unit_sphere
from glpretrain.data import Episode, Solids, UnreadableItemError
from glpretrain.encoders import PointTransformer
from glpretrain.finetune import (
    Classification,
    CloudTransform,
    CloudViews,
    FineTuned,
    LabelledData,
    Parts,
    PartViews,
    predictions,
    with_num_points,
)
from glpretrain.finetune.base import for_tuning
from glpretrain.finetune.item_transforms import transform_from_json

SMALL = {"num_points": 48, "points_per_token": 6, "group_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "tokens_dim": 8}


def encoder(**changes: object) -> PointTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PointTransformer("point_mae", **{**SMALL, **changes})


def classifier(**settings: object) -> Classification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classification(encoder(), Solids.classes, **{"pool": "cls_max", "head": "mlp", **settings})


def test_a_backbone_without_a_class_token_gets_one_and_keeps_its_weights() -> None:
    before = encoder()
    tuned = for_tuning(before, drop_path=0.1, class_token=True)
    assert tuned.num_prefix_tokens == 1 and tuned.card.arguments["drop_path_rate"] == 0.1
    state, old = tuned.backbone_state(), before.backbone_state()
    assert state.keys() - old.keys() == {"cls_token", "cls_position"} and state["cls_token"].any()
    assert all(torch.equal(state[name], value) for name, value in old.items())
    assert classifier(freeze=True).encoder.num_prefix_tokens == 0  # a frozen one would see a token that it has not learned
    again = for_tuning(tuned, drop_path=0.0, class_token=True)
    assert torch.equal(again.backbone_state()["cls_token"], state["cls_token"])


def test_plain_views_are_farthest_points_and_drawn_ones_are_among_the_candidates() -> None:
    source, views = Solids(2, num_points=96), CloudViews(48, drawn_from=1.5, scale=(1.0, 1.0), translation=0.0, votes=2)
    item = views.read(source, 0)
    sphere = in_unit_sphere(source[0].values)
    plain, label = views.plain(item, card=encoder().card)
    assert torch.equal(plain[0], sphere[farthest_points(sphere[None], count=48)[0]]) and label == source[0].label
    candidates = {tuple(point) for point in sphere[farthest_points(sphere[None], count=72)[0]].tolist()}
    drawn = [{tuple(point) for point in view.tolist()} for view in plain]
    assert all(len(view) == 48 and view <= candidates for view in drawn) and drawn[1] != drawn[2] != drawn[0]
    parts = views.prepare([item, item], keys=torch.tensor([1, 2]), card=encoder().card)
    assert parts["items"].shape == (2, 48, 3) and not torch.equal(parts["items"][0], parts["items"][1])


def test_scale_and_shift_stay_within_their_bounds() -> None:
    source, views = Solids(1, num_points=96), CloudViews(48, drawn_from=1.0)
    item = views.read(source, 0)
    made = views.prepare([item] * 200, keys=torch.arange(200), card=encoder().card)["items"]
    spread = (made.amax(dim=1) - made.amin(dim=1)) / (item.values.amax(dim=0) - item.values.amin(dim=0))  # [200 3]
    assert 2 / 3 <= spread.min() < 0.7 and 1.45 < spread.max() <= 1.5001
    middle = made.mean(dim=1) - spread * item.values.mean(dim=0)
    assert middle.abs().max() <= 0.2001 and middle.abs().max() > 0.19


def test_a_cloud_of_too_few_points_is_repeated() -> None:
    views = CloudViews(48)
    assert views.read(Solids(1, num_points=40), 0).values.shape == (48, 3)
    assert CloudTransform(48)(noise(40, 3, name="few").numpy()).unique(dim=0).shape == (40, 3)


def test_voting_averages_the_logits_of_views() -> None:
    model = classifier().eval()
    views = noise(2, 4, 48, 3, name="views")
    with torch.no_grad():
        one_by_one = torch.stack([model.evaluated_logits(views[:, number]) for number in range(4)], dim=2)
        assert torch.equal(model.evaluated_logits(views), one_by_one)
    logits = noise(5, 15, 4, name="logits")
    outcomes = model.outcomes(logits, torch.arange(5))
    assert outcomes.shape == (5, 4) and torch.equal(outcomes[:, 3], logits[..., 1:].mean(dim=2).argmax(dim=1))
    assert torch.equal(outcomes[:, 1], logits[..., 0].argmax(dim=1))
    assert model.scores(outcomes, None)["voted_accuracy"].value == 100 * (outcomes[:, 3] == torch.arange(5)).float().mean()
    assert "voted_accuracy" not in model.scores(model.outcomes(logits[..., 0], torch.arange(5)), None)


def test_a_model_of_clouds_is_saved_and_reads_files(tmp_path: Path) -> None:
    transform = CloudTransform(48)
    model = FineTuned.of(classifier(), transform=transform, scores={})
    again = FineTuned.load(model.save(tmp_path / "model"))
    clouds = [noise(100, 6, name=f"cloud {number}").numpy() for number in range(2)]
    assert torch.equal(again.predict(clouds), model.predict(torch.stack([transform(cloud) for cloud in clouds])))
    for number, cloud in enumerate(clouds):
        np.save(tmp_path / f"{number}.npy", cloud)
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    found = list(predictions(again, [tmp_path / "0.npy", tmp_path / "broken.npy", tmp_path / "1.npy"]))
    assert torch.equal(torch.stack([found[0].probabilities, found[2].probabilities]), again.predict(clouds))
    assert found[1].probabilities is None and "broken.npy" in found[1].reason
    with pytest.raises(UnreadableItemError, match="not finite"):
        transform(np.full((50, 3), np.nan))
    with pytest.raises(ValueError, match="a model for classification given; accepted: one for segmentation"):
        again.segment(torch.zeros(3, 8, 8, dtype=torch.uint8))


@pytest.mark.slow
def test_the_program_of_torch_export_gives_the_same_logits(tmp_path: Path) -> None:
    model = FineTuned.of(classifier(), transform=CloudTransform(48), scores={})
    assert model.export(tmp_path / "out", format="torch").difference == 0.0


def test_programs_of_clouds_in_onnx_are_refused(tmp_path: Path) -> None:
    model = FineTuned.of(classifier(), transform=CloudTransform(48), scores={})
    with pytest.raises(ValueError, match="format='onnx' given; accepted for a model of clouds: torch"):
        model.export(tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


def test_an_episode_has_its_classes_and_items_again() -> None:
    source = Solids(600, num_points=40)
    one, again, other = (Episode(source, way=3, shot=4, fold=fold, num_queries=5) for fold in (0, 0, 1))
    train, test = one.train_test_split()
    assert [item.label for item in (train[index] for index in range(len(train)))] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(test) == 15 and one.fingerprint() == again.fingerprint() != other.fingerprint()
    assert one.classes == again.classes and len(set(one.classes)) == 3
    place = train.source.fingerprint()  # of the source's own training part
    assert place == source.train_test_split()[0].fingerprint()
    original = train.source[train._indices[4]]
    assert source.classes[original.label] == one.classes[1] and torch.equal(train[4].values, original.values)


@pytest.mark.parametrize("given", [{"way": 1}, {"way": 16}, {"shot": 0}, {"fold": -1}])
def test_an_episode_that_cannot_be_drawn_is_refused(given: dict) -> None:
    with pytest.raises(ValueError, match="Episode: way="):
        Episode(Solids(20, num_points=40), **{"way": 2, "shot": 1, **given})
    with pytest.raises(ValueError, match="Episode: shot=2000 given; solids has fewer readable training items of"):
        Episode(Solids(20, num_points=40), way=2, shot=2000)


def part_model(**settings: object) -> Parts:
    chosen = {"num_categories": 15, "layers": [0, -1], "hidden_dim": 16, "dropout": 0.0, **settings}
    return Parts(encoder(), Solids.mask_classes, **chosen)


def part_views() -> tuple[PartViews, Tensor, Tensor]:
    views, source = PartViews(48), Solids(6, num_points=96)
    parts = views.prepare([views.read(source, index) for index in range(6)], keys=torch.arange(6), card=encoder().card)
    return views, parts["items"], parts["targets"]


def test_points_keep_their_parts_and_their_category() -> None:
    _, items, targets = part_views()
    source = Solids(6, num_points=96)
    for index in range(6):
        cloud = source[index]
        assert (items[index, :, 3] == cloud.label).all() and targets[index, 0] == cloud.label
        assert set(targets[index, 1:].tolist()) <= set(cloud.semantic.tolist())


def iou(called: Tensor, true: Tensor) -> float:
    """1 for a part that is neither there nor called."""
    return float((called & true).sum() / (called | true).sum()) if (called | true).any() else 1.0


def test_parts_are_those_that_the_category_showed_in_training() -> None:
    model = part_model()
    _, _, targets = part_views()
    model.head.update(targets[:, 0], targets[:, 1:])
    logits = noise(6, 15, 48, name="logits")
    found = model.outcomes(logits, targets)
    for row, scores, target in zip(found, logits, targets, strict=True):
        shown = target[1:].unique()  # each cloud is the only one of its category, or they share their parts
        own = model.head.seen[target[0]].nonzero()[:, 0]
        assert set(shown.tolist()) <= set(own.tolist())
        called = own[scores[own].argmax(dim=0)]
        ious = [iou(called == part, target[1:] == part) for part in own]
        assert row[1] == pytest.approx(sum(ious) / len(ious), abs=1e-6)
        assert row[2] == (called == target[1:]).sum() and row[3] == 48
    scores = model.scores(found, None)
    assert scores["instance_miou"].value == pytest.approx(100 * found[:, 1].mean().item(), abs=1e-4)
    of_category = [found[found[:, 0] == number, 1].mean().item() for number in found[:, 0].unique()]
    assert scores["category_miou"].value == pytest.approx(100 * sum(of_category) / len(of_category), abs=1e-4)


def test_the_average_of_the_weights_knows_the_parts_of_categories() -> None:
    model = part_model(ema=0.9)
    _, _, targets = part_views()
    model.student.heads["task"].update(targets[:, 0], targets[:, 1:])
    assert model.ema is not None and not model.head.seen.any()
    model.ema.update(model.student, step=1)
    assert torch.equal(model.head.seen, model.student.heads["task"].seen) and model.head.seen.any()


def test_a_number_of_categories_that_the_data_do_not_have_is_refused() -> None:
    module = LabelledData(Solids(24, num_points=96), PartViews(48), batch_size=4, num_workers=0)
    with pytest.raises(ValueError, match=r"num_categories=4 given, but solids has 15 classes; give --model.init_args.num_categories 15"):
        trained(part_model(num_categories=4), module, steps=1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CloudViews(drawn_from=0.5), "drawn_from=0.5 given"),
        (lambda: CloudViews(scale=(1.5, 1.0)), r"scale=\[1.5, 1.0\] given"),
        (lambda: PartViews(translation=-1.0), "translation=-1.0 given"),
        (lambda: CloudViews(votes=-1), "votes=-1 given"),
        (lambda: classifier(mixup=0.1), "only images are mixed: set it to 0 for points"),
        (lambda: classifier(head="deep"), "head='deep' given; accepted: linear, mlp"),
        (lambda: classifier(dropout=1.0), "dropout=1.0 given"),
        (lambda: part_model(layers=[2]), "layer: 2; accepted: -2 to 1"),
        (lambda: part_model(hidden_dim=2), "hidden_dim=2"),
        (lambda: with_num_points(encoder(), 4), "4 points given; accepted: at least 8"),
        (lambda: transform_from_json({"num_points": 8, "normalise": 1, "has_category": False}), "has a value out of range"),
        (lambda: transform_from_json({"num_points": 8}), "accepted: an object with has_category, normalise, num_points"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_out_of_range_are_refused(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
