"""The page of clouds, in a browser where there is one: what it shows is what the evaluator computes, and it asks for nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from browser import MISSING, Browser
from golden import noise
from torch import Tensor
from torch.nn import functional

from glpretrain.cli.backbones import inspect
from glpretrain.core.clouds import in_unit_sphere, take
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.evaluate.points.tokens import at_points, cells
from glpretrain.report import write_cloud_report
from glpretrain.weights import export

CLOUDS = {"a <1>": in_unit_sphere(noise(90, 3, name="a")), "b": in_unit_sphere(noise(90, 3, name="b") * torch.tensor([1.0, 0.3, 2.0]))}
in_a_browser = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def small(name: str) -> PointTransformer:
    torch.manual_seed(0)
    return PointTransformer(name, num_points=90, points_per_token=8, group_size=8, embed_dim=24, depth=2, num_heads=3, tokens_dim=8).eval()


@pytest.fixture(scope="module")
def encoders() -> dict[str, PointTransformer]:
    return {"pos": small("pos_bert_base"), "mae": small("point_mae")}


def written(folder: Path) -> list[Path]:
    """The clouds as files."""
    for name, cloud in CLOUDS.items():
        np.save(folder / f"{name}.npy", cloud.numpy())
    return [folder / f"{name}.npy" for name in CLOUDS]


@pytest.fixture(scope="module")
def page(encoders, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clouds")
    return write_cloud_report(encoders, written(folder), out=folder / "r.html", threshold=0.3)


@pytest.fixture
def browser(page):
    with Browser() as window:
        window.open(page)
        yield window
        assert window.console() == []
        assert [url for url in window.requested() if not url.startswith("data:")] == [page.as_uri()]


@torch.no_grad()
def similarity_of(encoder: PointTransformer, cloud: Tensor, prompt: int) -> Tensor:
    """Float[P], as `PointPrompts` carries cosines from tokens to points."""
    tokens = functional.normalize(encoder(cloud[None]).patches[0], dim=-1)
    centres = take(cloud[None], encoder.group(cloud[None]).centre_index)
    token = tokens[cells(cloud[None], centres)[0, prompt]]
    return at_points((tokens @ token)[None, :, None], points=cloud[None], centres=centres)[0, :, 0]


@in_a_browser
def test_similarities_and_masks_are_the_evaluators(browser, encoders) -> None:
    for i, cloud in enumerate(CLOUDS.values()):
        for b, encoder in enumerate(encoders.values()):
            for prompt in (0, 17, 61):
                browser.run("glpretrainClouds.setPrompt(arguments[0], arguments[1])", i, prompt)
                expected = similarity_of(encoder, cloud, prompt)
                found = torch.tensor(browser.run("return glpretrainClouds.similarity(arguments[0], arguments[1])", i, b))
                torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=0)
                mask = torch.tensor(browser.run("return glpretrainClouds.mask(arguments[0], arguments[1])", i, b))
                sure = (expected - 0.3).abs() > 2e-3
                assert torch.equal(mask[sure], (expected > 0.3)[sure])


@in_a_browser
def test_a_click_prompts_and_keys_turn(browser) -> None:
    browser.run("document.getElementById('turning').checked = false")
    canvas = browser.find("canvas")[0]
    before = browser.run("return glpretrainClouds.side()")
    x, y = browser.run("return glpretrainClouds.place(0, 42)")
    browser.click(canvas, x=x, y=y)
    chosen = browser.run("return glpretrainClouds.prompt(0)")
    place = browser.run("return glpretrainClouds.place(0, arguments[0])", chosen)
    assert chosen != 0 and abs(place[0] - x) < 0.02 and abs(place[1] - y) < 0.02  # that point, or one that hides it
    assert browser.run("return glpretrainClouds.side()") == before
    browser.keys(canvas, "\ue014\ue013")
    after = browser.run("return glpretrainClouds.side()")
    assert after[0] > before[0] and after[1] > before[1]


@in_a_browser
def test_every_map_is_drawn(browser) -> None:
    options = browser.run("return Array.from(document.getElementById('shown').options, (option) => option.value)")
    assert options[:2] == ["similarity", "mask"] and len(options) == 2 + 2 * 3  # two blocks of three heads
    pictures = []
    for option in options:
        browser.run(
            "const s = document.getElementById('shown'); s.value = arguments[0]; s.dispatchEvent(new Event('change'));"
            "document.getElementById('turning').checked = false",
            option,
        )
        pictures.append(browser.run("return document.querySelector('canvas').toDataURL()"))
    assert len(set(pictures)) == len(pictures)
    captions = browser.run("return Array.from(document.querySelectorAll('figcaption'), (caption) => caption.textContent)")
    assert captions[0] == "attention of the class token" and captions[1].startswith("no attention: ") and "class token" in captions[1]


@in_a_browser
def test_cards_say_what_the_backbones_are(browser) -> None:
    cards = browser.run("return Array.from(document.querySelectorAll('.card'), (card) => card.textContent)")
    assert len(cards) == 2 and "pos_bert_base" in cards[0] and "point_mae" in cards[1] and "24, 2 blocks" in cards[0]
    headings = browser.run("return Array.from(document.querySelectorAll('.image h2'), (heading) => heading.textContent)")
    assert headings == ["a <1>.npy", "b.npy"]


def test_the_command_line_reads_files(tmp_path: Path) -> None:
    export(small("pos_bert_base"), tmp_path / "backbone")
    file = tmp_path / "shape.txt"
    file.write_text("\n".join(" ".join(map(str, row)) for row in CLOUDS["b"].tolist()))
    options = {"untrained": True, "layers": "last"}
    inspect(str(tmp_path / "backbone"), [file], out=tmp_path / "r.html", size="64", **options)
    text = (tmp_path / "r.html").read_text(encoding="ascii")
    assert "shape.txt" in text and "untrained" in text
    with pytest.raises(ValueError, match="the size of a cloud is its number of points"):
        inspect(str(tmp_path / "backbone"), [file], out=tmp_path / "s.html", size="64x32", **options)


def test_what_does_not_fit_is_named(tmp_path: Path, encoders) -> None:
    vit, files = ViT("vit_tiny_patch16_224", img_size=32, depth=1).eval(), written(tmp_path)
    with pytest.raises(ValueError, match="vit is for image"):
        write_cloud_report({"vit": vit}, files, out=tmp_path / "r.html")
    with pytest.raises(ValueError, match="0 files given"):
        write_cloud_report(encoders, [], out=tmp_path / "r.html")
    with pytest.raises(ValueError, match="threshold=2"):
        write_cloud_report(encoders, files, out=tmp_path / "r.html", threshold=2)
    with pytest.raises(ValueError, match="x is in training mode"):
        write_cloud_report({"x": small("point_mae").train()}, files, out=tmp_path / "r.html")
