"""Whole runs follow the official loops, from the views to the moved weights: DINO, iBOT and MAE ten steps, POS-BERT and Point-MAE four.

Their options are those of the recipes in recipes/paper, but for the rate of dropped paths, which is 0, and the sizes.

The official code ran in float64. Ours runs in float32, so what is compared agrees to about 1e-5 in losses and gradients; AdamW divides
gradients by their own size, so in what moved a small gradient counts as much as a large one and rounding shows more.
"""

import pytest
import torch
from batches import Optimized, Recorder, batch_of, fitted, largest_difference, method, views_of
from golden import load, noise, official_weights
from torch import Tensor

from glpretrain.core.batch import Batch
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import Encoder, PointTransformer, ViT
from glpretrain.methods import DCGLR, DINO, IBOT, MAE, PointMAE
from glpretrain.methods.base import Method

STEPS = 10
DISTILLED = {"num_prototypes": 19, "hidden_dim": 14, "bottleneck_dim": 10, "student_temp": 0.15, "centre_momentum": 0.8}


def encoder(**changes: str) -> Encoder:
    return ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, position_resize="dino", **changes)


def warmed_up(start: float, base: float) -> Schedule:
    """The official warm-up over six epochs of ten: their first step has the first value, and the sixth the last."""
    return Schedule(base, warmup=0.5, warmup_start=start, shape="constant")


def first_replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """With its start replaced by the first entry that fits."""
    theirs, ours = next(pair for pair in table if name.startswith(pair[0]))
    return ours + name.removeprefix(theirs)


def head_name(name: str, head: str) -> str:
    """Where a tensor of the official student or teacher lies in a branch of ours."""
    table = (
        ("backbone.masked_embed", "encoder.mask_token"),
        ("backbone.", "encoder.model."),
        ("head.mlp.", f"heads.{head}.0.mlp."),
        ("head.last_layer.weight_g", f"heads.{head}.1.gain"),
        ("head.last_layer.weight_v", f"heads.{head}.1.directions"),
    )
    return first_replaced(name, table)


def load_official(model: Method, shapes: dict[str, list[int]], *, head: str) -> None:
    """Student and teacher get weights by formula."""
    state = model.state_dict()
    for prefix, ours in (("student.", "student."), ("teacher.", "teacher.branch.")):
        for name, value in official_weights({prefix + name: shape for name, shape in shapes.items()}).items():
            place = ours + head_name(name.removeprefix(prefix), head)
            if not (head == "shared" and place.endswith(".gain")):  # as built: ones
                state[place] = value.reshape(state[place].shape)
    model.load_state_dict(state)


def renamed(values: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {official: values[ours] for official, ours in names.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: after[name] - value for name, value in before.items()}


def state_of(model: Method) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_gradients(seen: Recorder, golden: dict, names: dict[str, str], *, most: float = 3e-5) -> None:
    for step in (0, len(golden["steps"]) - 1):
        expected = {name: values for name, values in golden["steps"][step]["gradients"].items() if name in names}
        found = renamed(seen.gradients[step], {name: names[name] for name in expected})
        assert largest_difference(found, expected, golden["shapes"]) < most, step


def check_terms(seen: Recorder, golden: dict, terms: dict[str, str]) -> None:
    for step, expected in enumerate(golden["steps"]):
        for ours, theirs in terms.items():
            assert seen.logged[step][f"train/{ours}"] == pytest.approx(expected[theirs], rel=1e-5), (step, ours)
        assert seen.logged[step]["train/loss"] == pytest.approx(sum(expected[name] for name in terms.values()), rel=1e-5), step


def check_centres(seen: Recorder, golden: dict, centres: dict[str, str]) -> None:
    for step, expected in enumerate(golden["steps"]):
        for ours, theirs in centres.items():
            torch.testing.assert_close(seen.states[step][ours], torch.tensor(expected[theirs]), rtol=1e-4, atol=1e-5, msg=f"{step} {ours}")


def check_moved(
    before: dict[str, Tensor], after: dict[str, Tensor], expected: dict, names: dict[str, str], golden: dict, *, most: float = 3e-4
) -> None:
    """Without the biases of queries, keys and values: those of keys change nothing, so that rounding alone decides where they go."""
    expected = {name: values for name, values in expected.items() if name in names and not name.endswith("attn.qkv.bias")}
    found = renamed(moved(before, after), {name: names[name] for name in expected})
    assert largest_difference(found, expected, golden["shapes"]) < most


def check_moved_twice(before: dict[str, Tensor], seen: Recorder, golden: dict, key: str, names: dict[str, str]) -> None:
    """After the first step that moves anything (MAE's warm-up begins at a rate of 0), and after the last."""
    noted = [step for step, values in enumerate(golden["steps"]) if key in values]
    assert len(noted) == 2 and noted[-1] == STEPS - 1
    for step in noted:
        check_moved(before, seen.states[step], golden["steps"][step][key], names, golden)


def test_dino_follows_the_official_run_from_views_to_moved_weights() -> None:
    golden = load("dino_model")
    optimized = Optimized(Schedule(0.004, 0.001), Schedule(0.2, 0.6), clip=1.5, freeze_prototypes=0.3)
    moving = {"momentum": Schedule(0.5, 1.0), "teacher_temp": warmed_up(0.04, 0.07)}
    model = method(DINO, encoder(), optimized, train_gain=True, **DISTILLED, **moving)
    load_official(model, golden["shapes"], head="cls")
    before = state_of(model)

    def made(step: int) -> Batch:
        return batch_of(global_views=views_of("g", 2, step=step), local_views=views_of("l", 3, step=step, size=16))

    seen = fitted(model, [made(step) for step in range(STEPS)])
    student = {name: f"student.{head_name(name, 'cls')}" for name in golden["shapes"]}
    teacher = {name: f"teacher.branch.{head_name(name, 'cls')}" for name in golden["shapes"]}
    check_terms(seen, golden, {"cls": "loss"})
    check_gradients(seen, golden, student)
    check_centres(seen, golden, {"cls_objective.centre_state.value": "centre"})
    check_moved_twice(before, seen, golden, "student_moved", student)
    check_moved_twice(before, seen, golden, "teacher_moved", teacher)


def hidden(step: int) -> Tensor:
    mask = torch.stack([noise(3, 4, 4, name=f"m{view}.{step}") > 0.3 for view in range(2)]).flatten(2)  # [G B N]
    mask[0, 1] = False
    return mask


def test_ibot_follows_the_official_run_from_views_to_moved_weights() -> None:
    golden = load("ibot_model")
    optimized = Optimized(Schedule(0.004, 0.001), Schedule(0.04, 0.4), clip=1.5, freeze_prototypes=0.3, mask_token="embedding")
    temps = {"cls_teacher_temp": warmed_up(0.04, 0.07), "patch_teacher_temp": warmed_up(0.05, 0.09)}
    model = method(IBOT, encoder(), optimized, **DISTILLED, **temps, momentum=Schedule(0.5, 1.0))
    load_official(model, golden["shapes"], head="shared")
    before = state_of(model)

    def made(step: int) -> Batch:
        return batch_of(global_views=views_of("g", 2, step=step), local_views=views_of("l", 2, step=step, size=16), mask=hidden(step))

    seen = fitted(model, [made(step) for step in range(STEPS)])
    student = {name: f"student.{head_name(name, 'shared')}" for name in golden["shapes"]}
    teacher = {name: f"teacher.branch.{head_name(name, 'shared')}" for name in golden["shapes"]}
    check_terms(seen, golden, {"cls": "cls", "patch": "patch"})
    check_gradients(seen, golden, student)
    check_centres(seen, golden, {"cls_objective.centre_state.value": "cls_centre", "patch_objective.centre_state.value": "patch_centre"})
    check_moved_twice(before, seen, golden, "student_moved", student)
    check_moved_twice(before, seen, golden, "teacher_moved", teacher)


MAE_NAMES = (
    ("mask_token", "student.heads.decoder.mask_token"),
    ("decoder_blocks.", "student.heads.decoder.blocks."),
    ("decoder_embed.", "student.heads.decoder.embed."),
    ("decoder_norm.", "student.heads.decoder.norm."),
    ("decoder_pred.", "student.heads.decoder.predict."),
    ("", "student.encoder.model."),
)
BLOCK_NAMES = (
    ("attn.qkv.weight", "self_attn.in_proj_weight"),
    ("attn.qkv.bias", "self_attn.in_proj_bias"),
    ("attn.proj.", "self_attn.out_proj."),
    ("mlp.fc1.", "linear1."),
    ("mlp.fc2.", "linear2."),
)


def mae_name(name: str) -> str:
    place = first_replaced(name, MAE_NAMES)
    for theirs, ours in BLOCK_NAMES if "decoder.blocks" in place else ():
        place = place.replace(theirs, ours)
    return place


def test_mae_follows_the_official_run_from_views_to_moved_weights() -> None:
    golden = load("mae_model")
    decay = Schedule(0.05, shape="constant")
    optimized = Optimized(Schedule(0.004, 0.001, warmup=0.2), decay, betas=(0.9, 0.95), mask_token="embedding")
    model = method(MAE, encoder(positions="sincos"), optimized, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    state = model.state_dict()
    names = {name: mae_name(name) for name in golden["shapes"]}
    for name, value in official_weights(golden["shapes"]).items():
        state[names[name]] = value.reshape(state[names[name]].shape)
    model.load_state_dict(state)
    before = state_of(model)

    def made(step: int) -> Batch:
        order = torch.stack([noise(3, 16, name=f"m{view}.{step}") for view in range(2)]).argsort(dim=2)  # [G B N]
        mask = torch.ones(2, 3, 16, dtype=torch.bool).scatter(2, order[..., :4], False)
        return batch_of(global_views=views_of("g", 2, step=step), mask=mask)

    seen = fitted(model, [made(step) for step in range(STEPS)])
    check_terms(seen, golden, {"pixels": "pixels"})
    check_gradients(seen, golden, names)
    check_moved_twice(before, seen, golden, "moved", names)


POS_BERT_NAMES = (
    ("backbone.conv1.", "encoder.model.tokens.first.0."),
    ("backbone.bn1.", "encoder.model.tokens.first.1."),
    ("backbone.conv2.", "encoder.model.tokens.first.3."),
    ("backbone.bn2.", "encoder.model.tokens.first.4."),
    ("backbone.gather_local_0.conv1.", "encoder.model.tokens.second.0."),
    ("backbone.gather_local_0.bn1.", "encoder.model.tokens.second.1."),
    ("backbone.gather_local_0.conv2.", "encoder.model.tokens.second.3."),
    ("backbone.gather_local_0.bn2.", "encoder.model.tokens.second.4."),
    ("backbone.", "encoder.model."),
    ("head.mlp.", "heads.cls.0.mlp."),
    ("head.last_layer.weight_g", "heads.cls.1.gain"),
    ("head.last_layer.weight_v", "heads.cls.1.directions"),
)


def test_dcglr_without_its_contrast_follows_the_run_of_pos_bert() -> None:
    """With batch norms: the student's see each size of views alone, the teacher's see its own views and keep their statistics."""
    golden = load("pos_bert_model")
    optimized = Optimized(Schedule(0.004, 0.001), Schedule(0.2, 0.6), clip=1.5, freeze_prototypes=0.25)
    sizes = {"num_points": 40, "points_per_token": 4, "group_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    moving = {"momentum": Schedule(0.5, 1.0), "teacher_temp": Schedule(0.1, shape="constant")}
    weights = {"cls": 1.0, "contrast": 0.0}
    model = method(DCGLR, PointTransformer("pos_bert_base", **sizes), optimized, weights=weights, **DISTILLED, **moving)
    names = {name: first_replaced(name, POS_BERT_NAMES) for name in golden["shapes"]}
    student = {name: f"student.{ours}" for name, ours in names.items()}
    teacher = {name: f"teacher.branch.{ours}" for name, ours in names.items()}
    state = model.state_dict()
    for prefix, places in (("student.", student), ("teacher.", teacher)):
        learned = {name: shape for name, shape in golden["shapes"].items() if ".running_" not in name and not name.endswith("weight_g")}
        for name, value in official_weights({prefix + name: shape for name, shape in learned.items()}).items():
            place = places[name.removeprefix(prefix)]
            state[place] = value.reshape(state[place].shape)
    model.load_state_dict(state)
    before = state_of(model)

    def clouds(letter: str, count: int, *, points: int, step: int) -> Tensor:
        return torch.stack([noise(5, points, 3, name=f"{letter}{view}.{step}") for view in range(count)])

    def made(step: int) -> Batch:
        coarse = (clouds("c", 1, points=16, step=step),)
        return batch_of(clouds("g", 2, points=40, step=step), local_views=clouds("l", 2, points=24, step=step), coarse_views=coarse)

    seen = fitted(model, [made(step) for step in range(len(golden["steps"]))])
    for step, expected in enumerate(golden["steps"]):
        assert seen.logged[step]["train/cls"] == pytest.approx(expected["loss"], rel=1e-5), step
    check_gradients(seen, golden, student)
    check_centres(seen, golden, {"cls_objective.centre_state.value": "centre"})
    after = state_of(model)
    check_moved(before, after, golden["student_moved"], student, golden)
    check_moved(before, after, golden["teacher_moved"], teacher, golden)
    statistics = renamed(after, {name: teacher[name] for name in golden["teacher_statistics"]})
    assert largest_difference(statistics, golden["teacher_statistics"], golden["shapes"]) < 1e-5


POINT_MAE_NAMES = (
    ("mask_token", "student.heads.decoder.mask_token"),
    ("decoder_pos_embed.", "student.heads.decoder.position."),
    ("MAE_decoder.norm.", "student.heads.decoder.norm."),
    ("MAE_decoder.", "student.heads.decoder."),
    ("increase_dim.0.", "student.heads.decoder.predict."),
    ("MAE_encoder.encoder.first_conv.", "student.encoder.model.tokens.first."),
    ("MAE_encoder.encoder.second_conv.", "student.encoder.model.tokens.second."),
    ("MAE_encoder.pos_embed.", "student.encoder.model.position."),
    ("MAE_encoder.blocks.blocks.", "student.encoder.model.blocks."),
    ("MAE_encoder.", "student.encoder.model."),
)


def test_point_mae_follows_the_official_run_from_clouds_to_moved_weights() -> None:
    golden = load("point_mae_model")
    optimized = Optimized(Schedule(2e-4, 5e-5), Schedule(0.05, shape="constant"))
    sizes = {"num_points": 40, "points_per_token": 4, "group_size": 6, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = method(PointMAE, PointTransformer("point_mae", **sizes), optimized, decoder_depth=1, decoder_heads=3).double()
    names = {name: first_replaced(name, POINT_MAE_NAMES) for name in golden["shapes"]}
    learned = {name: shape for name, shape in golden["shapes"].items() if ".running_" not in name}
    state = model.state_dict()
    for name, value in official_weights(learned).items():
        state[names[name]] = value.reshape(state[names[name]].shape).double()
    model.load_state_dict(state)
    before = state_of(model)

    def made(step: int) -> Batch:
        mask = noise(3, 10, name=f"m.{step}").argsort(dim=1) < 6
        return batch_of(noise(1, 3, 40, 3, name=f"p.{step}").double(), mask=mask.unsqueeze(0))

    seen = fitted(model, [made(step) for step in range(len(golden["steps"]))])
    check_terms(seen, golden, {"points": "loss"})
    # A bias before a batch norm changes nothing, so that rounding alone decides where it goes.
    biases = [f"MAE_encoder.encoder.{name}.bias" for name in ("first_conv.0", "first_conv.3", "second_conv.0")]
    compared = {name: ours for name, ours in names.items() if name not in biases}
    # In float64, since of two points that are almost equally near, rounding decides which one is the nearest and gets the gradient.
    check_gradients(seen, golden, compared, most=1e-5)
    after = state_of(model)
    check_moved(before, after, golden["moved"], compared, golden, most=1e-5)
    statistics = renamed(after, {name: names[name] for name in golden["statistics"]})
    assert largest_difference(statistics, golden["statistics"], golden["shapes"]) < 1e-5
