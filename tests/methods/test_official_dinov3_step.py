"""DINOv3 as a whole: losses, balanced targets and gradients of one step are those of the official `SSLMetaArch`, all parts together.

The step is one of the stage of high resolution: Gram anchoring to a third network that sees larger clean crops, half weight of local views,
a final norm of their own for local class tokens, and heads with plain last layers. No path is dropped and no position moves. The official
code is told to compute positions in float32, which its training does not do, see `called` in the golden file.
"""

import pytest
import torch
from batches import batch_of, largest_difference, method, views_of
from golden import assert_matches, load, official_weights
from test_official_runs import hidden
from torch import Tensor

from glpretrain.core.batch import Batch, ViewGroup
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import ViT
from glpretrain.methods import GPFM
from glpretrain.training.anchor import Gram

GOLDEN = load("dinov3_step")
RENAMED = {
    "backbone.local_cls_norm.": "encoder.local_norm.",
    "backbone.mask_token": "encoder.mask_token",
    "backbone.storage_tokens": "encoder.model.reg_token",
    "backbone.": "encoder.model.",
    "dino_head.mlp.": "heads.cls.0.mlp.",
    "dino_head.last_layer.weight": "heads.cls.1.directions",
    "ibot_head.mlp.": "heads.patch.0.mlp.",
    "ibot_head.last_layer.weight": "heads.patch.1.directions",
}
BIAS = "attn.qkv.bias"  # whose part for keys is masked, so that we have none


def name_of(official: str) -> str:
    start = next(start for start in RENAMED if official.startswith(start))
    name = RENAMED[start] + official.removeprefix(start)
    return name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")


def weights_of(side: str) -> dict[str, Tensor]:
    """The official weights of a side under our names."""
    shapes = {f"{side}.{name}": shape for name, shape in GOLDEN["shapes"].items() if side != "gram" or name.startswith("backbone.")}
    found: dict[str, Tensor] = {}
    for name, value in official_weights(shapes).items():
        official = name.removeprefix(f"{side}.")
        if official.endswith(("periods", "bias_mask")):
            continue
        ours = name_of(official)
        if official.endswith(BIAS):
            queries, _, values = value.tensor_split(3)
            found |= {ours.replace("qkv.bias", "q_bias"): queries, ours.replace("qkv.bias", "v_bias"): values}
        else:
            found[ours] = value
    return found


def loaded(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    state = module.state_dict()
    assert {name for name in state if not name.endswith("k_bias")} == weights.keys(), sorted(state.keys() ^ weights.keys())
    module.load_state_dict({name: weights[name].reshape(value.shape) if name in weights else value for name, value in state.items()})


def model_of() -> GPFM:
    """Student, teacher and anchor with the official weights."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "reg_tokens": 2}
    periods = official_weights({"periods": GOLDEN["shapes"]["backbone.rope_embed.periods"]})["periods"].tolist()
    encoder = ViT("vit_small_patch16_dinov3_qkvb", **sizes, init_values=0.5, norm_eps=1e-5, rope_periods=periods, local_norm=True)
    heads = {"num_prototypes": 19, "num_patch_prototypes": 17, "hidden_dim": 14, "patch_hidden_dim": 12}
    model = method(
        GPFM,
        encoder,
        **heads,
        bottleneck_dim=10,
        patch_bottleneck_dim=9,
        last_layer="linear",
        sinkhorn_iterations=3,
        weights={"cls": 1.0, "patch": 1.0, "koleo": 0.1},
        koleo_among="process",
        teacher_temp=Schedule(0.07, shape="constant"),
        local_weight=Schedule(0.5, shape="constant"),
        momentum=Schedule(0.999, shape="constant"),
        gram=Gram(snapshot_at=0.0, start=0.0, ramp=0.0, weight=Schedule(1.5, shape="constant"), views="clean"),
    ).train()
    loaded(model.student, weights_of("student"))
    loaded(model.teacher.branch, weights_of("teacher"))
    model.begin_step(0.0)  # takes the snapshot, which gets the weights of the third network
    loaded(model.anchor.snapshot.encoder, {name.removeprefix("encoder."): value for name, value in weights_of("gram").items()})
    return model


def batch() -> Batch:
    made = batch_of(global_views=views_of("g", 2), local_views=views_of("l", 2, size=16), mask=hidden(0))
    return made._replace(views={**made.views, "clean": ViewGroup(views_of("c", 2, size=48))})


def test_losses_and_gradients_of_a_step_are_dinov3s() -> None:
    model, given = model_of(), batch()
    terms = model.averaged(model(given, 0.0), given)
    theirs = GOLDEN["losses"]
    expected = {
        "cls": (theirs["dino_global_crops_loss"] + 2.0 * theirs["dino_local_loss_weight"] * theirs["dino_local_crops_loss"]) / 3.0,
        "patch": theirs["ibot_loss"],
        "koleo": 2.0 * theirs["koleo_loss"],  # the official number is the mean over global views
        "gram": theirs["gram_loss"],
    }
    for name, value in expected.items():  # both sides compute in float32
        assert terms[name].item() == pytest.approx(value, rel=1e-5), name
    total = model.total(terms, 0.0)
    assert total.item() == pytest.approx(GOLDEN["total"], rel=1e-5)
    total.backward()
    own = {name: parameter.grad for name, parameter in model.student.named_parameters()}
    assert all(gradient is not None for gradient in own.values())
    found = {}
    for name in GOLDEN["gradients"]:
        if name.endswith(BIAS):
            queries, values = (own[name_of(name).replace("qkv.bias", part)] for part in ("q_bias", "v_bias"))
            found[name] = torch.cat([queries, torch.zeros_like(queries), values])
        else:
            found[name] = own[name_of(name)]
    assert len(found) == len(own) - 2, "both biases of each of the two blocks are one official tensor"
    assert largest_difference(found, GOLDEN["gradients"], GOLDEN["shapes"]) < 1e-4  # of float32 sums that nearly cancel


def test_balanced_targets_are_dinov3s() -> None:
    model, given = model_of(), batch()
    group = given.views["global"]
    with torch.no_grad():
        seen = model.teacher_branch.encode(group.items.flatten(0, 1))
        cls = model.teacher_branch.heads["cls"](seen.cls)
        patches = model.teacher_branch.heads["patch"](seen.patches.flatten(0, 1)[group.hidden_places()])
        targets = {
            "cls_targets": model.cls_objective.targets(cls.dense(), teacher_temp=0.07),
            "patch_targets": model.patch_objective.targets(patches.dense(), teacher_temp=0.07),
        }
    for name, value in targets.items():
        assert len(value) > 5 and float(value.sum(dim=1).sub(1.0).abs().max()) < 1e-5
        assert_matches(value, GOLDEN[name], rtol=1e-4, atol=1e-6)
