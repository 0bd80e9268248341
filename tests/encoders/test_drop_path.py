"""Stochastic depth: an item drops the same paths in any batch, and torch's generator is left alone."""

import pytest
import torch
from golden import noise
from timm.layers.drop import DropPath
from torch import Tensor

from glpretrain.core.keys import item_keys, uniform
from glpretrain.encoders import FeatureMap, PointTransformer, ViT
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.drop_path import KeyedDropPath, dropping_paths
from glpretrain.training import Branch

ITEMS = 7
KEYS = item_keys(seed=3, epoch=0, index=torch.arange(ITEMS))
RATE = 0.5


def vit(**changes: object) -> ViT:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    return ViT("vit_tiny_patch16_224", **{**size, "drop_path_rate": RATE, "drop_path_uniform": True, **changes})


ENCODERS = {
    "vit": vit,
    "growing": lambda: vit(drop_path_uniform=False),
    "rotary": lambda: ViT("eva02_tiny_patch14_224", img_size=28, embed_dim=24, depth=3, num_heads=2, drop_path_rate=RATE),
    "layer norms": lambda: FeatureMap("test_convnext", img_size=32, drop_path_rate=RATE),
    "windows": lambda: FeatureMap("swin_tiny_patch4_window7_224", img_size=32, drop_path_rate=RATE),
    "points": lambda: PointTransformer(
        "point_mae", num_points=48, points_per_token=8, group_size=8, embed_dim=24, depth=3, num_heads=3, tokens_dim=8, drop_path_rate=RATE
    ),
}


def items_of(encoder: Encoder) -> Tensor:
    return noise(ITEMS, *encoder.card.item_shape, name="items")


@pytest.mark.parametrize("name", ENCODERS)
def test_an_item_drops_the_same_paths_in_any_batch_and_asks_no_generator(name: str) -> None:
    encoder = ENCODERS[name]().train()
    for module in encoder.modules():  # these depend on the batch; the paths are what is tested
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    for label, parameter in encoder.named_parameters():
        if label.endswith("gamma"):  # ConvNeXt starts its branches at a millionth
            torch.nn.init.ones_(parameter)
    items, state = items_of(encoder), torch.get_rng_state()
    whole = encoder(items, keys=KEYS).cls
    order = torch.tensor([5, 2, 6])
    some = encoder(items[order], keys=KEYS[order]).cls
    listed = encoder([items[:2], items[2:]], keys=[KEYS[:2], KEYS[2:]])
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(some, whole[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([output.cls for output in listed]), whole, rtol=1e-4, atol=1e-5)
    other = encoder(items, keys=KEYS + 1).cls
    assert not torch.allclose(other, whole, rtol=1e-4, atol=1e-5)
    assert all(type(module) is not DropPath for module in encoder.modules())
    assert all(path.kept is None and path.rows is None for path in dropping_paths(encoder))
    torch.testing.assert_close(encoder.eval()(items, keys=KEYS).cls, encoder(items).cls)


def test_paths_are_kept_at_their_rate_each_by_itself_and_scaled_as_timm_does() -> None:
    branch = Branch(masked_form(vit(drop_path_rate=0.25)), {}).train()
    paths, seen = dropping_paths(branch), []
    assert len(paths) == 6
    for path in paths:
        path.register_forward_hook(lambda module, args, output: seen.append(output[:, 0, 0] / args[0][:, 0, 0]))
    keys = item_keys(seed=0, epoch=0, index=torch.arange(2000))
    branch.encode(noise(2000, 3, 16, 16, name="many"), keys=keys)
    factors = torch.stack(seen)  # [paths B]
    kept = factors > 0.0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1.0 / 0.75))
    # Four standard deviations of a share of 2000, and of a correlation of 2000 pairs.
    assert (kept.float().mean(dim=1) - 0.75).abs().max() < 4 * (0.75 * 0.25 / 2000) ** 0.5
    assert (torch.corrcoef(kept.float()) - torch.eye(6)).abs().max() < 4 * 2000**-0.5


def masked_form(encoder: ViT) -> ViT:
    """The same encoder, whose blocks compute every branch for every item and multiply what is dropped by zero, as timm's do."""
    for path in dropping_paths(encoder.train()):
        assert path.computes_kept
        path.computes_kept = False
    return encoder


@pytest.mark.parametrize("rate", [0.4, 0.99])
def test_dropped_items_are_not_computed_and_features_and_gradients_are_those_of_the_masked_form(rate: float) -> None:
    """At a rate of 0.99 no item keeps any path: then every parameter still has a gradient, of zeros, for which processes wait."""
    kept, masked = vit(drop_path_rate=rate).double().train(), masked_form(vit(drop_path_rate=rate).double())
    masked.load_state_dict(kept.state_dict())
    rows: list[int] = []
    for block in kept.model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        block.mlp.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    gradients = []
    for encoder in (kept, masked):
        output = encoder(items_of(encoder).double(), keys=KEYS)
        (output.cls.square().sum() + (output.patches * noise(*output.patches.shape, name="weights")).sum()).backward()
        gradients.append({"cls": output.cls, **{name: parameter.grad for name, parameter in encoder.named_parameters()}})
    counts = [int(path) for path in draws(kept, rate)]
    assert rows == counts and (sum(rows) == 0 if rate > 0.9 else 0 < sum(rows) < len(rows) * ITEMS)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def draws(encoder: ViT, rate: float) -> Tensor:
    """Int[paths]: how many items keep each path, by the draws that the docstring of `drawn_paths` describes."""
    return (uniform(KEYS, len(dropping_paths(encoder))) >= rate).sum(dim=0)


def test_a_block_that_computes_what_is_kept_is_timms_without_keys_and_in_evaluation() -> None:
    kept, plain = vit(), ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=3)
    plain.load_state_dict(kept.state_dict())
    items = items_of(kept)
    assert torch.equal(kept.eval()(items, keys=KEYS).patches, plain.eval()(items).patches)
    torch.manual_seed(0)
    first = kept.train()(items).cls
    torch.manual_seed(0)
    assert torch.equal(masked_form(kept)(items).cls, first)


def test_views_without_keys_are_refused_where_paths_are_dropped() -> None:
    branch, items = Branch(vit(), {}), noise(2, 3, 16, 16, name="two")
    with pytest.raises(ValueError, match="drop_path_rate is above 0, but views without keys were given"):
        branch.train().encode([items, items], keys=[KEYS[:2], None])
    with pytest.raises(ValueError, match="drop_path_rate is above 0"):
        branch.encode(items)
    assert branch.eval().encode(items).cls.shape == (2, 24)
    assert Branch(vit(drop_path_rate=0.0, drop_path_uniform=False), {}).train().encode(items).cls.shape == (2, 24)


def test_a_path_without_keys_draws_as_timm_does() -> None:
    residual = noise(50, 3, name="residual")
    draws = []
    for path in (KeyedDropPath(RATE), DropPath(RATE)):
        torch.manual_seed(0)
        draws.append(path.train()(residual))
    assert torch.equal(*draws)
