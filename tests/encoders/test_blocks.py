"""Views of several sizes in one sequence, and last blocks for the class token alone: features and gradients of the plain way."""

import pytest
import torch
import torch.nn.functional as F
from golden import noise
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from glpretrain.core.keys import item_keys
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.encoders import vit as vit_module
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.blocks import Packing

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
ENCODERS: dict[str, tuple[str, dict]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "growing paths": ("vit_tiny_patch16_224", {"drop_path_rate": 0.4}),
    "kept paths only": ("vit_tiny_patch16_224", {"drop_path_rate": 0.4, "drop_path_uniform": True, "reg_tokens": 2, "init_values": 0.1}),
    "no item keeps a path": ("vit_tiny_patch16_224", {"drop_path_rate": 0.99, "drop_path_uniform": True}),
    "swiglu": ("vit_small_patch14_dinov2", {"ffn": "swiglu"}),
    "norms of queries": ("vit_wee_patch16_reg1_gap_256", {}),
    "rotary, mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "rotary": ("eva02_tiny_patch14_224", {"drop_path_rate": 0.3}),
    "rotary of DINOv3": ("vit_small_patch16_dinov3", {}),
}
NUM_LARGE, NUM_SMALL = 3, 5
KEYS = [item_keys(seed=seed, epoch=0, index=torch.arange(count)) for seed, count in ((0, NUM_LARGE), (1, NUM_SMALL))]
VIEWS = [noise(NUM_LARGE, 3, 32, 32, name="large"), noise(NUM_SMALL, 3, 16, 16, name="small")]


def encoder_of(name: str) -> ViT:
    torch.manual_seed(0)
    model, changes = ENCODERS[name]
    encoder = ViT(model, **{**SIZE, **changes}).train()
    encoder.add_mask_token()
    return encoder


def outputs_and_gradients(
    encoder: Encoder, *, cls_only: bool | list[bool], masks: bool = True, half: bool = False
) -> tuple[list[EncoderOutput], dict[str, Tensor]]:
    """Of a loss that reads every token, except the patches of views of which the class token alone is wanted."""
    mask = [torch.arange(NUM_LARGE * 16).reshape(NUM_LARGE, 16) % 3 == 0, None] if masks else None
    only = [cls_only] * 2 if isinstance(cls_only, bool) else cls_only
    encoder.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        outputs = encoder(VIEWS, keys=KEYS, mask=mask, cls_only=cls_only)
    loss = torch.zeros(())
    for number, (output, left_out) in enumerate(zip(outputs, only, strict=True)):
        read = [output.cls] if left_out else [output.cls, output.patches]
        loss = loss + sum((part.float() * noise(*part.shape, name=f"weights {number}")).sum() for part in read)
    loss.backward()
    return outputs, {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}


def assert_same_gradients(own: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(own[name] / scale, gradient / scale, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def packing(monkeypatch: pytest.MonkeyPatch, *, pays: bool) -> None:
    monkeypatch.setattr(vit_module, "packing_pays", lambda *args, **kwargs: pays)


@pytest.mark.parametrize("cls_only", [False, True, [False, True], [True, False]])
@pytest.mark.parametrize("name", ENCODERS)
def test_one_sequence_gives_the_features_and_gradients_of_a_pass_per_size(
    name: str, cls_only: bool | list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(name)
    packing(monkeypatch, pays=False)
    plain, gradients = outputs_and_gradients(encoder, cls_only=cls_only)
    packing(monkeypatch, pays=True)
    widths: list[int] = []
    handle = encoder.model.blocks[0].norm1.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    packed, own = outputs_and_gradients(encoder, cls_only=cls_only)
    handle.remove()
    assert widths == [1], "the first block did not see one sequence"
    for first, second in zip(plain, packed, strict=True):
        for one, other in zip(first, second, strict=True):
            if one is not None:
                torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert_same_gradients(own, gradients)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_class_token_alone_is_that_of_all_tokens_and_so_are_its_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(name)
    packing(monkeypatch, pays=False)
    alone, own = outputs_and_gradients(encoder, cls_only=True)
    encoder.zero_grad(set_to_none=True)
    everything = encoder(VIEWS, keys=KEYS, mask=[torch.arange(NUM_LARGE * 16).reshape(NUM_LARGE, 16) % 3 == 0, None])
    total = torch.stack([(one.cls * noise(*one.cls.shape, name=f"weights {number}")).sum() for number, one in enumerate(everything)])
    total.sum().backward()
    for one, other in zip(alone, everything, strict=True):
        assert one.patches.shape == (len(other.cls), 0, encoder.embed_dim)
        torch.testing.assert_close(one.cls, other.cls, rtol=1e-5, atol=1e-5)
        if other.registers is not None:
            torch.testing.assert_close(one.registers, other.registers, rtol=1e-5, atol=1e-5)
    assert_same_gradients(own, {name: encoder.get_parameter(name).grad for name in own})


def test_the_last_block_of_a_class_token_alone_computes_no_other_queries_and_no_other_mlp() -> None:
    encoder = encoder_of("plain")
    seen: list[tuple[int, ...]] = []
    encoder.model.blocks[-1].mlp.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    encoder(VIEWS[0], cls_only=True)
    encoder(VIEWS[0])
    assert seen == [(NUM_LARGE, 1, 48), (NUM_LARGE, 17, 48)]


def test_an_encoder_without_a_class_token_averages_all_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ViT("vit_base_patch16_gap_224", **SIZE).train()
    for pays in (False, True):
        packing(monkeypatch, pays=pays)
        alone, everything = encoder(VIEWS, cls_only=True), encoder(VIEWS)
        for one, other in zip(alone, everything, strict=True):
            torch.testing.assert_close(one.cls, other.patches.mean(dim=1), rtol=1e-5, atol=1e-5)
            assert one.patches.shape[1] == 0


def test_other_encoders_leave_the_patches_out_too() -> None:
    encoder = PointTransformer(
        "point_mae", num_points=48, points_per_token=8, group_size=8, embed_dim=24, depth=2, num_heads=3, tokens_dim=8
    ).eval()
    clouds = noise(2, 48, 3, name="clouds")
    alone, everything = encoder(clouds, cls_only=True), encoder(clouds)
    assert torch.equal(alone.cls, everything.cls) and alone.patches.shape == (2, 0, 24) and everything.patches.shape == (2, 6, 24)


def test_kept_tokens_that_nobody_would_see_are_refused() -> None:
    with pytest.raises(ValueError, match="keep was given with cls_only; the tokens that are kept would not be returned"):
        encoder_of("plain")(VIEWS[0], keep=torch.zeros(NUM_LARGE, 2, dtype=torch.long), cls_only=True)


def test_half_precision_on_a_cpu_attends_by_explicit_products_in_a_sequence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of("plain")
    packing(monkeypatch, pays=True)
    with Kernels() as watch:
        packed, _ = outputs_and_gradients(encoder, cls_only=False, half=True)
    assert watch.explicit == 2 * 3 and watch.fused == 0  # one for each size and block
    packing(monkeypatch, pays=False)
    plain, _ = outputs_and_gradients(encoder, cls_only=False, half=True)
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one.patches, other.patches, rtol=0.02, atol=0.02)


class Kernels(TorchDispatchMode):
    """Counts explicit softmaxes and fused attentions."""

    explicit = fused = 0

    def __torch_dispatch__(self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.explicit += func is torch.ops.aten._softmax.default
        self.fused += "attention" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("numbers", "packed"), [(1 << 17, True), ((1 << 17) + 1, False)])
def test_small_steps_on_a_cpu_are_packed_and_large_ones_are_not(numbers: int, packed: bool) -> None:
    assert vit_module.packing_pays(numbers, device=torch.device("cpu")) is packed
    assert vit_module.packing_pays(numbers, device=torch.device("cuda"))


def test_models_whose_attention_takes_no_mask_are_encoded_size_by_size() -> None:
    encoder = ViT("vit_tiny_patch16_224", **SIZE)
    assert encoder.packs_views
    assert not ViT("beit_base_patch16_224", **{**SIZE, "img_size": 32}).packs_views
    outside = encoder.model.blocks[0].attn
    outside.fused_attn = False
    assert not vit_module.can_pack(encoder.model.blocks)


def test_a_packing_answers_for_attention_only() -> None:
    packing = Packing(((2, 3), (1, 4)))
    with pytest.raises(TypeError):
        torch.add(torch.zeros(1), packing)
    tokens = [noise(2, 3, 8, name="a"), noise(1, 4, 8, name="b")]
    sequence = Packing.pack(tokens)
    assert sequence.shape == (1, 10, 8)
    for one, other in zip(packing.unpack(sequence), tokens, strict=True):
        assert torch.equal(one, other)
    heads = sequence.unflatten(2, (2, 4)).transpose(1, 2)  # [1 heads S d]
    attended = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=packing)
    block = torch.block_diag(*[torch.ones(3, 3)] * 2, torch.ones(4, 4)).bool()
    torch.testing.assert_close(attended, F.scaled_dot_product_attention(heads, heads, heads, attn_mask=block))
    assert isinstance(attended, Tensor) and not isinstance(attended, nn.Module)
