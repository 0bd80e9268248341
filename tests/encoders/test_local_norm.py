"""Class token and registers of local views under a norm of their own, and keys with a bias: DINOv3's numbers, exports, refusals."""

import json
from pathlib import Path

import pytest
import timm
import torch
from golden import assert_matches, load, noise, official_weights
from torch import Tensor

from glpretrain.core.keys import item_keys
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import ViT, build
from glpretrain.encoders import vit as vit_module
from glpretrain.encoders.blocks import Packing
from glpretrain.methods import DINO, MAE
from glpretrain.training import Branch
from glpretrain.training.teacher import EMATeacher
from glpretrain.weights import export, load_backbone
from glpretrain.weights.exports import export_as

CASES = load("dinov3_untied")["cases"]
NAME = "vit_small_patch16_dinov3_qkvb"
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "reg_tokens": 2}
VIEWS = [1.7 * noise(2, 3, 32, 32, name="large"), 1.7 * noise(3, 3, 16, 24, name="small")]
MASKS = [torch.arange(32).reshape(2, 16) % 3 == 0, None]
KEYS = [item_keys(seed=0, epoch=0, index=torch.arange(len(views))) for views in VIEWS]
RENAMED = {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}


def ours(name: str, tensor: Tensor, *, key_bias: bool) -> dict[str, Tensor]:
    """A tensor of the official model under our names; that of a mask of biases, and of periods, has none."""
    if name.endswith(("bias_mask", "periods")):
        return {}
    if name == "mask_token":
        return {"mask_token": tensor.squeeze(0)}
    if name.startswith("local_cls_norm."):
        return {name.replace("local_cls_norm", "local_norm"): tensor}
    for before, after in RENAMED.items():
        name = name.replace(before, after)
    if name.endswith("qkv.bias") and not key_bias:
        queries, _, values = tensor.tensor_split(3)
        prefix = f"model.{name.removesuffix('qkv.bias')}"
        return {f"{prefix}q_bias": queries, f"{prefix}v_bias": values}
    return {f"model.{name}": tensor}


def encoder_of(case: dict) -> ViT:
    """Our model with the official one's weights."""
    key_bias = not case["mask_k_bias"]
    weights = official_weights(case["shapes"])
    periods = weights["rope_embed.periods"].tolist()
    encoder = ViT(NAME, **SIZE, norm_eps=1e-5, rope_periods=periods, key_bias=key_bias, local_norm=True)
    encoder.add_mask_token()
    state = {name: value for own, tensor in weights.items() for name, value in ours(own, tensor, key_bias=key_bias).items()}
    encoder.load_state_dict(state)
    return encoder.train()


def encoded(encoder: ViT, **options: object) -> list[EncoderOutput]:
    return encoder(VIEWS, mask=MASKS, keys=KEYS, cls_only=[False, True], **options)


def parts_of(outputs: list[EncoderOutput]) -> dict[str, Tensor]:
    named = zip(("large", "small"), outputs, strict=True)
    return {f"{name} {part}": getattr(one, part) for name, one in named for part in ("cls", "registers", "patches")}


WAYS = ("by size", "one sequence", "chunks", "twice")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"mask_k_bias {case['mask_k_bias']}")
def test_features_and_gradients_are_those_of_dinov3(case: dict, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However views are encoded; gradients of every tensor by their norm, and those of norms, biases and tokens number by number."""
    encoder, packed = encoder_of(case), []
    encoder.activation_checkpointing = way == "twice"
    monkeypatch.setattr(vit_module, "packing_pays", lambda *args, **kwargs: way == "one sequence")
    pack = Packing.pack
    monkeypatch.setattr(Packing, "pack", staticmethod(lambda groups: (packed.append(1), pack(groups))[1]))
    found = parts_of(encoded(encoder, chunk_size=1 if way == "chunks" else None))
    assert bool(packed) is (way == "one sequence")
    total = torch.zeros(())
    for name, value in found.items():
        if name == "small patches":
            assert value.shape[1] == 0
            continue
        # The official model computes in float32 as well; sums of up to 24 products of numbers around 1.
        assert_matches(value, case["values"][name], rtol=1e-5, atol=1e-5)
        total = total + (value * noise(*value.shape, name=name)).sum()
    assert_matches(total, case["total"], rtol=1e-5, atol=1e-5)
    total.backward()
    own = {name: p.grad for name, p in encoder.named_parameters()}
    key_bias, seen = not case["mask_k_bias"], set()
    for name, norm in case["norms"].items():
        parts = [own[one] for one in ours(name, torch.zeros(case["shapes"][name]), key_bias=key_bias)]
        assert_matches(torch.cat([part.flatten() for part in parts]).double().norm(), norm, rtol=1e-5, atol=1e-5)
    for name, gradient in case["gradients"].items():
        for one, expected in ours(name, torch.tensor(gradient), key_bias=key_bias).items():
            assert_matches(own[one], expected.tolist(), rtol=1e-5, atol=1e-5)
            seen.add(one)
    assert {"local_norm.weight", "local_norm.bias", "model.norm.weight", "mask_token", "model.cls_token"} <= seen
    assert all(gradient is not None for gradient in own.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"mask_k_bias {case['mask_k_bias']}")
def test_in_evaluation_mode_all_tokens_have_the_common_norm(case: dict) -> None:
    encoder = encoder_of(case).eval()
    with torch.no_grad():
        small = encoded(encoder)[1].cls
    assert_matches(small, case["eval_small_cls"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(small, torch.tensor(case["values"]["small cls"]), atol=0.1)


def test_the_biases_of_keys_change_features() -> None:
    masked, whole = (parts_of(encoded(encoder_of(case)))["large patches"] for case in CASES)
    assert not torch.allclose(masked, whole, atol=1e-2)


def test_only_views_of_another_size_than_the_first_ones_are_local() -> None:
    encoder = encoder_of(CASES[0])
    encoder.local_norm.bias.data += 5.0
    large, small = VIEWS
    outputs = encoder([large, small, large + 1.0, small + 1.0])
    far = [float(one.cls.mean()) > 2.0 for one in outputs]
    assert far == [False, True, False, True] and not bool(encoder.local_norm.is_local)
    assert float(encoder(small).cls.mean()) < 2.0, "a tensor that is no list has no local views"


def test_a_backbone_has_no_second_norm() -> None:
    encoder = encoder_of(CASES[0])
    assert not [name for name in encoder.backbone_state() if "local" in name] and "local_norm" not in encoder.card.arguments
    rebuilt = build(encoder.card)
    rebuilt.load_backbone_state(encoder.backbone_state())
    assert rebuilt.local_norm is None
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(VIEWS[0]).cls, encoder.eval()(VIEWS[0]).cls)


def test_the_second_norm_starts_as_the_first_also_where_a_backbone_is_loaded() -> None:
    encoder = ViT(NAME, **SIZE, local_norm=True)
    assert torch.equal(encoder.local_norm.weight, encoder.model.norm.weight)
    assert encoder.local_norm.weight is not encoder.model.norm.weight and encoder.local_norm.eps == encoder.model.norm.eps
    state = {name: value + 0.5 for name, value in encoder.backbone_state().items()}
    encoder.load_backbone_state(state)
    assert torch.equal(encoder.local_norm.bias, state["norm.bias"]) and torch.equal(encoder.local_norm.weight, state["norm.weight"])


def test_a_teacher_follows_the_second_norm_and_it_learns_like_the_first() -> None:
    encoder = ViT(NAME, **SIZE, local_norm=True)
    teacher = EMATeacher(branch := Branch(encoder, {}))
    branch.encoder.local_norm.weight.data += 1.0
    teacher.update(branch, momentum=0.5)
    assert torch.equal(teacher.branch.encoder.local_norm.weight, torch.full((24,), 1.5))
    assert encoder.layer_of("local_norm.weight") == encoder.layer_of("model.norm.weight") == 3


@pytest.mark.parametrize("key_bias", [False, True])
def test_exports_of_models_with_biased_keys_compute_the_same(key_bias: bool, tmp_path: Path) -> None:
    """In our own loader and in timm; an export for transformers checks itself, and says which biases there are."""
    encoder = ViT(NAME, **SIZE, key_bias=key_bias, local_norm=True).eval()
    for name, parameter in encoder.model.named_parameters():
        parameter.data += 0.3 * noise(*parameter.shape, name=name)
    biases = [name for name in encoder.backbone_state() if name.endswith(("qkv.bias", "q_bias"))]
    assert all(name.endswith("qkv.bias") is key_bias for name in biases) and len(biases) == 2
    with torch.no_grad():
        expected = encoder(VIEWS[0])
        export(encoder, tmp_path / "own")
        found = load_backbone(tmp_path / "own").eval()(VIEWS[0])
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'own'}", pretrained=True).eval().forward_features(VIEWS[0])
    assert torch.equal(found.patches, expected.patches)
    torch.testing.assert_close(by_timm[:, 3:], expected.patches, rtol=1e-5, atol=1e-5)
    assert ("key_bias" in load_backbone(tmp_path / "own").card.arguments) is key_bias
    export_as(encoder, tmp_path / "transformers", format="huggingface")
    config = json.loads((tmp_path / "transformers" / "config.json").read_text())
    assert (config["query_bias"], config["key_bias"]) == (True, key_bias)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_small_patch16_dinov3", "key_bias": True}, "key_bias=True given; vit_small_patch16_dinov3 has no biases of queries"),
        ({"name": "vit_tiny_patch16_224", "key_bias": True}, "key_bias=True given; vit_tiny_patch16_224 has no biases of queries"),
        ({"name": "vit_tiny_patch16_224", "local_norm": True, "final_norm": False}, "the model has no layer norm behind its last block"),
        ({"name": "vit_base_patch16_siglip_224", "local_norm": True}, "the model has no class token; leave local_norm out"),
    ],
)
def test_models_without_such_parts_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViT(**{"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 3} | arguments)


def test_methods_that_cannot_tell_local_views_apart_refuse_it_and_others_need_them() -> None:
    def encoder() -> ViT:
        return ViT("vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=3, local_norm=True)

    with pytest.raises(ValueError, match="local_norm=True given, but MAE does not encode global and local views together; leave it out"):
        MAE(encoder(), decoder_dim=24, decoder_depth=1, decoder_heads=3)
    heads = {"num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}
    assert DINO(encoder(), **heads).uses["local"].required and not DINO.uses["local"].required
