"""DINOv2 as a whole, with the options of its recipe: ten steps of training follow the official loop, from the views to the moved weights.

`dinov2_model` has what its ViT-L/14 has: SwiGLU, separate heads, Sinkhorn-Knopp. `dinov2_shared_model` has the default settings, which are
GPFM's: plain MLPs, one head, centres, and rates that fall from layer to layer. Both clip each module, freeze prototypes by their rate,
let the mask token decay and learn like the embedding, and search KoLeo's neighbours in one process. No path is dropped.

The official code ran in float64 (its Sinkhorn-Knopp casts to float32), ours runs in float32: see `test_official_runs`.
"""

import pytest
import torch
from batches import Optimized, batch_of, fitted, largest_difference, method, views_of
from golden import load, noise, official_weights
from test_official_runs import check_moved_twice, first_replaced, hidden, renamed, state_of, warmed_up

from glpretrain.core.batch import Batch
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import ViT
from glpretrain.methods import GPFM

STEPS = 10
NAMES = (
    ("backbone.mask_token", "encoder.mask_token"),
    ("backbone.", "encoder.model."),
    ("dino_head.mlp.", "heads.cls.0.mlp."),
    ("dino_head.last_layer.weight_g", "heads.cls.1.gain"),
    ("dino_head.last_layer.weight_v", "heads.cls.1.directions"),
    ("ibot_head.mlp.", "heads.patch.0.mlp."),
    ("ibot_head.last_layer.weight_g", "heads.patch.1.gain"),
    ("ibot_head.last_layer.weight_v", "heads.patch.1.directions"),
)
SIDES = {"student": "student", "teacher": "teacher.branch"}
WIDTHS = {"num_prototypes": 19, "hidden_dim": 14, "bottleneck_dim": 10}
CENTRES = {"cls_objective.centre_state.value": "cls_centre", "patch_objective.centre_state.value": "patch_centre"}


def name_of(official: str) -> str:
    return first_replaced(official, NAMES).replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def model_of(golden: dict, *, layer_decay: float | None, decay_end: float, ffn: str | None, **settings: object) -> GPFM:
    """The student and the teacher of the official run."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "init_values": 0.5}
    encoder = ViT("vit_small_patch14_dinov2", **sizes, ffn=ffn, position_resize="dino")
    optimized = Optimized(
        Schedule(0.004, 0.001),
        Schedule(0.04, decay_end),
        layer_decay=layer_decay,
        patch_lr=0.2,
        clip=0.5,
        clip_mode="module",
        freeze_prototypes=0.3,
        freeze_by="rate",
        mask_token="embedding",
    )
    moving = {"momentum": Schedule(0.5, 1.0), "teacher_temp": warmed_up(0.04, 0.07)}
    model = method(GPFM, encoder, optimized, koleo_among="process", **WIDTHS, **moving, **settings)
    state = model.state_dict()
    for side, ours in SIDES.items():
        for name, value in official_weights({f"{side}.{name}": shape for name, shape in golden["shapes"].items()}).items():
            place = f"{ours}.{name_of(name.removeprefix(f'{side}.'))}"
            gain = 1.0 + 0.3 * noise(*value.shape, name=name)
            state[place] = (gain if place.endswith(".gain") else value).reshape(state[place].shape)
    model.load_state_dict(state)
    return model


def made(step: int) -> Batch:
    return batch_of(global_views=views_of("g", 2, step=step), local_views=views_of("l", 2, step=step, size=16), mask=hidden(step))


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        (
            "dinov2_model",
            {
                **{"layer_decay": 1.0, "decay_end": 0.2, "ffn": "swiglu"},
                **{"num_patch_prototypes": 17, "patch_bottleneck_dim": 9, "sinkhorn_iterations": 3},
            },
        ),
        ("dinov2_shared_model", {"layer_decay": 0.9, "decay_end": 0.4, "ffn": None}),
    ],
)
def test_dinov2_follows_the_official_run_from_views_to_moved_weights(run: str, settings: dict) -> None:
    golden = load(run)
    model = model_of(golden, **settings)
    before = state_of(model)
    seen = fitted(model, [made(step) for step in range(STEPS)])
    assert len(golden["steps"]) == STEPS
    names = {side: {name: f"{SIDES[side]}.{name_of(name)}" for name in golden["shapes"]} for side in SIDES}
    for step, expected in enumerate(golden["steps"]):
        # The official numbers for display are halves, except those of the views, and KoLeo's has its weight of 0.1.
        terms = {"cls": expected["local"] + expected["global"], "patch": 2 * expected["ibot"], "koleo": 2 * expected["koleo"] / 0.1}
        for term, value in terms.items():
            assert seen.logged[step][f"train/{term}"] == pytest.approx(value, rel=2e-5), (step, term)
        for ours, theirs in CENTRES.items():
            if theirs in expected:
                torch.testing.assert_close(seen.states[step][ours], torch.tensor(expected[theirs]), rtol=1e-5, atol=1e-6)
        if "gradients" in expected:
            found = renamed(seen.gradients[step], {name: names["student"][name] for name in expected["gradients"]})
            assert largest_difference(found, expected["gradients"], golden["shapes"]) < 2e-4, step
    for side in SIDES:
        check_moved_twice(before, seen, golden, f"{side}_moved", names[side])
