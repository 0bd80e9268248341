"""Heads that carry official weights give the official outputs and gradients."""

from collections.abc import Sequence

import torch
from batches import unpatchify
from golden import assert_matches, assert_moments, load, wave
from torch import Tensor, nn

from glpretrain.training.heads import ContrastHead, PixelHead, ProjectionHead
from glpretrain.training.prototypes import Prototypes

DINO, DINOV3, SIT = load("dino_head"), load("dinov3_head"), load("sit_heads")


def _official_weights(parameters: Sequence[tuple[str, list[int], float, float]]) -> dict[str, Tensor]:
    return {name: offset + wave(*shape, phase=i, scale=scale) for i, (name, shape, offset, scale) in enumerate(parameters)}


def _assert_gradients_match(module: nn.Module, expected: dict[str, list], *, names: dict[str, str]) -> None:
    for name, parameter in module.named_parameters():
        assert_matches(parameter.grad, expected[names[name]], atol=1e-5)


def test_dino_head_with_official_weights_is_the_official_head() -> None:
    weights, expected = _official_weights(DINO["parameters"]), DINO["results"]["float64"]
    projection, prototypes = ProjectionHead(5, hidden_dim=11, bottleneck_dim=7), Prototypes(7, num_prototypes=13, train_gain=True)
    projection.load_state_dict({name: value for name, value in weights.items() if name.startswith("mlp.")})
    prototypes.load_state_dict({"gain": weights["last_layer.weight_g"], "directions": weights["last_layer.weight_v"]})

    features = wave(3, 5, phase=0.2).requires_grad_()
    logits = prototypes(projection(features)).dense()
    (logits * wave(3, 13, phase=7.0)).sum().backward()

    assert_matches(logits.detach(), expected["output"])
    assert_matches(features.grad, expected["input_gradient"], atol=1e-5)
    gradients = expected["parameter_gradients"]
    _assert_gradients_match(projection, gradients, names={name: name for name, _ in projection.named_parameters()})
    _assert_gradients_match(prototypes, gradients, names={"gain": "last_layer.weight_g", "directions": "last_layer.weight_v"})


def test_a_head_with_a_plain_last_layer_is_dinov3s() -> None:
    weights = _official_weights(DINOV3["parameters"])
    projection = ProjectionHead(5, hidden_dim=11, bottleneck_dim=7)
    prototypes = Prototypes(7, num_prototypes=13, train_gain=True, last_layer="linear")
    projection.load_state_dict({name: value for name, value in weights.items() if name.startswith("mlp.")})
    prototypes.load_state_dict({"directions": weights["last_layer.weight"]})
    features = wave(3, 5, phase=0.2).requires_grad_()
    logits = prototypes(projection(features)).dense()
    (logits * wave(3, 13, phase=7.0)).sum().backward()
    assert_matches(logits.detach(), DINOV3["output"])
    assert_matches(features.grad, DINOV3["input_gradient"], atol=1e-5)
    gradients = DINOV3["parameter_gradients"]
    _assert_gradients_match(projection, gradients, names={name: name for name, _ in projection.named_parameters()})
    _assert_gradients_match(prototypes, gradients, names={"directions": "last_layer.weight"})


def test_a_plain_last_layer_starts_as_dinov3s() -> None:
    torch.manual_seed(0)
    fresh = Prototypes(256, num_prototypes=4096, train_gain=True, last_layer="linear")
    assert [name for name, _ in fresh.named_parameters()] == ["directions"]
    assert_moments(fresh.directions, DINOV3["moments"], name="directions")


def test_contrast_head_with_official_weights_is_the_official_head() -> None:
    weights = {name.removeprefix("mlp."): value for name, value in _official_weights(SIT["cls_parameters"]).items()}
    head = ContrastHead(5, hidden_dim=11, out_dim=3)
    head.load_state_dict(weights)
    cls = wave(7, 5, phase=0.2).requires_grad_()
    projections = head(cls)
    (projections * wave(7, 3, phase=7.0)).sum().backward()
    expected = SIT["cls"]["float64"]
    # Seven rows through three batch norms in a row: rounding is divided by small standard deviations.
    assert_matches(projections.detach(), expected["output"], atol=1e-4)
    assert_matches(cls.grad, expected["input_gradient"], atol=1e-4)


def test_pixel_head_with_official_weights_is_the_official_transposed_convolution() -> None:
    weights = _official_weights(SIT["rec_parameters"])
    kernel, bias = weights.pop("convTrans.weight"), weights.pop("convTrans.bias")  # [D C p q], [C]
    state = {name.replace("mlp.", "layers."): value for name, value in weights.items()}
    state["layers.6.weight"] = kernel.permute(2, 3, 1, 0).flatten(0, 2)  # [p*q*C D]
    state["layers.6.bias"] = bias.repeat(4)  # [p*q*C]
    head = PixelHead(5, patch_dim=12)
    head.load_state_dict(state)
    patches = wave(2, 9, 5, phase=0.4).requires_grad_()
    images = unpatchify(head(patches), patch_size=(2, 2), grid=(3, 3), num_channels=3)
    (images * wave(2, 3, 6, 6, phase=7.0)).sum().backward()
    assert_matches(images.detach(), SIT["rec"]["float64"]["output"])
    assert_matches(patches.grad, SIT["rec"]["float64"]["input_gradient"], atol=1e-5)


def test_the_reference_head_input_is_not_degenerate() -> None:
    assert torch.tensor(DINO["results"]["float64"]["output"]).std() > 0.1
