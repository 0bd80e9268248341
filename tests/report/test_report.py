"""Maps, figures and what the report stores: what is shown is what prompt segmentation measures, and every error is small."""

import base64
import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate.evaluate_stubs import TableSource
from glpretrain.evaluate.pixels import Pixels
from matplotlib import pyplot
from PIL import Image
from torch.nn import functional

from glpretrain.data.sources.base import Item
from glpretrain.encoders import FeatureMap, ViT
from glpretrain.encoders.attention import cls_attention
from glpretrain.evaluate.features import encode
from glpretrain.report import attention_figure, compare_figure, pca_figure, similarity_figure, untrained, write_report
from glpretrain.report.maps import attention, layer_numbers, look, patch_pca, similarity_map
from glpretrain.report.page import compact

ROOT = Path(__file__).parents[2]


def small(name="vit_tiny_patch16_224", **changes):
    encoder = ViT(name, **{"img_size": (24, 40), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, **changes}).eval()
    with torch.no_grad():
        for index, parameter in enumerate(encoder.parameters()):
            parameter.add_(0.2 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape) * 0.7 + index))
    return encoder


def picture(height=53, width=71, channels=3):
    """UInt8[C H W] from a formula: waves with an edge."""
    y, x, c = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(channels), indexing="ij")
    waves = torch.sin(0.11 * y * (c + 1)) + torch.cos(0.07 * x + c) + (x > y)
    return ((waves + 2) * 50).byte().permute(2, 0, 1)


def save(path, pixels):
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return path


def stored(page):
    """The data of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def features_of(view):
    """Float64[N K]."""
    return np.frombuffer(base64.b64decode(view["features"]), "<i2").reshape(-1, view["axes"]) / 32767


@pytest.mark.parametrize("size", [None, 40])
def test_patches_are_those_that_the_evaluator_scores(size):
    encoder = small()
    source = TableSource([Item(image=picture(), label=-1, instances=None, regions=None)])
    ((_, output),) = encode(encoder, Pixels(source), fit="stretch", image_size=size)
    seen = look(encoder, picture(), size=size)
    assert torch.equal(seen.patches, output.patches[0])
    assert seen.grid == ((3, 5) if size is None else (5, 5))


def test_a_file_is_seen_as_its_pixels_are(tmp_path):
    encoder = small()
    assert torch.equal(look(encoder, save(tmp_path / "a.png", picture())).patches, look(encoder, picture()).patches)


def test_similarity_is_one_at_the_middle_of_the_prompt_and_interpolates_cosines():
    seen = look(small(patch_size=5, img_size=(15, 25)), picture())
    similarity = similarity_map(seen, patch=(1, 3))
    unit = functional.normalize(seen.patches, dim=-1)
    # With patches of an odd number of pixels the middle pixel of each has exactly the patch's cosine.
    torch.testing.assert_close(similarity[2::5, 2::5].flatten(), unit @ unit[1 * 5 + 3], rtol=0, atol=1e-6)
    assert similarity[7, 17].item() == pytest.approx(1, abs=1e-6)
    assert similarity.shape == (15, 25)


def test_pca_colours_follow_the_main_directions():
    seen = look(small(), picture())
    steps = torch.arange(15.0)
    directions = torch.eye(48)[:3]
    patches = 9 * torch.cos(steps)[:, None] * directions[0] + 4 * torch.sin(2 * steps)[:, None] * directions[1] + torch.ones(48)
    colours = patch_pca(seen._replace(patches=patches)).flatten(0, 1)
    stretched = (torch.cos(steps) - torch.cos(steps).min()) / (torch.cos(steps).max() - torch.cos(steps).min())
    assert abs(np.corrcoef(colours[:, 0], stretched)[0, 1]) > 0.99
    assert colours.amin() == 0 and colours[:, :2].amax() == 1


def test_layers_are_named_from_either_end():
    encoder = small()
    assert layer_numbers(encoder, "all") == [0, 1, 2]
    assert layer_numbers(encoder, "last") == [2]
    assert layer_numbers(encoder, [-1, 0]) == [2, 0]
    seen = look(encoder, picture())
    assert torch.equal(attention(encoder, seen, layers=[1])[0], cls_attention(encoder, seen.items, block=1)[0])


def test_untrained_has_the_architecture_and_says_what_it_is():
    encoder = small(source="MMC, 10 steps")
    state = torch.random.get_rng_state()
    fresh = untrained(encoder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not fresh.training
    shapes = [{name: tensor.shape for name, tensor in one.backbone_state().items()} for one in (encoder, fresh)]
    assert shapes[0] == shapes[1]
    assert fresh.card.source == "random weights, seed 0"
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), untrained(encoder).parameters(), strict=True))


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_figures_have_a_panel_for_each_thing_that_they_name():
    encoder, image = small(), picture()
    heads = ["head 0", "head 1", "head 2", "mean"]
    assert titles(attention_figure(encoder, image)) == ["block 2", *heads]
    assert titles(attention_figure(encoder, image, layers=[0, -1])) == ["block 0", *heads, "block 2", *heads]
    assert titles(pca_figure(encoder, image, size=(16, 24))) == ["as the encoder sees it", "PCA of patches"]
    share = (similarity_map(look(encoder, image), patch=(1, 2)) > 0.6).float().mean().item()
    assert titles(similarity_figure(encoder, image, patch=(1, 2), threshold=0.6))[-1] == f"above 0.6: {share:.0%}"
    both = compare_figure({"before": untrained(encoder), "after": encoder}, image, point=(0.5, 0.5))
    assert [title for title in titles(both) if title in ("before", "after")] == ["before", "after"]


def test_figures_leave_nothing_open_in_pyplot():
    pca_figure(small(), picture())
    assert not pyplot.get_fignums()


def test_a_figure_shows_the_similarity_and_the_mask():
    encoder, image = small(), picture()
    similarity = similarity_map(look(encoder, image), patch=(2, 4))
    threshold = similarity.median().item()
    _, heat, mask, _ = similarity_figure(encoder, image, patch=(2, 4), threshold=threshold).axes
    assert np.array_equal(heat.images[1].get_array(), similarity.numpy())
    inside = mask.images[0].get_array()[(similarity > threshold).numpy()]
    assert np.array_equal(inside, (look(encoder, image).pixels.permute(1, 2, 0) / 255)[similarity > threshold].numpy())


@pytest.mark.parametrize("shape", [(37, 11), (11, 37), (1, 5), (196, 384), (600, 64)])
def test_stored_features_keep_every_cosine(shape):
    patches = torch.sin(torch.arange(shape[0] * shape[1]).reshape(shape) ** 1.3) + 0.3
    features, error = compact(patches)
    assert features.dtype == torch.int16 and len(features) == shape[0] and features.shape[1] <= min(shape)
    unit = functional.normalize(patches.double(), dim=-1)
    largest = (unit @ unit.T - features.double() @ features.double().T / 32767**2).abs().max().item()
    assert error == pytest.approx(largest, abs=1e-9)
    assert error < 2e-4  # of 2e-3 that a mask may be off by: 1e-4 is left out, rounding adds some 1e-5


def test_features_that_vary_in_few_directions_are_stored_in_few_numbers():
    steps = torch.arange(100.0)
    weights = torch.stack([torch.sin(steps), torch.cos(2 * steps), torch.full((100,), 2.0)], dim=1)
    features, error = compact(weights @ torch.sin(torch.arange(3 * 48.0)).reshape(3, 48))
    assert features.shape[1] <= 3
    assert error < 2e-4


def test_the_page_holds_what_the_encoder_computes(tmp_path):
    encoder = small()
    page = write_report({"one": encoder, "two": untrained(encoder)}, [save(tmp_path / "a.png", picture())], out=tmp_path / "new" / "r.html")
    data, seen = stored(page), look(encoder, picture())
    view = data["views"][0][0]
    unit = functional.normalize(seen.patches, dim=-1)
    assert np.abs(features_of(view) @ features_of(view).T - (unit @ unit.T).numpy()).max() < data["backbones"][0]["error"] + 1e-6
    maps = attention(encoder, seen, layers="all")
    shades = np.frombuffer(base64.b64decode(view["attention"]), np.uint8).reshape(maps.shape)
    peaks = np.array(view["peaks"]).reshape(3, 3, 1, 1)
    assert np.abs(shades / 255 * peaks - maps.numpy()).max() <= peaks.max() / 255 / 2 + 1e-6
    colours = np.frombuffer(base64.b64decode(view["pca"]), np.uint8).reshape(3, 5, 3)
    assert np.abs(colours / 255 - patch_pca(seen).numpy()).max() <= 0.5 / 255 + 1e-6
    assert [backbone["name"] for backbone in data["backbones"]] == ["one", "two"]
    assert len(data["images"][0]["pictures"]) == 1  # both see the same


def test_backbones_of_different_sizes_get_their_own_pictures(tmp_path):
    encoders = {"vit": small(), "map": FeatureMap("resnet18", img_size=64).eval(), "grey": small(in_chans=1)}
    data = stored(write_report(encoders, [save(tmp_path / "a.png", picture())], out=tmp_path / "r.html", layers=[-1]))
    assert [backbone["grid"] for backbone in data["backbones"]] == [[3, 5], [2, 2], [3, 5]]
    assert len(set(data["images"][0]["pictures"])) == 3
    assert data["views"][0][1]["reason"] == "resnet18 given; accepted: a ViT or a PointTransformer"


def test_names_cannot_leave_their_place_in_the_page(tmp_path):
    name = "</script><script>alert(1)<!-- $data &amp; \u00fc.png"
    folder = tmp_path / "a"
    folder.mkdir()
    path = save(folder / name.replace("/", "\u2215"), picture())
    page = write_report({"</script><b>": small()}, [path], out=tmp_path / "r.html", layers="last")
    text = page.read_text(encoding="ascii")
    assert text.count("<script") == 2 and "<!--" not in text and "<b>" not in text
    data = stored(page)
    assert data["images"][0]["name"] == path.name and data["backbones"][0]["name"] == "</script><b>"


def test_the_page_names_no_address(tmp_path):
    text = write_report({"one": small()}, [save(tmp_path / "a.png", picture())], out=tmp_path / "r.html").read_text()
    assert not re.findall(r"(?:https?:)?//[\w-]+\.\w+|\bimport\(|\beval\(|\bfetch\(", text)


def test_mistakes_are_named(tmp_path):
    encoder, good, out = small(), save(tmp_path / "a.png", picture()), tmp_path / "r.html"
    bad = tmp_path / "b.png"
    bad.write_bytes(b"no picture")

    def refused(match, encoders=None, images=None, **how):
        with pytest.raises(ValueError, match=match):
            write_report({"one": encoder} if encoders is None else encoders, [good] if images is None else images, **{"out": out, **how})
        assert not how.get("out", out).exists()

    refused(r"b\.png cannot be read as an image", images=[good, bad])
    refused("accepted: a new file that ends in .html", out=tmp_path / "folder")
    refused("threshold=1.5; accepted: a cosine", threshold=1.5)
    refused(r"layers=\[3\]; accepted: -3 to 2", layers=[3])
    refused("names a block twice", layers=[-1, 2])
    refused("layers='first'; accepted: all, last", layers="first")
    refused("does not divide by the patch of 8", size=20)
    refused("0 backbones", encoders={})
    refused("0 images", images=[])
    refused("training mode; call eval", encoders={"one": small().train()})
    refused("takes image of 5 channels; accepted: image of 1 or 3", encoders={"one": small(in_chans=5)})
    broken = small()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    refused("not finite", encoders={"one": broken})
    out.write_text("kept")
    with pytest.raises(ValueError, match="exists and nothing is overwritten"):
        write_report({"one": encoder}, [good], out=out)
    assert out.read_text() == "kept"
    with pytest.raises(ValueError, match=r"patch=\(3, 0\); accepted: rows 0 to 2, columns 0 to 4"):
        similarity_figure(encoder, picture(), patch=(3, 0))
    with pytest.raises(ValueError, match=r"image is torch.float32 of shape \(3, 53, 71\); accepted: uint8 of \(3, H, W\)"):
        pca_figure(encoder, picture().float())
    with pytest.raises(ValueError, match="accepted: two shares"):
        compare_figure({"one": encoder}, picture(), point=(0.5, 1.0))


def test_three_photographs_and_a_small_vit_stay_far_below_the_budget(tmp_path):
    """A ViT-S/16 at 224; at 448 there are four times as many patches, each of up to twice as many numbers: under eight times the size."""
    data = pytest.importorskip("skimage.data")
    photographs = [
        save(tmp_path / f"{photo.__name__}.png", torch.from_numpy(photo()).permute(2, 0, 1))
        for photo in (data.astronaut, data.chelsea, data.coffee)
    ]
    encoder = ViT("vit_small_patch16_224").eval()
    page = write_report({"one": encoder}, photographs, out=tmp_path / "r.html")
    assert page.stat().st_size < 15e6 / 8
    assert stored(page)["backbones"][0]["error"] < 2e-3


def test_wheels_hold_the_parts_of_the_page():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["glpretrain.report"]
    parts = [path.name for path in (ROOT / "glpretrain" / "inspect").iterdir() if path.is_file() and path.suffix != ".py"]
    assert parts
    assert all(any(fnmatch(part, pattern) for pattern in listed) for part in parts)
    assert all((ROOT / "glpretrain" / "inspect" / pattern).read_text().isascii() for pattern in listed)
