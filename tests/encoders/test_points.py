"""Point transformers: parity with the official code, and what every encoder owes."""

from pathlib import Path

import pytest
import torch
from golden import assert_matches, load, noise, official_weights
from torch import Tensor

from glpretrain.core.clouds import farthest_points
from glpretrain.encoders import PointTransformer, build
from glpretrain.encoders.attention import cls_attention
from glpretrain.encoders.layers import features_of_layers
from glpretrain.encoders.point_tokens import Groups, MiniPointNet
from glpretrain.weights.published import read_published_file

SMALL = {"num_points": 40, "points_per_token": 4, "group_size": 6, "embed_dim": 24, "depth": 2, "num_heads": 3}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 on both sides


def official(name: str, **arguments) -> tuple[PointTransformer, dict]:
    """Ours with the official weights of a reference, in evaluation mode."""
    reference = load(name)
    state = official_weights(reference["shapes"])
    imported = read_published_file({"base_model": state}, {"num_heads": 3}, path=Path(name))
    built = {**imported.arguments, **SMALL, "source": "", **arguments}
    encoder = PointTransformer(**built).eval()
    encoder.load_backbone_state({key: value for key, value in imported.state.items() if key in encoder.backbone_state()})
    return encoder, reference


def small(name: str = "point_mae", **arguments) -> PointTransformer:
    torch.manual_seed(0)
    return PointTransformer(name, **{**SMALL, **arguments}).eval()


def cloud(*shape: int) -> Tensor:
    return noise(*shape, 3, name="cloud")


@torch.no_grad()
def test_patches_are_those_of_point_mae() -> None:
    encoder, reference = official("point_mae")
    output = encoder(noise(3, 40, 3, name="points"))
    assert_matches(output.patches, reference["features"], **TOLERANCE)
    assert torch.equal(output.cls, output.patches.mean(dim=1))


@torch.no_grad()
def test_tokens_are_those_of_point_mae_with_a_class_token() -> None:
    encoder, reference = official("point_mae_classifier")
    output = encoder(noise(3, 40, 3, name="points"))
    assert_matches(torch.cat([output.cls.unsqueeze(1), output.patches], dim=1), reference["features"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clean", "masked"])
def test_features_are_those_of_pos_bert(kind: str) -> None:
    encoder, reference = official("pos_bert", points_per_token=6)
    state = official_weights(reference["shapes"])
    encoder.add_mask_token()
    encoder.mask_token.copy_(state["mask_token"].flatten())
    encoder.mask_position.load_state_dict({n.removeprefix("pos_embedding."): t for n, t in state.items() if n.startswith("pos_embedding.")})
    mask = torch.tensor(reference["mask"]) if kind == "masked" else None
    output = encoder(noise(3, 40, 3, name="points"), mask=mask)
    assert_matches(output.cls, reference[kind]["cls"], **TOLERANCE)
    assert_matches(output.patches, reference[kind]["patches"], **TOLERANCE)


def test_the_gradient_of_a_maximum_goes_to_one_of_equal_points() -> None:
    tokens = MiniPointNet(8, hidden_dim=4).eval()
    same = torch.zeros(1, 1, 3, 3, requires_grad=True)  # a group whose three points are one
    groups = Groups(torch.zeros(1, 1, 3), same, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 3, dtype=torch.long))
    tokens(torch.zeros(1, 3, 3), groups).sum().backward()
    assert same.grad is not None
    assert len({tuple(row) for row in same.grad[0, 0].tolist()}) > 1  # shared among all, each would have the same


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("point_mae", 21_825_024), ("point_bert", 21_858_816), ("pos_bert_base", 1_255_424), ("pos_bert_large", 17_158_080)],
)
def test_published_sizes(name: str, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in PointTransformer(name).parameters()) == parameters


@torch.no_grad()
@pytest.mark.parametrize("name", ["point_mae", "point_bert", "pos_bert_base"])
def test_shapes_for_any_number_of_points(name: str) -> None:
    encoder = small(name)
    outputs = encoder([cloud(2, 40), cloud(3, 23)])
    assert [tuple(output.patches.shape) for output in outputs] == [(2, 10, 24), (3, 6, 24)]
    assert [tuple(output.cls.shape) for output in outputs] == [(2, 24), (3, 24)]
    assert torch.equal(outputs[0].patches, encoder(cloud(2, 40)).patches)


@torch.no_grad()
def test_kept_tokens_are_computed_alone() -> None:
    encoder = small(depth=1)
    points = cloud(2, 40)
    keep = torch.tensor([[7, 2, 4], [0, 9, 5]])
    kept = encoder(points, keep=keep)
    assert kept.patches.shape == (2, 3, 24)
    everything = encoder(points, keep=torch.arange(10).expand(2, -1))
    torch.testing.assert_close(everything.patches, encoder(points).patches)


@torch.no_grad()
def test_a_hidden_token_says_where_but_not_what() -> None:
    encoder = small("pos_bert_base", depth=1)
    encoder.add_mask_token()
    encoder.mask_token.add_(1.0)
    points = cloud(1, 40)
    groups = encoder.group(points)
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, 3] = True
    changed = points.clone()
    alone = [index for index in groups.neighbour_index[0, 3].tolist() if (groups.neighbour_index[0] == index).sum() == 1]
    assert alone
    changed[0, alone] = groups.centres[0, 3] + 0.5 * (points[0, alone] - groups.centres[0, 3])  # inside the group, near its centre
    assert torch.equal(encoder.group(changed).centres, groups.centres)
    torch.testing.assert_close(encoder(changed, mask=mask).cls, encoder(points, mask=mask).cls)
    assert not torch.allclose(encoder(changed).cls, encoder(points).cls, atol=1e-4)


@torch.no_grad()
def test_order_of_points_after_the_first_does_not_matter() -> None:
    encoder, points = small("point_bert"), cloud(2, 40)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(39)])
    torch.testing.assert_close(encoder(points[:, order]).cls, encoder(points).cls)


@torch.no_grad()
@pytest.mark.parametrize("name", ["point_mae", "point_bert", "pos_bert_large"])
def test_card_and_weights_rebuild_the_encoder(name: str) -> None:
    encoder = small(name)
    twin = build(type(encoder.card).from_json(encoder.card.to_json())).eval()
    twin.load_backbone_state(encoder.backbone_state())
    assert torch.equal(twin(cloud(2, 40)).patches, encoder(cloud(2, 40)).patches)
    encoder.add_mask_token()
    assert encoder.backbone_state().keys() == twin.backbone_state().keys()


def test_layers_of_parameters() -> None:
    encoder = small("point_bert")
    encoder.add_mask_token()
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert layers["model.tokens.first.0.weight"] == layers["model.cls_token"] == layers["model.position.0.weight"] == 0
    assert layers["model.blocks.1.mlp.fc1.weight"] == 2 and layers["model.norm.weight"] == layers["mask_token"] == 3


def test_centres_start_at_the_first_point() -> None:
    points = cloud(3, 40)
    assert (farthest_points(points, count=5)[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "pointnet"}, "name='pointnet' given; accepted: point_mae"),
        ({"group_size": 0}, "group_size=0 given; accepted: at least 1"),
        ({"num_points": 5}, "5 points given; accepted: at least 6"),
        ({"num_heads": 5}, "embed_dim=24 does not divide by num_heads=5"),
        ({"positions": "learned"}, "positions='learned' given; accepted: blocks, none"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 given; accepted"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0 given; accepted: above 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointTransformer(**{"name": "point_mae", **SMALL, **arguments})


def test_bad_items_are_named() -> None:
    encoder = small()
    with pytest.raises(ValueError, match=r"item shape \(40, 6\) given; accepted: \(points, 3\)"):
        encoder(torch.zeros(2, 40, 6))
    with pytest.raises(ValueError, match="no mask token"):
        encoder(cloud(2, 40), mask=torch.zeros(2, 10, dtype=torch.bool))
    with pytest.raises(ValueError, match="not both"):
        encoder(cloud(2, 40), mask=torch.zeros(2, 10, dtype=torch.bool), keep=torch.zeros(2, 1, dtype=torch.int64))


@torch.no_grad()
def test_earlier_layers_and_attention_of_the_class_token() -> None:
    encoder, points = small("point_bert"), cloud(2, 40)
    first, last = features_of_layers(encoder, points, layers=[0, -1])
    assert torch.equal(last.cls, encoder(points).cls) and first.patches.shape == (2, 10, 24)
    shallow = small("point_bert", depth=1)
    shallow.load_backbone_state({name: tensor for name, tensor in encoder.backbone_state().items() if not name.startswith("blocks.1.")})
    torch.testing.assert_close(first.cls, shallow(points).cls)
    maps = cls_attention(encoder, points, block=0)
    assert maps.shape == (2, 3, 10) and (maps > 0).all() and (maps.sum(dim=-1) < 1).all()  # the class token has the rest
    with pytest.raises(ValueError, match="has no class token"):
        cls_attention(small("point_mae"), points)
