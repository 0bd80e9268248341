"""Features are computed once per content: whatever changes them changes their name, and nothing else does."""

from pathlib import Path

import pytest
import torch
from evaluate_stubs import labelled, masked

from glpretrain.encoders import ViT
from glpretrain.evaluate import KNN, DecodedItems, FeatureCache, Features, LinearProbe, PromptSegmentation, Sources
from glpretrain.evaluate.cache import fingerprint


def encoder(*, depth: int = 3, phase: float = 0.0) -> ViT:
    made = ViT("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=depth, num_heads=3)
    for number, parameter in enumerate(made.parameters()):
        parameter.data = torch.sin(torch.arange(parameter.numel()) * 1.7 + number + phase).reshape(parameter.shape) * 0.3
    return made.eval()


def source(count: int = 13):
    return labelled([index % 3 for index in range(count)], num_classes=3, size=8)


def features(model: ViT, items, cache: FeatureCache | None, **options) -> torch.Tensor:
    encoded = Features(batch_size=5, **options).encode(model, DecodedItems(items), resize="stretch", cache=cache)
    return torch.cat([output.patches for _, output in encoded])


def test_k_nn_and_linear_probe_share_one_pass():
    model, items = encoder(), DecodedItems(source(30))
    cache, sources = FeatureCache(model), {"train": items, "test": items}
    KNN(k=(1,)).run(model, sources, cache)
    assert cache.num_computed == 1
    LinearProbe(inverse_l2=(1.0,)).run(model, sources, cache)
    assert cache.num_computed == 1


def test_features_on_disk_are_those_that_were_computed(tmp_path: Path):
    model, items = encoder(), source()
    first = features(model, items, FeatureCache(model, folder=tmp_path))
    again = FeatureCache(encoder(), folder=tmp_path)  # another object with the same weights
    assert torch.equal(features(again.encoder, items, again), first)
    assert again.num_computed == 0
    assert torch.equal(first, features(model, items, None))


def test_what_changes_features_is_never_served_old_ones(tmp_path: Path):
    model, items = encoder(), source()
    features(model, items, FeatureCache(model, folder=tmp_path))

    def computed(changed: ViT, source_, **options) -> int:
        cache = FeatureCache(changed, folder=tmp_path)
        assert torch.equal(features(changed, source_, cache, **options), features(changed, source_, None, **options))
        return cache.num_computed

    assert computed(encoder(phase=0.1), items) == 3  # weights
    assert computed(model, items, layer=0) == 3
    assert computed(model, items, size=12) == 3
    assert computed(model, items, bf16=True) == 3
    items.items[7].values[0, 0, 0] += 1
    assert computed(model, items) == 1  # only the batch with the changed item
    assert computed(model, items) == 0


def test_a_cropped_item_does_not_stand_for_a_stretched_one():
    model, items = encoder(), source(3)
    items.items = [item._replace(values=(torch.arange(3 * 8 * 12) % 251).to(torch.uint8).reshape(3, 8, 12)) for item in items.items]
    cache = FeatureCache(model)
    found = {resize: list(Features().encode(model, DecodedItems(items), resize=resize, cache=cache)) for resize in ("crop", "stretch")}
    assert cache.num_computed == 2
    assert not torch.equal(found["crop"][0][1].cls, found["stretch"][0][1].cls)


def test_cls_alone_does_not_stand_for_patches(tmp_path: Path):
    model = encoder()
    scenes = [torch.tensor([[1, 1, 0, 0]] * 8).repeat_interleave(2, 1) for _ in range(6)]
    sources, prompts = Sources({"masked": masked(scenes)}), PromptSegmentation(min_patches=1)
    cache = FeatureCache(model, folder=tmp_path)
    expected = prompts.run(model, sources, cache)
    fresh = FeatureCache(model, folder=tmp_path)
    for _, output in Features().encode(model, sources["masked"], resize="stretch", patches=False, cache=fresh):
        assert output.patches.shape == (6, 0, 12)
    assert prompts.run(model, sources, fresh) == expected
    assert fresh.num_computed == 0


def test_patches_that_nobody_asked_for_are_not_kept(tmp_path: Path):
    model, items = encoder(), DecodedItems(source())
    cache = FeatureCache(model, folder=tmp_path)
    KNN(k=(1,)).run(model, {"train": items, "test": items}, cache)
    assert [path.name.split(".")[1] for path in tmp_path.rglob("*.safetensors")] == ["cls"]
    assert features(model, source(), cache).shape == (13, 4, 12)  # of the same pixels, but computed anew


def test_damaged_cache_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, items = encoder(), source()
    first = features(model, items, FeatureCache(model, folder=tmp_path))
    damaged = sorted(tmp_path.rglob("*.patches.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    cache = FeatureCache(model, folder=tmp_path)
    assert torch.equal(features(model, items, cache), first)
    assert cache.num_computed == 1
    assert damaged.name in caplog.text


def test_memory_is_bounded(tmp_path: Path):
    model, items = encoder(), source()
    cache = FeatureCache(model, memory_bytes=0)
    features(model, items, cache)
    features(model, items, cache)
    assert cache.num_computed == 6


def test_fingerprint_is_of_weights_and_card():
    assert fingerprint(encoder()) == fingerprint(encoder())
    assert fingerprint(encoder()) != fingerprint(encoder(phase=1e-3))
    other = ViT("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=3, mean=(0.1, 0.2, 0.3))
    other.load_state_dict(encoder().state_dict())
    assert fingerprint(other) != fingerprint(encoder())


def test_fingerprint_of_items_is_of_their_content_and_not_of_a_size():
    items = DecodedItems(source())
    first = items.fingerprint()
    list(items.batches((3, 4, 4), resize="crop", batch_size=3))
    assert items.fingerprint() == first == DecodedItems(source()).fingerprint()
    changed = source()
    changed.items[3] = changed.items[3]._replace(label=0 if changed.items[3].label else 1)
    assert DecodedItems(changed).fingerprint() != first


def test_earlier_layer_is_a_shallower_encoder():
    model, shallow = encoder(depth=3), encoder(depth=2)
    state = {name: tensor for name, tensor in model.state_dict().items() if "blocks.2." not in name}
    shallow.load_state_dict(state)
    items = source()
    assert torch.equal(features(model, items, None, layer=1), features(shallow, items, None))
    assert torch.equal(features(model, items, None, layer=-2), features(shallow, items, None))
    for cache in (None, FeatureCache(model)):
        features(model, items, cache, layer=0)
        with pytest.raises(ValueError, match="layer: 3; accepted: -3 to 2"):  # not layer 0, though 3 % 3 is 0
            features(model, items, cache, layer=3)


def test_several_layers_are_one_pass():
    model, items = encoder(depth=3), DecodedItems(source())
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    cache = FeatureCache(model)
    options = {"resize": "stretch", "cache": cache}
    found = [outputs for _, outputs in Features(batch_size=5).encode_layers(model, items, layers={0: True, -1: False, 1: True}, **options)]
    assert passes == [5, 5, 3]
    for layer in (0, 1, 2):
        alone = features(model, source(), None, layer=layer)
        assert torch.equal(torch.cat([outputs[-1 if layer == 2 else layer].patches for outputs in found]), alone)
    passes.clear()
    list(Features(batch_size=5).encode_layers(model, items, layers={-2: True, -3: False}, **options))
    assert passes == []
