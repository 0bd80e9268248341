"""ASiT: whole runs follow the official loops of both years, ten steps, from views to moved weights; what else it must hold.

The official code ran in float64, ours in float32; see `test_official_runs`.
"""

import pytest
import torch
from batches import Optimized, Recorder, batch_of, fitted, method, teacher_of
from golden import load, noise, official_weights
from test_official_runs import check_centres, check_gradients, check_moved_twice, first_replaced, state_of, warmed_up
from torch import Tensor

from glpretrain.core.batch import Batch
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.methods import ASiT

FRAMES, BINS, PATCH, STEPS = 48, 32, 8, 10
SIZES = {"num_prototypes": 19, "hidden_dim": 14, "bottleneck_dim": 10, "student_temp": 0.15, "centre_momentum": 0.8}
MOVING = {"momentum": Schedule(0.5, 1.0), "teacher_temp": warmed_up(0.04, 0.07)}
NAMES = (
    ("backbone.", "encoder.model."),
    ("head.mlp.", "heads.projection.mlp."),
    ("head.last_layer.weight_g", "heads.cls.gain"),
    ("head.last_layer.weight_v", "heads.cls.directions"),
    ("head_cls.mlp.", "heads.projection.mlp."),
    ("head_cls.cls_layer.weight_g", "heads.cls.gain"),
    ("head_cls.cls_layer.weight_v", "heads.cls.directions"),
    ("head_cls.data_layer.weight_g", "heads.patch.gain"),
    ("head_cls.data_layer.weight_v", "heads.patch.directions"),
)
DECODER = (
    ("head_recons.mlp.", "decoder.layers."),
    ("head_recons.convTrans.weight", "decoder.layers.6.weight"),
    ("head_recons.convTrans.bias", "decoder.bias"),
)
FORMS = {
    2023: {
        "num_patch_prototypes": 13,
        "decoder_dim": 9,
        "decoder_bottleneck_dim": 7,
        "train_gain": False,
        "weights": {"cls": 1.0, "patch": 1.0, "inputs": 2.0},
    },
    2024: {},
}


def encoder() -> ViT:
    sizes = {"img_size": [FRAMES, BINS], "patch_size": PATCH, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return ViT("vit_tiny_patch16_224", **sizes, mean=[-4.3], std=[9.1], position_resize="bicubic", modality="audio")


def views(letter: str, count: int, *, step: int, frames: int = FRAMES) -> Tensor:
    return torch.stack([noise(3, 1, frames, BINS, name=f"{letter}{view}.{step}") for view in range(count)])


def made(step: int, *, num_local: int) -> Batch:
    clean, corruption = views("g", 2, step=step), views("m", 2, step=step)[:, :, 0] > 0.3
    corrupted = torch.where(corruption.unsqueeze(2), views("c", 2, step=step), clean)
    local = views("l", num_local, step=step, frames=16) if num_local else None
    return batch_of(clean, local_views=local, corrupted_views=corrupted, corruption=corruption)


def place_of(name: str, branch: str) -> str | None:
    """Where a tensor of the official student or teacher lies; the teacher has nothing to rebuild with."""
    if name.startswith("head_recons."):
        if branch != "student.":
            return None
        return first_replaced(name, DECODER)
    return branch + first_replaced(name, NAMES)


def as_official(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """A linear layer as a transposed convolution with one output, Float[p*p D] to Float[D p*p]."""
    name = "decoder.layers.6.weight"
    return {**values, name: values[name].T}


def official_run(year: int, **changes: object) -> tuple[ASiT, Recorder, dict, dict[str, Tensor]]:
    """A method with the official weights, and ten steps of it."""
    golden = load(f"asit_model_{year}")
    # In 2023 nothing is frozen, though its option asks for three epochs.
    optimized = Optimized(Schedule(0.004, 0.001), Schedule(0.04, 0.4), clip=1.5, freeze_prototypes=0.3 if year == 2024 else 0.0)
    model = method(ASiT, encoder(), optimized, **{**SIZES, **MOVING, **FORMS[year], **changes})
    state = model.state_dict()
    for prefix, branch in (("student.", "student."), ("teacher.", "teacher.branch.")):
        for name, value in official_weights({prefix + name: shape for name, shape in golden["shapes"].items()}).items():
            place = place_of(name.removeprefix(prefix), branch)
            if place is not None and not place.endswith(".gain"):  # as built: ones
                is_convolution = name.endswith("convTrans.weight")
                state[place] = value.flatten(1).T if is_convolution else value.reshape(state[place].shape)
    model.load_state_dict(state)
    before = state_of(model)
    seen = fitted(model, [made(step, num_local=2 if year == 2024 else 0) for step in range(STEPS)])
    return model, seen, golden, before


def compared(golden: dict, branch: str) -> dict[str, str]:
    """Official names with their places."""
    places = {name: place_of(name, branch) for name in golden["shapes"]}
    return {name: place for name, place in places.items() if place is not None}


@pytest.mark.parametrize("year", sorted(FORMS))
def test_both_forms_follow_the_official_runs_from_views_to_moved_weights(year: int) -> None:
    _, seen, golden, before = official_run(year)
    for step, expected in enumerate(golden["steps"]):
        for name in ("cls", "patch", "inputs", "loss"):
            assert seen.logged[step][f"train/{name}"] == pytest.approx(expected[name], rel=1e-5), (step, name)
    student, teacher = compared(golden, "student."), compared(golden, "teacher.branch.")
    before, seen.states[:], seen.gradients[:] = as_official(before), map(as_official, seen.states), map(as_official, seen.gradients)
    check_gradients(seen, golden, student)
    check_centres(seen, golden, {f"{kind}_objective.centre_state.value": f"{kind}_centre" for kind in ("cls", "patch")})
    check_moved_twice(before, seen, golden, "student_moved", student)
    check_moved_twice(before, seen, golden, "teacher_moved", teacher)


def test_the_official_defects_are_seen_where_they_are_put_right() -> None:
    """2023 with frozen prototypes and 2024 with fixed gains are other runs than the official ones."""
    golden = load("asit_model_2024")
    assert "head.last_layer.weight_g" in golden["steps"][-1]["gradients"], "norm_last_layer=True, and the gain learns"
    assert "head.last_layer.weight_g" not in load("asit_model_2023")["steps"][-1]["gradients"]
    assert golden["steps"][0]["student_moved"]["head.last_layer.weight_v"] == [0.0, 0.0], "frozen in the first epoch"
    assert load("asit_model_2023")["steps"][0]["student_moved"]["head_cls.cls_layer.weight_v"][1] > 0.0, "not frozen"
    _, seen, _, _ = official_run(2024, train_gain=False)
    assert abs(seen.logged[-1]["train/loss"] / golden["steps"][-1]["loss"] - 1.0) > 1e-3


def gradient_of(model: ASiT, batch: Batch, term: str) -> dict[str, float]:
    """Norm of the gradient of a term, by the head that it reaches."""
    model.zero_grad()
    model.losses(batch, 0.5)[term].mean().backward()
    parts = {"decoder": model.decoder, **dict(model.student.heads.items()), "encoder": model.student.encoder}
    return {
        name: float(sum(parameter.grad.square().sum() for parameter in part.parameters() if parameter.grad is not None)) ** 0.5
        for name, part in parts.items()
    }


def test_every_term_reaches_its_head_and_no_other() -> None:
    model = method(ASiT, encoder(), **{**SIZES, **FORMS[2023]}).train()
    batch = made(0, num_local=2)
    reached = {term: {name for name, norm in gradient_of(model, batch, term).items() if norm > 0.0} for term in model.terms}
    assert reached == {
        "cls": {"projection", "cls", "encoder"},
        "patch": {"projection", "patch", "encoder"},
        "inputs": {"decoder", "encoder"},
    }
    assert all(parameter.grad is None for parameter in teacher_of(model).parameters())


def test_the_teacher_sees_clean_views_and_the_student_corrupted_ones() -> None:
    model = method(ASiT, encoder(), **SIZES).train()
    batch = made(0, num_local=2)
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, branch in (("student", model.student), ("teacher", teacher_of(model))):
        encode = branch.encode

        def noting(items: Tensor | list[Tensor], *, name: str = name, encode=encode, **options: object):
            seen[name] += [items] if isinstance(items, Tensor) else items
            return encode(items, **options)

        branch.encode = noting  # type: ignore[method-assign]
    model.losses(batch, 0.5)
    group = batch.views["global"]
    assert torch.equal(seen["teacher"][0], group.items.flatten(0, 1)) and len(seen["teacher"]) == 1
    assert torch.equal(seen["student"][0], group.corrupted.flatten(0, 1))
    assert torch.equal(seen["student"][1], batch.views["local"].items.flatten(0, 1)) and len(seen["student"]) == 2


def test_only_replaced_inputs_are_rebuilt() -> None:
    model = method(ASiT, encoder(), **SIZES).train()
    batch = made(0, num_local=0)
    group = batch.views["global"]
    elsewhere = torch.where(group.corruption.unsqueeze(2), group.items, group.items + 1.0)
    moved = batch._replace(views={"global": group._replace(items=elsewhere)})
    torch.testing.assert_close(model.losses(moved, 0.5)["inputs"], model.losses(batch, 0.5)["inputs"])
    replaced = torch.where(group.corruption.unsqueeze(2), group.items + 1.0, group.items)
    moved = batch._replace(views={"global": group._replace(items=replaced)})
    assert (model.losses(moved, 0.5)["inputs"] - model.losses(batch, 0.5)["inputs"]).abs().min() > 1e-3


def test_an_encoder_without_a_grid_is_refused() -> None:
    points = PointTransformer("pos_bert_base", num_points=40, points_per_token=4, group_size=4, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="ASiT: rebuilds patches of two axes, the encoder is for points"):
        ASiT(points)
