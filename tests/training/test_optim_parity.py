"""Parameter groups and clipping against the official code of DINO and MAE."""

import torch
from golden import assert_matches, load, wave
from torch import nn

from glpretrain.encoders.vit import ViT
from glpretrain.training.branch import Branch
from glpretrain.training.heads import ProjectionHead
from glpretrain.training.optim import clip_gradients, gradient_norms, parameter_groups
from glpretrain.training.prototypes import Prototypes

GROUPS, LAYERS, CLIP = load("parameter_groups"), load("mae_layer_decay"), load("dino_clip")
# Where the official module's names are ours.
HEAD_NAMES = {"head.mlp.": "projection.mlp.", "head.last_layer.weight_v": "prototypes.directions"}


def _encoder() -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2)


def _our_name(name: str) -> str:
    name = name.replace("backbone.", "model.")
    for theirs, ours in HEAD_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def test_the_same_parameters_decay_as_in_dino() -> None:
    encoder = _encoder()
    encoder.model.blocks[0].norm1.bias.requires_grad_(False)
    heads = nn.ModuleDict(
        {"projection": ProjectionHead(12, hidden_dim=11, bottleneck_dim=5), "prototypes": Prototypes(5, num_prototypes=7)}
    )
    names = {id(p): name for module in (encoder, heads) for name, p in module.named_parameters()}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for group in parameter_groups(encoder, heads.named_parameters()):
        assert group["lr_scale"] == 1.0
        found[group["decays"]] |= {names[id(p)] for p in group["params"]}
    assert found[True] == {_our_name(name) for name in GROUPS["decay"]}
    assert found[False] == {_our_name(name) for name in GROUPS["no_decay"]}


def test_layer_wise_rates_are_maes() -> None:
    encoder = _encoder()
    names = {id(p): name for name, p in encoder.named_parameters()}
    found = {}
    for group in parameter_groups(encoder, [], layer_decay=0.75):
        found |= {names[id(p)]: group["lr_scale"] for p in group["params"]}
    assert found == {f"model.{name}": scale for name, (scale, _) in LAYERS["parameters"].items()}


def test_every_gradient_is_clipped_on_its_own_as_in_dino() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2, 2), (3,))]
    gradients = [wave(3, 5, phase=0, scale=4.0), wave(7, phase=1, scale=1.5), wave(2, 2, phase=2, scale=0.5)]
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient.clone()
    held = nn.ParameterList(parameters)
    clip_gradients(held, gradient_norms(held), mode="parameter", max_norm=3.0)
    assert parameters[3].grad is None
    for parameter, expected in zip(parameters, CLIP["clipped"], strict=False):
        assert_matches(parameter.grad, expected)
    assert CLIP["norms"][0] > 3.0 > CLIP["norms"][1]  # one is scaled, one is left alone
    assert torch.equal(parameters[2].grad, gradients[2])


class Two(nn.Module):
    """A student with two heads and a predictor beside it: four modules, each with gradients of one norm."""

    def __init__(self) -> None:
        super().__init__()
        heads = {"first": nn.Linear(3, 5, bias=False), "second": nn.Linear(3, 5, bias=False)}
        self.student = Branch(_encoder(), heads)
        self.predictors = nn.ModuleDict({"first": nn.Linear(2, 2)})
        for scale, module in enumerate(self.modules_with_gradients(), start=1):
            for parameter in module.parameters():
                parameter.grad = scale * wave(*parameter.shape, scale=1.0)

    def modules_with_gradients(self) -> list[nn.Module]:
        return [self.student.encoder, *self.student.heads.values(), *self.predictors.values()]


def test_a_mask_token_may_learn_at_the_rate_of_the_embedding_and_decay() -> None:
    """As in the official param_groups.py of DINOv2; in MAE's decoder it decays at full rate."""
    encoder, decoder = _encoder(), nn.ParameterDict({"mask_token": nn.Parameter(torch.zeros(3)), "bias": nn.Parameter(torch.zeros(3))})
    encoder.add_mask_token()

    def found(**settings: str) -> list[tuple[float, bool]]:
        groups = parameter_groups(encoder, decoder.items(), layer_decay=0.5, **settings)
        scales = {id(p): (group["lr_scale"], group["decays"]) for group in groups for p in group["params"]}
        return [scales[id(p)] for p in (encoder.mask_token, decoder["mask_token"], decoder["bias"])]

    assert found() == [(1.0, False), (1.0, False), (1.0, False)]
    assert found(mask_token="embedding") == [(0.125, True), (1.0, True), (1.0, False)]


def test_modules_that_are_skipped_are_not_clipped_and_count_in_no_norm() -> None:
    for mode in ("parameter", "module", "joint"):
        skipped, alone = Two(), Two()
        clip_gradients(skipped, gradient_norms(skipped), mode=mode, max_norm=2.0, skip=["predictors", "student.heads.second"])
        for module in (*alone.predictors.values(), alone.student.heads["second"]):
            module.zero_grad(set_to_none=True)
        clip_gradients(alone, gradient_norms(alone), mode=mode, max_norm=2.0)
        as_built = Two()
        for (name, a), b, c in zip(skipped.named_parameters(), alone.parameters(), as_built.parameters(), strict=True):
            expected = c.grad if name.startswith(("predictors.", "student.heads.second.")) else b.grad
            assert torch.equal(a.grad, expected), (mode, name)


def norm_of(module: nn.Module) -> float:
    return float(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).norm())


def test_a_norm_may_be_taken_over_each_module_or_over_all_gradients() -> None:
    """By module as DINOv2 (train.py clips the student's backbone and each head), jointly as MAE and FSFM."""
    before = [norm_of(module) for module in Two().modules_with_gradients()]
    by_module = Two()
    clip_gradients(by_module, gradient_norms(by_module), mode="module", max_norm=7.0)
    after = [norm_of(module) for module in by_module.modules_with_gradients()]
    torch.testing.assert_close(torch.tensor(after), torch.tensor([min(7.0, norm) for norm in before]), rtol=1e-4, atol=0.0)
    assert min(before) < 7.0 < max(before)
    jointly = Two()
    clip_gradients(jointly, gradient_norms(jointly), mode="joint", max_norm=7.0)
    total = sum(norm**2 for norm in before) ** 0.5
    after = [norm_of(module) for module in jointly.modules_with_gradients()]
    torch.testing.assert_close(torch.tensor(after), torch.tensor([7.0 * norm / total for norm in before]), rtol=1e-4, atol=0.0)
