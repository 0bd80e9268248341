"""Activation checkpointing keeps less in the forward pass and changes no bit of outputs, gradients and running statistics."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from golden import noise
from torch import Tensor, nn

from glpretrain.core.keys import item_keys
from glpretrain.encoders import FeatureMap, PointTransformer, PooledViT, ViT
from glpretrain.encoders import vit as vit_module
from glpretrain.encoders.base import Encoder
from glpretrain.training import Branch, Optimization

ITEMS = 5
KEYS = item_keys(seed=3, epoch=0, index=torch.arange(ITEMS))
RATE = 0.4
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "drop_path_rate": RATE}
ENCODERS: dict[str, Callable[[], Encoder]] = {
    "vit": lambda: ViT("vit_tiny_patch16_224", **SMALL),
    "kept": lambda: ViT("vit_tiny_patch16_224", **SMALL, drop_path_uniform=True),
    "rotary": lambda: ViT("eva02_tiny_patch14_224", img_size=56, embed_dim=24, depth=4, num_heads=2, drop_path_rate=RATE),
    "relative": lambda: ViT("vit_relpos_small_patch16_224", **SMALL),
    "pooled": lambda: PooledViT("vit_tiny_patch16_224", **SMALL, pool_dim=48, pool_heads=3),
    "points": lambda: PointTransformer(
        "point_mae", num_points=96, points_per_token=4, group_size=8, embed_dim=24, depth=4, num_heads=3, tokens_dim=8, drop_path_rate=RATE
    ),
    "residual": lambda: FeatureMap("test_resnet", img_size=64, drop_path_rate=RATE),
    "residual v2": lambda: FeatureMap("resnetv2_50", img_size=64, drop_path_rate=RATE),
    "regular": lambda: FeatureMap("regnety_002", img_size=64, drop_path_rate=RATE),
    "layer norms": lambda: FeatureMap("test_convnext", img_size=64, drop_path_rate=RATE),
    "windows": lambda: FeatureMap("swin_tiny_patch4_window7_224", img_size=64, drop_path_rate=RATE),
}
SHARE = 0.8  # of what is kept; the stem of a small ResNet is most of it
QUICK = ("vit", "kept", "rotary", "pooled", "points", "residual", "layer norms")


class Held:
    """Bytes of what autograd keeps, each storage once, without parameters."""

    def __init__(self, encoder: nn.Module) -> None:
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (*encoder.parameters(), *encoder.buffers())}
        self._found: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in self._own:
            self._found[place] = tensor  # kept, so that no other storage comes to the same place
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._found.values())


def passed(
    encoder: Encoder, *, keys: Tensor | None = KEYS, context: AbstractContextManager[object] | None = None, chunk_size: int | None = None
) -> tuple[dict[str, Tensor], int]:
    """Outputs, gradients and buffers after two passes, of which the second comes before the gradients of the first, and bytes kept."""
    torch.manual_seed(0)
    items, held = noise(ITEMS, *encoder.card.item_shape, name="items"), Held(encoder)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda tensor: tensor), context or nullcontext():
        outputs = [encoder(each, keys=keys, chunk_size=chunk_size) for each in (items, 0.5 * items)]
        total = sum(output.cls.float().square().mean() + output.patches.float().mean(dim=1).square().mean() for output in outputs)
    total.backward()
    found = {f"gradient {name}": parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in encoder.named_buffers()}
    found |= {f"{number}": output.patches.detach() for number, output in enumerate(outputs)} | {"cls": outputs[0].cls.detach()}
    encoder.zero_grad(set_to_none=True)
    return found, held.bytes


def twins(name: str) -> tuple[Encoder, Encoder]:
    """The encoder twice, the second one with activation checkpointing."""
    plain, twin = ENCODERS[name]().train(), ENCODERS[name]().train()
    for label, parameter in plain.named_parameters():
        if label.endswith("gamma"):  # ConvNeXt starts its branches at a millionth
            torch.nn.init.ones_(parameter)
    twin.load_state_dict(plain.state_dict())
    Branch(twin, {}).set_activation_checkpointing(True)
    return plain, twin


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ENCODERS])
def test_less_is_kept_and_no_bit_changes(name: str) -> None:
    plain, twin = twins(name)
    (whole, all_bytes), (again, some_bytes) = passed(plain), passed(twin)
    require_equal(whole, again)
    print(f"{name}: {all_bytes / 1e6:.2f} MB are kept, {some_bytes / 1e6:.2f} MB with activation checkpointing")
    assert some_bytes < SHARE * all_bytes


@pytest.mark.parametrize("name", ["vit", "kept"])
def test_nor_under_autocast(name: str) -> None:
    plain, twin = twins(name)
    found = [passed(one, context=torch.autocast("cpu", torch.bfloat16)) for one in (plain, twin)]
    require_equal(found[0][0], found[1][0])
    assert found[1][1] < SHARE * found[0][1]


def test_nor_where_paths_are_drawn_from_the_generator() -> None:
    plain, twin = twins("vit")
    require_equal(passed(plain, keys=None)[0], passed(twin, keys=None)[0])


def test_nor_in_chunks() -> None:
    plain, twin = twins("kept")
    require_equal(passed(plain, chunk_size=2)[0], passed(twin, chunk_size=2)[0])


@pytest.mark.parametrize("name", ["vit", "kept", "rotary"])
def test_nor_in_one_sequence_of_views_of_several_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit_module, "packing_pays", lambda *args, **kwargs: True)
    found = []
    for encoder in twins(name):
        channels, height, width = encoder.card.item_shape
        views, held = [noise(ITEMS, channels, height // part, width // part, name=f"{part}") for part in (1, 2)], Held(encoder)
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda tensor: tensor):
            outputs = encoder(views, keys=[KEYS, KEYS + 1], cls_only=[False, True])
            total = sum(output.cls.square().mean() for output in outputs) + outputs[0].patches.mean(dim=1).square().mean()
        total.backward()
        found.append(({name: one.grad for name, one in encoder.named_parameters() if one.grad is not None}, held.bytes))
    (whole, all_bytes), (again, some_bytes) = found
    require_equal(whole, again)
    assert some_bytes < SHARE * all_bytes


@pytest.mark.parametrize("name", ["vit", "layer norms"])
def test_timms_own_switch_is_not_ignored(name: str) -> None:
    plain, twin = twins(name)
    Branch(twin, {}).set_activation_checkpointing(False)
    twin.get_submodule("model").set_grad_checkpointing(True)
    (whole, all_bytes), (again, some_bytes) = passed(plain), passed(twin)
    require_equal(whole, again)
    assert some_bytes < SHARE * all_bytes


def test_nothing_is_left_on_the_blocks() -> None:
    _, twin = twins("vit")
    passed(twin)
    assert not any("forward" in vars(module) for module in twin.modules())


def test_an_encoder_without_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ENCODERS["vit"]()
    monkeypatch.setattr(type(encoder), "blocks", Encoder.blocks)
    with pytest.raises(ValueError, match="activation_checkpointing=True given, but ViT names no blocks"):
        Branch(encoder, {}).set_activation_checkpointing(True)


def test_blocks_are_not_compiled_and_computed_again_at_once() -> None:
    with pytest.raises(ValueError, match="compile=True and activation_checkpointing=True were both given; leave one of them out"):
        Optimization(compile=True, activation_checkpointing=True)


def test_it_is_off_unless_asked_for() -> None:
    assert not Optimization().activation_checkpointing and not ENCODERS["vit"]().activation_checkpointing
