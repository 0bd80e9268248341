"""Which encoder of a checkpoint is loaded, whatever frameworks, wrappers and scripts have put around it."""

from pathlib import Path

import pytest
import torch
from golden import noise
from torch import Tensor

from glpretrain.encoders import ViT
from glpretrain.weights import load_backbone
from glpretrain.weights.report import Which

State = dict[str, Tensor]
BACKBONE = ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3).backbone_state()


def half(number: int, *, prefix: str = "") -> State:
    return {prefix + name: noise(*tensor.shape, name=f"{name} {number}") for name, tensor in BACKBONE.items()}


STUDENT, TEACHER = half(0), half(1)


def both(student: str, teacher: str) -> State:
    return half(0, prefix=student) | half(1, prefix=teacher)


TWO_HALVES: dict[str, dict] = {
    "solo-learn": {"state_dict": both("backbone.", "momentum_backbone.")},
    "timm's training": {"state_dict": STUDENT, "state_dict_ema": TEACHER},
    "DeiT's training": {"model": STUDENT, "model_ema": TEACHER},
    "two keys, teacher first": {"ema_model": TEACHER, "model": STUDENT},
    "ema-pytorch": both("online_model.", "ema_model."),
    "module and module_ema": {"module": STUDENT, "module_ema": TEACHER},
    "MoCo": {"state_dict": both("module.encoder_q.", "module.encoder_k.")},
    "MoCo v3": {"state_dict": both("module.base_encoder.", "module.momentum_encoder.")},
    "encoder and its momentum": {"state_dict": both("encoder.", "momentum_encoder.")},
    "BYOL": {"state_dict": both("online_network.encoder.", "target_network.encoder.")},
    "mmselfsup": {"state_dict": both("online_net.0.", "target_net.0.")},
    "I-JEPA": {"encoder": STUDENT, "target_encoder": half(1, prefix="module."), "predictor": {"norm.bias": torch.ones(1)}},
    "data2vec": {"context_encoder": STUDENT, "target_encoder": TEACHER},
    "lightly": {"state_dict": both("backbone.", "backbone_momentum.")},
    "lightly's DINO": {"state_dict": both("student_backbone.vit.", "teacher_backbone.vit.")},
    "DINOv2's training": {"model": both("student.backbone._fsdp_wrapped_module.", "teacher.backbone.")},
    "key encoder": {"net": both("query_encoder.", "key_encoder.")},
    "BasicSR": {"params": STUDENT, "params_ema": TEACHER},
    "stochastic weight averaging": {"model": STUDENT, "swa_model": half(1, prefix="module.") | {"n_averaged": torch.tensor(3)}},
    "Lightning's averaging": {"state_dict": TEACHER, "current_model_state": STUDENT, "averaging_state": {"n_averaged": torch.ones(1)}},
    "capitals": {"state_dict": both("Net.", "NetEMA.")},
    "DINO": {"student": half(0, prefix="module.backbone."), "teacher": half(1, prefix="backbone."), "dino_loss": {"center": torch.ones(3)}},
}  # fmt: skip


def loaded(folder: Path, content: object, *, which: Which = "teacher") -> State:
    torch.save(content, folder / "file.pth")
    return load_backbone(folder / "file.pth", which=which, num_heads=3).backbone_state()


def assert_same(state: State, expected: State) -> None:
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize("kind", TWO_HALVES)
def test_the_half_that_is_asked_for_is_loaded(kind: str, tmp_path: Path) -> None:
    assert_same(loaded(tmp_path, TWO_HALVES[kind]), TEACHER)
    assert_same(loaded(tmp_path, TWO_HALVES[kind], which="student"), STUDENT)


UNCLEAR: dict[str, tuple[dict, str]] = {
    "two prefixes": ({"state_dict": both("left.", "right.")}, r"state_dict\.left\. and state_dict\.right\."),
    "two keys": ({"model": STUDENT, "net": TEACHER}, r"model\. and net\."),
    "two teachers": ({"teacher": STUDENT, "model_ema": TEACHER}, r"teacher\. and model_ema\."),
    "a student and something else": ({"student": STUDENT, "model": TEACHER}, r"model\. and student\."),
    "mmcv's hook": (
        {"state_dict": half(0, prefix="vit.") | {f"ema_{name.replace('.', '_')}": t for name, t in half(1, prefix="vit.").items()}},
        r"vit\.patch_embed\.proj\.weight and ema_vit_patch_embed_proj_weight",
    ),
    "compiled and not": (half(0) | half(1, prefix="_orig_mod."), r"holds pos_embed twice|holds \S+ twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNCLEAR)
def test_two_halves_that_cannot_be_told_apart_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    content, message = UNCLEAR[kind]
    with pytest.raises(ValueError, match=rf"^load_backbone: \S+file\.pth holds .*{message}") as refusal:
        loaded(tmp_path, content)
    assert "\n" not in str(refusal.value)


def test_a_model_that_lies_in_a_file_twice_is_one_model(tmp_path: Path) -> None:
    assert_same(loaded(tmp_path, {"model": TEACHER, "state_dict": half(1, prefix="net.")}), TEACHER)
    byol = {"state_dict": half(0, prefix="net.") | both("online_encoder.net.", "target_encoder.net.")}
    assert_same(loaded(tmp_path, byol), TEACHER)
    assert_same(loaded(tmp_path, byol, which="student"), STUDENT)


PREFIXES = (
    "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "teacher.backbone.", "student.", "net.", "_forward_module.", "base_model.",
    "module._orig_mod.", "_orig_mod.module.", "model.teacher.backbone.", "learner.module.net.", "trunk.", "visual.", "image_encoder.vit.",
    "_fsdp_wrapped_module.backbone._fsdp_wrapped_module.", "0.", "features.0.", "momentum_encoder.module.base.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_peeled_in_any_dictionary(prefix: str, tmp_path: Path) -> None:
    state = half(1, prefix=prefix) | {"head.weight": torch.zeros(3)}
    for content in (state, {"model": state}, {"epoch": 3, "checkpoint": {"state_dict": state, "optimizer": {"state": {0: {"step": 1}}}}}):
        assert_same(loaded(tmp_path, content), TEACHER)


def test_wrappers_inside_the_encoder_are_taken_out(tmp_path: Path) -> None:
    sharded, checkpointed = "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."
    for wrapper in ("_orig_mod.", sharded, checkpointed, sharded + checkpointed):
        wrapped = {name.replace("blocks.0.", f"blocks.0.{wrapper}").replace("attn.", f"attn.{wrapper}"): t for name, t in TEACHER.items()}
        assert_same(loaded(tmp_path, {"model": wrapped}), TEACHER)


def test_a_state_with_plain_values_beside_the_tensors_is_read(tmp_path: Path) -> None:
    assert_same(loaded(tmp_path, {**TEACHER, "epoch": 3, "arch": "vit"}), TEACHER)


def test_a_half_that_is_not_there_is_named(tmp_path: Path) -> None:
    for content in ({"teacher": TEACHER}, {"state_dict": half(1, prefix="momentum_encoder.")}):
        with pytest.raises(ValueError, match="which='student' given"):
            loaded(tmp_path, content, which="student")
    assert_same(loaded(tmp_path, {"student": STUDENT}), STUDENT)
