"""Gram anchoring in methods: what is compared with what, when, and the contract of methods with it."""

from pathlib import Path

import pytest
import torch
from contract import (
    build,
    check_accumulation,
    check_gradients,
    check_items,
    check_overfits,
    check_resume,
    check_terms,
    fixed_batch,
    terms_of,
)
from golden import noise
from shrinking import ROOT
from test_host_waits import Waits
from torch import Tensor

from glpretrain.core.clouds import take
from glpretrain.core.patches import resize_tokens
from glpretrain.encoders import Encoder, PointTransformer, ViT
from glpretrain.methods import DINO, Mugs
from glpretrain.objectives import GramDistance
from glpretrain.training.anchor import Gram, Snapshot
from glpretrain.training.teacher import FrozenTeacher

METHODS = ("dino", "ibot", "dinov2", "mmc")
ON = '{"snapshot_at": 0.3, "start": 0.4, "ramp": 0.05}'
every_method = pytest.mark.parametrize("name", METHODS)


def with_gram(name: str, folder: Path, settings: str = ON):
    """The training of a recipe with Gram anchoring, its batch, and a teacher that is not the student."""
    training = build(ROOT / f"{name}.yaml", folder, "--model.init_args.gram", settings)
    for key, parameter in training.model.teacher.named_parameters():
        parameter.data += 0.05 * noise(*parameter.shape, name=key)
    return training.model, fixed_batch(training)


def clean_views(batch) -> Tensor:
    return batch.views["global"].items.flatten(0, 1)


def student_patches(name: str, model, batch) -> Tensor:
    """Float[(G B) N D], as each method encodes its global views."""
    group = batch.views["global"]
    options = {
        "dino": lambda: {},
        "ibot": lambda: {"mask": group.mask.flatten(0, 1)},
        "dinov2": lambda: {"mask": group.mask.flatten(0, 1)},
        "mmc": lambda: {"keep": group.visible_tokens()},
    }[name]()
    return model.student.encode(clean_views(batch), keys=group.keys, **options).patches


@every_method
def test_the_contract_of_a_method_holds_with_it(name: str, tmp_path: Path) -> None:
    model, batch = with_gram(name, tmp_path)
    check_terms(model, batch)
    check_gradients(model, batch)
    check_items(model, batch)
    check_overfits(model, batch)


@pytest.mark.parametrize("name", ["dino", pytest.param("ibot", marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_with_the_same_losses(name: str, tmp_path: Path) -> None:
    """Of four steps, the snapshot is from before the cut, the refresh and half of the term's steps from after it."""
    settings = '{"snapshot_at": 0.25, "refresh_at": [0.75], "start": 0.25, "ramp": 0.25}'
    check_resume(ROOT / f"{name}.yaml", tmp_path, "--model.init_args.gram", settings)


def test_two_micro_batches_are_one_step_and_one_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, begin = [], Snapshot.begin

    def noting(snapshot: Snapshot, progress: float, **backbone: Encoder) -> None:
        before = snapshot.taken
        begin(snapshot, progress, **backbone)
        taken.append((progress, snapshot.taken - before))

    monkeypatch.setattr(Snapshot, "begin", noting)
    check_accumulation(ROOT / "dino.yaml", tmp_path, monkeypatch, "--model.init_args.gram", ON)
    assert taken == [(0.0, 0), (0.0, 0), (0.5, 1), (0.5, 0)]


@every_method
def test_students_are_compared_with_the_teacher_of_the_share(name: str, tmp_path: Path) -> None:
    model, batch = with_gram(name, tmp_path)
    model.begin_step(0.35)
    with torch.no_grad():
        targets = model.teacher_branch.encode(clean_views(batch)).patches
        for parameter in model.teacher.parameters():
            parameter.mul_(0.5)  # what the snapshot must not see
    group = batch.views["global"]
    if name == "mmc":
        targets = take(targets, group.visible_tokens())
    found = terms_of(model, batch)["gram"]
    expected = GramDistance()(tokens=student_patches(name, model, batch), targets=targets).unflatten(0, group.items.shape[:2]).mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert found.min() > 1e-4


@every_method
def test_the_moving_teacher_as_an_anchor_costs_no_forward_pass(name: str, tmp_path: Path) -> None:
    model, batch = with_gram(name, tmp_path, '{"source": "ema", "start": 0.4, "ramp": 0.05}')
    with torch.no_grad():
        targets = model.teacher_branch.encode(clean_views(batch)).patches
    calls = []
    model.teacher_branch.encoder.register_forward_hook(lambda *args: calls.append(1))
    found, group = terms_of(model, batch)["gram"], batch.views["global"]
    if name == "mmc":
        targets = take(targets, group.visible_tokens())
    expected = GramDistance()(tokens=student_patches(name, model, batch), targets=targets).unflatten(0, group.items.shape[:2]).mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert len(calls) == 1 and model.anchor.snapshot is None


def test_before_its_start_there_is_no_term_and_no_forward_pass(tmp_path: Path) -> None:
    model, batch = with_gram("dino", tmp_path)
    calls, wanted = [], []
    model.anchor.snapshot.encoder.register_forward_hook(lambda *args: calls.append(1))
    model.student.encoder.register_forward_hook(lambda module, args, kwargs, output: wanted.append(kwargs["cls_only"]), with_kwargs=True)
    assert terms_of(model, batch, progress=0.39).keys() == model.weights_at(0.39).keys() == {"cls"}
    assert terms_of(model, batch, progress=0.4).keys() == model.weights_at(0.4).keys() == {"cls", "gram"}
    assert len(calls) == 1 and wanted == [True, [False, True]]  # DINO needs no patches of its own


@pytest.mark.parametrize("tokens", ["all", "masked", "unmasked"])
def test_a_batch_is_compared_as_one_set(tokens: str, tmp_path: Path) -> None:
    settings = ON[:-1] + f', "level": "batch", "tokens": "{tokens}", "negatives": "remove"}}'
    model, batch = with_gram("ibot", tmp_path, settings)
    found = terms_of(model, batch)["gram"]
    mask = batch.views["global"].mask.flatten()
    chosen = {"all": torch.ones_like(mask), "masked": mask, "unmasked": ~mask}[tokens]
    with torch.no_grad():
        targets = model.teacher_branch.encode(clean_views(batch)).patches.flatten(0, 1)[chosen]
        own = student_patches("ibot", model, batch).flatten(0, 1)[chosen]
    expected = GramDistance(negatives="remove")(tokens=own.unsqueeze(0), targets=targets.unsqueeze(0))
    torch.testing.assert_close(found, expected.squeeze(0), rtol=1e-4, atol=1e-7)
    assert found.shape == () and "gram" in model.micro_batch_terms


def test_an_anchor_from_a_file_sees_its_own_size_and_is_resized(tmp_path: Path) -> None:
    model, batch = with_gram("dino", tmp_path)
    encoder = ViT("vit_tiny_patch16_224", img_size=48, patch_size=4, embed_dim=36, depth=1, num_heads=3, mean=[0.5, 0.4, 0.3])
    small = ViT("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    tiny = {"num_prototypes": 7, "hidden_dim": 8, "bottleneck_dim": 4}
    model = DINO(small, **tiny, gram=Gram(source=FrozenTeacher(encoder), start=0.0, ramp=0.0))
    found = terms_of(model, batch)["gram"]
    with torch.no_grad():
        large = model.anchor.expert(clean_views(batch), card=small.card).patches  # 12 x 12 tokens for 6 x 6
        targets = resize_tokens(large, grid=(12, 12), new_grid=(6, 6))
    expected = GramDistance()(tokens=student_patches("dino", model, batch), targets=targets).unflatten(0, (2, -1)).mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert not any(name.startswith("anchor.expert") for name in model.state_dict())


def test_clean_views_of_twice_the_size_are_encoded_and_resized(tmp_path: Path) -> None:
    settings = ON[:-1] + ', "views": "clean"}'
    training = build(ROOT / "dino.yaml", tmp_path, "--model.init_args.gram", settings, "--data.views.init_args.clean_size", "96")
    training.fit()  # data and method fit
    model, batch = training.model, fixed_batch(training)
    clean = batch.views["clean"].items.flatten(0, 1)
    assert clean.shape[2:] == (96, 96) and model.anchor.snapshot.taken == 1
    found = terms_of(model, batch)["gram"]
    with torch.no_grad():
        targets = resize_tokens(model.anchor.snapshot(clean).patches, grid=(12, 12), new_grid=(6, 6))
        own = student_patches("dino", model, batch)
    torch.testing.assert_close(found, GramDistance()(tokens=own, targets=targets).unflatten(0, (2, -1)).mean(dim=0), rtol=1e-4, atol=1e-7)


def test_clean_views_and_an_anchor_that_sees_them_come_together(tmp_path: Path) -> None:
    clean, sees = ("--data.views.init_args.clean_size", "96"), ("--model.init_args.gram", ON[:-1] + ', "views": "clean"}')
    with pytest.raises(ValueError, match=r"DINO does not use data\.views\.clean_size: leave it out"):
        build(ROOT / "dino.yaml", tmp_path, "--model.init_args.gram", ON, *clean).fit()
    with pytest.raises(ValueError, match=r"DINO needs data\.views\.clean_size: set it, for example to 448"):
        build(ROOT / "dino.yaml", tmp_path, *sees).fit()


def test_a_snapshot_at_the_start_is_the_backbone_that_a_run_starts_from(tmp_path: Path) -> None:
    model, batch = with_gram("dino", tmp_path, '{"snapshot_at": 0.0, "start": 0.0, "ramp": 0.0}')
    other = build(ROOT / "dino.yaml", tmp_path, "--seed_everything", "1").model.encoder
    model.init_from(other)
    assert terms_of(model, batch, progress=0.0)["gram"].max() < 1e-6
    assert torch.equal(model.anchor.snapshot(clean_views(batch)).patches, other.eval()(clean_views(batch)).patches)


def test_the_host_waits_for_no_device(tmp_path: Path) -> None:
    settings = ON[:-1] + ', "level": "batch", "tokens": "unmasked"}'
    model, batch = with_gram("ibot", tmp_path, settings)
    terms_of(model, batch)
    with Waits() as waits:
        total = model.total(model.averaged(terms_of(model, batch), batch), 0.5)
        total.backward()
    assert not +waits.found


def test_an_anchor_of_other_items_is_refused_before_the_first_step() -> None:
    student, grey = (
        ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=count, embed_dim=12, depth=1, num_heads=3) for count in (3, 1)
    )
    with pytest.raises(ValueError, match="gram: source has 1 channels, the student's items 3; make them equal"):
        DINO(student, num_prototypes=7, gram=Gram(source=FrozenTeacher(grey)))
    cloud = PointTransformer("point_mae", num_points=48, embed_dim=24, depth=1, num_heads=3, tokens_dim=8, points_per_token=6, group_size=8)
    with pytest.raises(ValueError, match="gram: source takes items of kind points, the student image"):
        DINO(student, num_prototypes=7, gram=Gram(source=FrozenTeacher(cloud)))


def test_methods_that_cannot_be_anchored_refuse_it_by_name() -> None:
    def encoder() -> ViT:
        return ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3)

    with pytest.raises(ValueError, match="gram: tokens=masked given; DINO accepts all"):
        DINO(encoder(), num_prototypes=7, gram=Gram(level="batch", tokens="masked"))
    with pytest.raises(ValueError, match="gram: Mugs does not support Gram anchoring; leave gram out"):
        Mugs(encoder(), gram=Gram())
