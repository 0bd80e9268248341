"""Features are computed once per content: whatever changes them changes their name, and nothing else does."""

import os
from pathlib import Path

import pytest
import torch
from evaluate_stubs import labelled, masked
from processes import together

from glpretrain.cli import main
from glpretrain.encoders import ViT
from glpretrain.encoders.attention import attention_keys
from glpretrain.evaluate import KNN, DecodedItems, FeatureCache, Features, LinearProbe, LinearSweep, PromptSegmentation, Sources
from glpretrain.evaluate.cache import default_folder, entries, fingerprint, shrink
from glpretrain.evaluate.encoding import normalised


def encoder(*, depth: int = 3, phase: float = 0.0) -> ViT:
    made = ViT("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=depth, num_heads=3)
    for number, parameter in enumerate(made.parameters()):
        parameter.data = torch.sin(torch.arange(parameter.numel()) * 1.7 + number + phase).reshape(parameter.shape) * 0.3
    return made.eval()


def source(count: int = 13):
    return labelled([index % 3 for index in range(count)], num_classes=3, size=8)


def features(model: ViT, items, cache: FeatureCache | None, **options) -> torch.Tensor:
    items = items if isinstance(items, DecodedItems) else DecodedItems(items)
    encoded = Features(batch_size=5, **options).encode(model, items, resize="stretch", cache=cache)
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
    for _, output in Features().encode(model, sources["masked"], resize="stretch", patches="none", cache=fresh):
        assert output.patches.shape == (6, 0, 12)
    assert prompts.run(model, sources, fresh) == expected
    assert fresh.num_computed == 0


def test_patches_that_nobody_asked_for_are_not_kept(tmp_path: Path):
    model, items = encoder(), DecodedItems(source())
    cache = FeatureCache(model, folder=tmp_path)
    KNN(k=(1,)).run(model, {"train": items, "test": items}, cache)
    assert [path.name.split(".")[1] for path in tmp_path.rglob("*.safetensors")] == ["cls"]
    assert features(model, source(), cache).shape == (13, 4, 12)  # of the same pixels, but computed anew


def test_a_linear_sweep_keeps_the_mean_patch_alone(tmp_path: Path):
    model, items = encoder(), DecodedItems(source(60))
    cache, sources = FeatureCache(model, folder=tmp_path), {"train": items, "test": items}
    sweep = LinearSweep(num_blocks=(1, 3), num_steps=3)
    result = sweep.run(model, sources, cache)
    assert sorted(path.name.split(".")[1] for path in tmp_path.rglob("*.safetensors")) == ["cls", "cls", "cls", "pooled"]
    again = FeatureCache(model, folder=tmp_path)
    assert sweep.run(model, sources, again) == result == sweep.run(model, sources, None) and again.num_computed == 0


def test_pooled_patches_are_those_of_all_patches(tmp_path: Path):
    model, items, options = encoder(), DecodedItems(source()), {"resize": "stretch"}
    patches = features(model, items, FeatureCache(model, folder=tmp_path))
    expected = torch.stack([patches.mean(dim=1), patches.amax(dim=1)], dim=1)
    for cache, num_computed in ((FeatureCache(model), 3), (FeatureCache(model, folder=tmp_path), 0)):  # the second one holds all patches
        found = [output.patches for _, output in Features(batch_size=5).encode(model, items, patches="pooled", cache=cache, **options)]
        assert torch.equal(torch.cat(found), expected) and cache.num_computed == num_computed


@pytest.mark.parametrize("patches", ["none", "pooled", "all"])
def test_a_class_token_keeps_no_patches_alive(patches):
    model = encoder()
    for _, output in Features(batch_size=5).encode(model, DecodedItems(source()), resize="crop", patches=patches):
        assert output.cls.untyped_storage().nbytes() == output.cls.numel() * 4
        assert output.patches.shape[1] == {"none": 0, "pooled": 2, "all": 4}[patches]


def test_damaged_cache_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, items = encoder(), source()
    first = features(model, items, FeatureCache(model, folder=tmp_path))
    damaged = sorted(tmp_path.rglob("*.patches.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    cache = FeatureCache(model, folder=tmp_path)
    assert torch.equal(features(model, items, cache), first)
    assert cache.num_computed == 1
    assert damaged.name in caplog.text


def test_evaluations_that_share_a_folder_get_the_same_features(tmp_path: Path):
    model, items = encoder(), source()
    expected = features(model, items, None)

    def evaluate(number: int) -> bool:
        equal = True
        for _ in range(5):
            equal = equal and torch.equal(features(model, items, FeatureCache(model, folder=tmp_path)), expected)
            if number == 3:
                shrink(tmp_path, to=0)  # `glpretrain cache --empty` meanwhile
        return equal

    assert [(one.value, one.error) for one in together(evaluate, count=4)] == [(True, "")] * 4
    cache = FeatureCache(model, folder=tmp_path)
    assert torch.equal(features(model, items, cache), expected) and cache.folder is not None
    assert not list(tmp_path.rglob(".*"))


def used(folder: Path, model: ViT, seconds: int) -> None:
    """Say that the features of a model were used so many seconds after 2020 began."""
    for path in (folder / fingerprint(model)[:32]).glob("*.safetensors"):
        os.utime(path, (1577836800 + seconds,) * 2)


def test_features_that_were_not_used_for_longest_go_first(tmp_path: Path):
    models, items = [encoder(phase=number / 7) for number in range(3)], source()
    for number, model in enumerate(models):
        features(model, items, FeatureCache(model, folder=tmp_path))
        used(tmp_path, model, number)
    features(models[0], items, FeatureCache(models[0], folder=tmp_path))  # read again: now the newest
    found = entries(tmp_path)
    sizes = {entry.num_bytes for entry in found}
    assert len(found) == 3 and len(sizes) == 1 and {entry.num_files for entry in found} == {6}
    assert shrink(tmp_path, to=3 * max(sizes)) == (0, 0)
    assert shrink(tmp_path, to=int(2.3 * max(sizes))) == (6, max(sizes))
    for model, num_computed in zip(models, (0, 3, 0), strict=True):
        cache = FeatureCache(model, folder=tmp_path)
        features(model, items, cache)
        assert cache.num_computed == num_computed


def test_the_folder_is_kept_to_its_limit(tmp_path: Path):
    old, new, items = encoder(), encoder(phase=0.1), source(40)
    features(old, items, FeatureCache(old, folder=tmp_path))
    used(tmp_path, old, 0)
    (entry,) = entries(tmp_path)
    features(new, items, FeatureCache(new, folder=tmp_path, disk_gb=1.2 * entry.num_bytes / 1e9))
    assert sum(entry.num_bytes for entry in entries(tmp_path)) <= 1.2 * entry.num_bytes
    cache = FeatureCache(new, folder=tmp_path)
    features(new, items, cache)
    assert cache.num_computed == 0
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"cache_gb: .*; accepted: a positive number"):
            FeatureCache(new, folder=tmp_path, disk_gb=wrong)


def test_emptying_removes_nothing_of_anybody_else(tmp_path: Path):
    model = encoder()
    features(model, source(), FeatureCache(model, folder=tmp_path))
    for name in ("notes.txt", "photos/a.png", "0" * 32 + "/thesis.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    shrink(tmp_path, to=0)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
        *("notes.txt", "photos/a.png", "0" * 32 + "/thesis.safetensors")
    }


def test_a_folder_that_cannot_be_written_costs_one_line_and_no_score(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, items = encoder(), source()
    (tmp_path / "file").write_text("no folder")
    cache = FeatureCache(model, folder=tmp_path / "file")
    assert torch.equal(features(model, items, cache), features(model, items, None))
    assert caplog.text.count("features cannot be kept in") == 1


def test_the_command_shows_the_cache_and_empties_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = encoder()
    features(model, source(), FeatureCache(model, folder=default_folder()))
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert f"{default_folder()}: features of 1 backbones, 6 files" in shown and "vit_tiny_patch16_224" in shown
    assert main(["cache", "--keep_gb", "1"]) == 0 and "0 files removed" in capsys.readouterr().out
    assert main(["cache", "--empty"]) == 0 and "6 files removed" in capsys.readouterr().out
    assert not list(default_folder().iterdir())
    for wrong in (["--keep_gb", "0"], ["--keep_gb", "nan"], ["--empty", "--keep_gb", "1"]):
        assert main(["cache", *wrong]) == 2 and "accepted: " in capsys.readouterr().err


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


def test_keys_of_a_block_are_cached_beside_its_output():
    model, items = encoder(), source()
    cache = FeatureCache(model)
    keys = features(model, items, cache, layer=1, tokens="key")
    views = normalised(torch.stack([item.values for item in items.items]), model)
    assert torch.allclose(keys, attention_keys(model, views, block=1), atol=1e-6)  # of one batch of 13 instead of three
    outputs = features(model, items, cache, layer=1)
    assert not torch.equal(outputs, keys) and not torch.equal(features(model, items, cache, layer=1, tokens="value"), keys)
    computed = cache.num_computed
    assert torch.equal(features(model, items, cache, layer=1, tokens="key"), keys) and cache.num_computed == computed
    with pytest.raises(ValueError, match=r"features\.tokens: 'keys'; accepted: output, query, key, value"):
        Features(tokens="keys")


def test_several_layers_are_one_pass():
    model, items = encoder(depth=3), DecodedItems(source())
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    cache = FeatureCache(model)
    options = {"resize": "stretch", "cache": cache}
    found = [
        outputs for _, outputs in Features(batch_size=5).encode_layers(model, items, layers={0: "all", -1: "all", 1: "all"}, **options)
    ]
    assert passes == [5, 5, 3]
    for layer in (0, 1, 2):
        alone = features(model, source(), None, layer=layer)
        assert torch.equal(torch.cat([outputs[-1 if layer == 2 else layer].patches for outputs in found]), alone)
    passes.clear()
    list(Features(batch_size=5).encode_layers(model, items, layers={-2: "pooled", -3: "none"}, **options))
    assert passes == []
