"""GPFM: what its experts see and when, which terms there are, and that a run resumes with the same experts only."""

import json
from pathlib import Path

import pytest
import torch
from contract import build, fixed_batch
from shrinking import ROOT, TINY_EXPERT

from glpretrain.cli import main
from glpretrain.core.patches import resize_tokens
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import ViT
from glpretrain.methods import GPFM
from glpretrain.training.teacher import FrozenTeacher

RECIPE = ROOT / "gpfm.yaml"


def small(**changes) -> ViT:
    return ViT("vit_tiny_patch16_224", **({"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3} | changes))


def gpfm(**settings) -> GPFM:
    return GPFM(small(), num_prototypes=16, hidden_dim=16, bottleneck_dim=8, expert_bottleneck_dim=8, **settings)


def test_experts_see_every_global_view_once_unmasked_and_no_local_view(tmp_path: Path) -> None:
    training = build(RECIPE, tmp_path)
    model, batch = training.model, fixed_batch(training)
    assert batch.views["global"].mask.any() and "local" in batch.views
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in model.experts}
    for name, expert in model.experts.items():
        expert.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0]))
        expert.encoder.register_forward_pre_hook(lambda module, args, kwargs: pytest.fail("masked") if kwargs else None, with_kwargs=True)
    model.losses(batch, 0.5)
    assert {name: len(views) for name, views in seen.items()} == {"dino": 1, "contrast": 1}
    assert all(torch.equal(views[0], batch.views["global"].items.flatten(0, 1)) for views in seen.values())


def test_terms_of_experts_compare_masked_students_with_clean_experts(tmp_path: Path) -> None:
    training = build(RECIPE, tmp_path)
    model, batch = training.model, fixed_batch(training)
    terms = model.losses(batch, 0.5)
    views, mask = batch.views["global"].items.flatten(0, 1), batch.views["global"].mask.flatten(0, 1)
    student, expert, head = model.student.encoder(views, mask=mask), model.experts["contrast"], model.expert_heads["contrast"]
    target = expert(views, card=model.encoder.card)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(terms["contrast_cls"].mean(), 1 - cosine(head(student.cls).dense(), target.cls, dim=-1).mean())
    patches, resized = head(student.patches).dense(), resize_tokens(target.patches, grid=expert.grid, new_grid=(6, 6))
    smooth = torch.nn.functional.smooth_l1_loss(patches, resized)
    torch.testing.assert_close(terms["contrast_patch"].mean(), 0.9 * (1 - cosine(patches, resized, dim=-1).mean()) + 0.1 * smooth)


def test_koleo_is_the_sum_over_the_students_masked_global_views(tmp_path: Path) -> None:
    training = build(ROOT / "dinov2.yaml", tmp_path)
    model, batch = training.model, fixed_batch(training)
    group = batch.views["global"]
    views = [model.student.encoder(view, mask=mask).cls for view, mask in zip(group.items, group.mask, strict=True)]
    expected = sum(model.koleo_objective(features=cls) for cls in views)
    torch.testing.assert_close(model.losses(batch, 0.5)["koleo"], expected)


def test_settings_of_koleo_and_of_a_separate_head_arrive() -> None:
    assert gpfm(koleo_among="process").koleo_objective.among == "process" and gpfm().koleo_objective.among == "joint"
    assert gpfm(koleo_among=16).koleo_objective.among == 16
    separate = gpfm(num_patch_prototypes=16, patch_bottleneck_dim=5)
    assert [separate.student.heads[name][1].directions.shape[1] for name in ("cls", "patch")] == [8, 5]
    wide = gpfm(num_patch_prototypes=16, patch_hidden_dim=11)
    assert [wide.student.heads[name][0].mlp[0].out_features for name in ("cls", "patch")] == [16, 11]
    for name in ("patch_bottleneck_dim", "patch_hidden_dim"):
        with pytest.raises(ValueError, match=f"{name}=5 would be ignored: give num_patch_prototypes, or leave it out"):
            gpfm(**{name: 5})


def test_a_plain_last_layer_is_that_of_both_heads_and_its_lengths_learn() -> None:
    model = gpfm(last_layer="linear", num_patch_prototypes=16)
    assert all(model.student.heads[name][1].gain is None for name in ("cls", "patch"))
    with pytest.raises(ValueError, match="train_gain: False would be ignored with last_layer linear"):
        gpfm(last_layer="linear", train_gain=False)
    with pytest.raises(ValueError, match="last_layer: 'plain' given; accepted: weight_norm, linear"):
        gpfm(last_layer="plain")


def test_the_weight_of_local_views_follows_its_schedule(tmp_path: Path) -> None:
    schedule = '{"base": 1.0, "end": 0.0, "warmup": 0.5, "warmup_start": 1.0, "shape": "cosine", "length": 0.25}'
    training = build(ROOT / "dinov2.yaml", tmp_path, "--model.init_args.local_weight", schedule)
    model, batch = training.model, fixed_batch(training)
    alone = batch._replace(views={"global": batch.views["global"]})
    num_local = len(batch.views["local"].items)
    values = {progress: model.losses(batch, progress)["cls"] for progress in (0.5, 0.625, 0.8)}
    # Of the 2 + 2 L pairs, two are of global views, which do not grow when the others vanish.
    torch.testing.assert_close(values[0.8], model.losses(alone, 0.8)["cls"] * 2 / (2 + 2 * num_local))
    torch.testing.assert_close(values[0.625], (values[0.5] + values[0.8]) / 2)
    with pytest.raises(ValueError, match="local_weight: base is -1"):
        gpfm(local_weight=Schedule(-1.0, shape="constant"))


def test_weights_choose_what_is_taken_from_an_expert() -> None:
    experts = {"uni": FrozenTeacher(small()), "conch": FrozenTeacher(small(embed_dim=12))}
    model = gpfm(experts=experts, weights={"cls": 1.0, "patch": 1.0, "koleo": 0.1, "uni_cls": 1.0, "uni_patch": 0.25, "conch_cls": 1.0})
    assert set(model.terms) == {"cls", "patch", "koleo", "uni_cls", "uni_patch", "conch_cls"}
    assert model.expert_heads["conch"][1].directions.shape == (12, 8) and model.expert_heads["uni"][1].gain.requires_grad
    assert gpfm(experts={"uni": experts["uni"]}).weights == {"cls": 1.0, "patch": 1.0, "koleo": 0.1, "uni_cls": 1.0, "uni_patch": 1.0}
    assert gpfm().weights == {"cls": 1.0, "patch": 1.0, "koleo": 0.1}


def test_names_that_do_not_fit_are_refused() -> None:
    expert, base = FrozenTeacher(small()), {"cls": 1.0, "patch": 1.0, "koleo": 0.1}
    with pytest.raises(ValueError, match=r"weights: uni has none; give uni_cls, uni_patch or both"):
        gpfm(experts={"uni": expert}, weights=base)
    with pytest.raises(ValueError, match=r"weights: .*'uni_patches'.* given; GPFM needs one weight for each of .*'uni_cls'"):
        gpfm(experts={"uni": expert}, weights=base | {"uni_cls": 1.0, "uni_patches": 1.0})
    for name in ("u.ni", "keys"):
        with pytest.raises(ValueError, match=rf"experts: '{name}' given; accepted: names of letters"):
            gpfm(experts={name: expert})


def test_a_student_starts_alike_with_and_without_experts(tmp_path: Path) -> None:
    alone = ["--model.init_args.experts", "null", "--model.init_args.weights", "{cls: 1.0, patch: 1.0, koleo: 0.1}"]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    expert = "{e: {class_path: glpretrain.weights.load_expert, init_args: {path: vit_tiny_patch16_224, random_weights: true}}}"
    both = ["--model.init_args.experts", expert, "--model.init_args.weights", "null"]
    states = [build(RECIPE, tmp_path / name, *options).model.student.state_dict() for name, options in (("a", alone), ("b", both))]
    assert states[0].keys() == states[1].keys() and all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_experts_and_their_heads_have_no_moving_copy_and_the_optimizer_holds_the_heads(tmp_path: Path) -> None:
    model = build(RECIPE, tmp_path).model
    assert model.teacher.branch.state_dict().keys() == model.student.state_dict().keys()
    assert not [name for name in model.student.state_dict() if "expert" in name]
    held = {id(parameter) for group in model.configure_optimizers().param_groups for parameter in group["params"]}
    assert all(id(parameter) in held for parameter in model.expert_heads.parameters())
    assert not any(id(parameter) in held for parameter in model.experts.parameters())


@pytest.mark.parametrize(("share", "frozen"), [(1.0, True), (0.0, False)])
def test_freezing_prototypes_freezes_the_experts_last_layers_too(share: float, frozen: bool, tmp_path: Path) -> None:
    training = build(RECIPE, tmp_path, "--model.init_args.optimization.freeze_prototypes", str(share))
    last = training.model.expert_heads["dino"][1].directions
    before = last.detach().clone()
    training.fit()
    assert torch.equal(last, before) is frozen


def test_checkpoints_hold_fingerprints_of_experts_and_resume_with_the_same_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = build(RECIPE, tmp_path)
    run = training.fit()
    path = run.folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    assert not [name for name in checkpoint["state_dict"] if name.startswith("experts.")]
    experts = training.model.experts
    assert checkpoint["experts"] == {f"experts.{name}": experts[name].fingerprint for name in ("dino", "contrast")}

    other = json.loads(json.dumps(TINY_EXPERT))
    other["init_args"]["encoder"]["init_args"]["std"] = [0.3, 0.3, 0.3]
    changed = build(RECIPE, tmp_path, "--model.init_args.experts", json.dumps({"dino": TINY_EXPERT, "contrast": other})).model
    with pytest.raises(
        ValueError, match=r"^checkpoint: its experts.contrast has the weights \w{12}, this run's \w{12}; give the same experts"
    ):
        changed.on_load_checkpoint(checkpoint)
    fewer = {"dino": TINY_EXPERT}
    weights = "{cls: 1.0, patch: 1.0, koleo: 0.1, dino_cls: 1.0}"
    options = ["--model.init_args.experts", json.dumps(fewer), "--model.init_args.weights", weights]
    with pytest.raises(ValueError, match=r"its experts.contrast has the weights \w{12}, this run's none"):
        build(RECIPE, tmp_path, *options).model.on_load_checkpoint(checkpoint)


def test_an_absent_expert_is_one_line_and_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    path = ["--model.init_args.experts.dino.init_args.path", str(tmp_path / "nowhere")]
    assert main(["pretrain", "gpfm", "--runs", str(runs), *path]) != 0
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and f"load_expert: {tmp_path / 'nowhere'} does not exist" in line
    assert not runs.exists()


def test_a_misspelled_setting_of_an_expert_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    expert = "{e: {class_path: glpretrain.weights.load_expert, init_args: {pth: nowhere}}}"
    assert main(["pretrain", "gpfm", "--model.init_args.experts", expert]) != 0
    assert "accepted: path, size, precision, random_weights" in capsys.readouterr().err
