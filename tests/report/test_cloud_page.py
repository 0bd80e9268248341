"""The page of clouds, in a browser where there is one: what it shows is what the evaluator computes, and it asks for nothing."""

from pathlib import Path

import pytest
import torch
from browser import MISSING, Browser
from glpretrain.cli.inspection import inspect
from golden import noise
from torch import Tensor
from torch.nn import functional

from glpretrain.core.clouds import in_unit_sphere, take
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.evaluate.points.tokens import at_points, cells
from glpretrain.report import write_cloud_report
from glpretrain.weights import export

CLOUDS = {"a <1>": in_unit_sphere(noise(90, 3, name="a")), "b": in_unit_sphere(noise(70, 3, name="b") * torch.tensor([1.0, 0.3, 2.0]))}
in_a_browser = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def small(name: str) -> PointTransformer:
    torch.manual_seed(0)
    return PointTransformer(name, num_points=90, points_per_token=8, group_size=8, embed_dim=24, depth=2, num_heads=3, tokens_dim=8).eval()


@pytest.fixture(scope="module")
def encoders() -> dict[str, PointTransformer]:
    return {"pos": small("pos_bert_base"), "mae": small("point_mae")}


@pytest.fixture(scope="module")
def page(encoders, tmp_path_factory) -> Path:
    return write_cloud_report(encoders, CLOUDS, out=tmp_path_factory.mktemp("clouds") / "r.html", threshold=0.3)


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
    assert captions[0] == "attention of the class token" and captions[1] == "no class token, no attention"


def test_the_command_line_reads_files(tmp_path: Path) -> None:
    export(small("pos_bert_base"), tmp_path / "backbone")
    file = tmp_path / "shape.txt"
    file.write_text("\n".join(" ".join(map(str, row)) for row in CLOUDS["b"].tolist()))
    options = {"with_untrained": True, "threshold": 0.5, "layers": "last"}
    page = inspect([str(tmp_path / "backbone")], [file], out=tmp_path / "r.html", size="64", **options)
    text = page.read_text(encoding="ascii")
    assert "shape.txt" in text and "untrained" in text
    with pytest.raises(ValueError, match="accepted for clouds: a number of points"):
        inspect([str(tmp_path / "backbone")], [file], out=tmp_path / "s.html", size="64x32", **options)


def test_what_does_not_fit_is_named(tmp_path: Path, encoders) -> None:
    vit = ViT("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    with pytest.raises(ValueError, match="vit is for image"):
        write_cloud_report({"vit": vit}, CLOUDS, out=tmp_path / "r.html")
    with pytest.raises(ValueError, match="0 clouds given"):
        write_cloud_report(encoders, {}, out=tmp_path / "r.html")
    with pytest.raises(ValueError, match="threshold=2"):
        write_cloud_report(encoders, CLOUDS, out=tmp_path / "r.html", threshold=2)
    with pytest.raises(ValueError, match="is in training mode"):
        write_cloud_report({"x": small("point_mae").train()}, CLOUDS, out=tmp_path / "r.html")
