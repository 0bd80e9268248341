"""Fine-tuning of clouds follows Point-MAE's code: ten steps of its classifier, and its head for parts, on the same weights and clouds.

Ours runs in float64 here, the loss as well.
"""

import pytest
import torch
import torch.nn.functional as F
from batches import Optimized, fitted, largest_difference, method, summary
from golden import assert_matches, load, noise, official_weights
from torch import Tensor

from glpretrain.core.batch import Batch, ViewGroup
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import PointTransformer
from glpretrain.finetune import Classification, PartHead, Parts

GOLDEN, PARTS = load("point_mae_finetune"), load("point_mae_parts")
TRUNK = {
    "encoder.first_conv.": "tokens.first.",
    "encoder.second_conv.": "tokens.second.",
    "pos_embed.": "position.",
    "blocks.blocks.": "blocks.",
    "cls_pos": "cls_position",
}
PART_HEAD = {
    "label_conv.": "category.",
    "propagation_0.mlp_convs.0.": "carried.0.",
    "propagation_0.mlp_bns.0.": "carried.1.",
    "propagation_0.mlp_convs.1.": "carried.3.",
    "propagation_0.mlp_bns.1.": "carried.4.",
    "convs1.": "mix.",
    "bns1.": "parts.0.",
    "convs2.": "parts.3.",
    "bns2.": "parts.4.",
    "convs3.": "parts.6.",
}


def place_of(name: str) -> str:
    for theirs, ours in {**PART_HEAD, "cls_head_finetune.": "layers."}.items():
        if name.startswith(theirs):
            return f"student.heads.task.{ours}{name.removeprefix(theirs)}"
    for theirs, ours in TRUNK.items():
        if name.startswith(theirs):
            return f"student.encoder.model.{ours}{name.removeprefix(theirs)}"
    return f"student.encoder.model.{name}"


def given(model: torch.nn.Module, shapes: dict[str, list[int]]) -> dict[str, str]:
    """The official weights, put into the model; names of the official parameters and ours."""
    names = {name: place_of(name) for name in shapes}
    assert {name for name, _ in model.named_parameters()} == set(names.values())
    state = model.state_dict()
    for name, value in official_weights(shapes).items():
        state[names[name]] = value.double().reshape(state[names[name]].shape)
    model.load_state_dict(state)
    return names


def classifier() -> tuple[Classification, dict[str, str]]:
    encoder = PointTransformer("point_mae", num_points=40, points_per_token=4, group_size=6, embed_dim=24, depth=2, num_heads=3)
    optimized = Optimized(
        Schedule(1e-3, shape="constant"), Schedule(0.05), layer_decay=1.0, tokens_decay=False, clip=2.0, clip_mode="joint"
    )
    settings = {"pool": "cls_max", "head": "mlp", "dropout": 0.0, "label_smoothing": 0.0}
    model = method(Classification, encoder, optimized, classes=list("abcd"), **settings).double()
    return model, given(model, GOLDEN["shapes"])


def batch(step: int) -> Batch:
    points = noise(5, 40, 3, name=f"p.{step}").double()
    targets = (3 * torch.arange(5) + step) % 4
    return Batch(torch.arange(5), {"global": ViewGroup(points[None], keys=torch.zeros(1, 5, dtype=torch.int64))}, torch.ones(5), targets)


def test_ten_steps_follow_the_official_loop_of_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    model, names = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [batch(step) for step in range(10)]
    # Batch norm over five clouds and maxima make a rounding in the first loss a hundred times larger in ten steps.
    as_it_is = Tensor.float
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "float", lambda values: values if values.ndim == 2 else as_it_is(values))  # logits
        seen = fitted(model, batches)

    def of_theirs(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[ours] for name, ours in names.items()}

    for step, expected in enumerate(GOLDEN["steps"]):
        assert seen.logged[step]["train/classes"] == pytest.approx(expected["loss"], rel=1e-5), step
        if "gradients" in expected:
            assert largest_difference(of_theirs(seen.gradients[step]), expected["gradients"], GOLDEN["shapes"]) < 1e-5, step
        if "moved" in expected:
            moved = {name: seen.states[step][ours] - before[ours] for name, ours in names.items()}
            assert largest_difference(moved, expected["moved"], GOLDEN["shapes"]) < 1e-5, step
    decays = {name: seen.rates[0][ours][1] for name, ours in names.items()}
    assert decays == GOLDEN["decays"]
    for name, expected in GOLDEN["statistics"].items():
        assert summary(model.state_dict()[place_of(name)], name) == pytest.approx(expected, rel=1e-5, abs=1e-5), name
    model.eval()
    with torch.no_grad():
        assert_matches(model.evaluated_logits(noise(5, 40, 3, name="p.0").double()), GOLDEN["logits"])


def test_the_rate_is_the_official_one_but_for_where_its_cosine_begins() -> None:
    """The official rate waits for the end of an epoch, and its cosine begins at the first one: 3.2 % of the rate apart at most."""
    ours = Schedule(1e-3, 1e-6, warmup=10 / 300, warmup_start=1e-6)
    for place, expected in enumerate(GOLDEN["rates"]):
        assert ours(max(10 * place - 1, 0) / 300) == pytest.approx(expected, abs=3.2e-5), place


def part_model() -> tuple[Parts, dict[str, str]]:
    encoder = PointTransformer("point_mae", num_points=40, points_per_token=4, group_size=6, embed_dim=12, depth=12, num_heads=3)
    model = Parts(encoder, list("abcdefg"), num_categories=16, hidden_dim=32, dropout=0.0).double()
    return model, given(model, PARTS["shapes"])


def clouds() -> tuple[Tensor, Tensor]:
    """Float[3 40 4] and Int[3 41]."""
    points, categories = noise(3, 40, 3, name="points").double(), torch.tensor([4, 0, 15])
    items = torch.cat([points, categories[:, None, None].expand(3, 40, 1).double()], dim=2)
    return items, torch.cat([categories[:, None], (5 * torch.arange(120).reshape(3, 40)) % 7], dim=1)


def test_the_head_for_parts_is_the_official_one() -> None:
    model, names = part_model()
    items, targets = clouds()
    group = ViewGroup(items[None], keys=torch.zeros(1, 3, dtype=torch.int64))
    model.train()
    loss = model.losses(Batch(torch.arange(3), {"global": group}, torch.ones(3), targets), 0.0)["parts"].mean()
    loss.backward()
    assert loss.item() == pytest.approx(PARTS["loss"], rel=1e-5)
    gradients = {name: model.get_parameter(ours).grad for name, ours in names.items()}
    assert largest_difference(gradients, PARTS["gradients"], PARTS["shapes"]) < 1e-5
    for name, expected in PARTS["statistics"].items():
        assert summary(model.state_dict()[place_of(name)], name) == pytest.approx(expected, rel=1e-5, abs=1e-5), name
    model.eval()
    with torch.no_grad():
        found = F.log_softmax(model.evaluated_logits(items), dim=1).transpose(1, 2)
    assert summary(found, "log_probabilities") == pytest.approx(PARTS["log_probabilities"], rel=1e-5)
    assert_matches(found[1, :4].flatten(), PARTS["some_log_probabilities"])


def test_the_head_for_parts_has_the_published_widths() -> None:
    head = PartHead(384, 50, num_categories=16)
    assert head.mix.weight.shape == (512, 3392) and head.carried[0].weight.shape == (1536, 1155)
    assert sum(parameter.numel() for parameter in head.parameters()) == 5_238_706
