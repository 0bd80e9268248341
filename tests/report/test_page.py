"""The report in a browser, from a file and without network: what a person clicks gives the mask that the evaluator gives."""

import base64

import numpy as np
import pytest
import torch
from browser import MISSING, Browser
from evaluate.evaluate_stubs import TableSource
from glpretrain.evaluate.pixels import Pixels
from PIL import Image
from test_inspect import features_of, picture, save, small, stored
from torch.nn import functional

from glpretrain.data.sources.base import Item
from glpretrain.encoders import FeatureMap, ViT
from glpretrain.evaluate.features import encode
from glpretrain.report import untrained, write_report

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ERROR = 2e-3  # of a cosine, that the page promises
ARROWS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015"}
PICTURES = [picture(), picture(64, 40).flip(-1)]


@pytest.fixture(scope="module")
def encoders():
    """Two grids, one of them not square; cosines of fresh weights spread over most of -1 to 1."""
    square = ViT("vit_tiny_patch16_224", img_size=56, patch_size=4, embed_dim=36, depth=2, num_heads=2)
    return {"before <1>": untrained(small()), "after": untrained(square, seed=1)}


@pytest.fixture(scope="module")
def page(encoders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    images = [save(folder / name, pixels) for name, pixels in zip(("one & only.png", "two.png"), PICTURES, strict=True)]
    return write_report(encoders, images, out=folder / "r.html", threshold=0.4)


@pytest.fixture(scope="module")
def window():
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(window, page):
    """The page, fresh; at the end it has asked for nothing and complained about nothing."""
    window.open(page)
    window.run("return window.glpretrainReport.ready")
    yield window
    assert window.run("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    assert [url for url in window.requested() if not url.startswith("data:")] == [page.as_uri()]
    assert window.console() == []


def similarity_of(patches, prompt, grid, size):
    """Float[H W], as `PromptSegmentation` upsamples it."""
    cosines = patches @ patches[prompt]
    return functional.interpolate(cosines.reshape(1, 1, *grid), size=size, mode="bilinear", align_corners=False)[0, 0]


def evaluated(encoder, pixels):
    """Float[N D]: the normalised patches that the evaluator would use."""
    source = TableSource([Item(image=pixels, label=-1, instances=None, regions=None)])
    ((_, output),) = encode(encoder, Pixels(source), fit="stretch")
    return functional.normalize(output.patches[0], dim=-1)


def shown(browser, i, b):
    """Bool[H W]: the mask on the page."""
    mask = browser.run("return window.glpretrainReport.mask(arguments[0], arguments[1])", i, b)
    return torch.tensor(mask["pixels"], dtype=torch.bool).reshape(mask["height"], mask["width"])


def prompt_of(browser, i, b):
    return browser.run("return window.glpretrainReport.prompt(arguments[0], arguments[1])", i, b)


def threshold_of(browser, i, b):
    return browser.run("return window.glpretrainReport.threshold(arguments[0], arguments[1])", i, b)


def assert_masks_are_the_evaluators(browser, page, encoders):
    for i, pixels in enumerate(PICTURES):
        for b, encoder in enumerate(encoders.values()):
            grid, size = encoder.grid(encoder.card.item_shape), encoder.card.item_shape[1:]
            prompt, threshold = prompt_of(browser, i, b)["index"], threshold_of(browser, i, b)
            mask = shown(browser, i, b)
            assert 0.02 < mask.float().mean() < 0.98
            similarity = similarity_of(evaluated(encoder, pixels), prompt, grid, size)
            differs = mask != (similarity > threshold)
            assert (similarity[differs] - threshold).abs().amax().item() < ERROR if differs.any() else True
            kept = torch.tensor(features_of(stored(page)["views"][i][b]))
            exact = similarity_of(kept, prompt, grid, size)
            assert (mask == (exact > threshold)).float().mean() >= 0.999
            on_page = browser.run("return window.glpretrainReport.similarity(arguments[0], arguments[1])", i, b)
            torch.testing.assert_close(torch.tensor(on_page, dtype=torch.float64).reshape(size), exact, rtol=0, atol=1e-6)


def canvases(browser):
    """Ids of the canvases that take a click, [image][backbone][image, similarity, mask, pca]."""
    found = iter(browser.find(".pictures canvas"))
    return [[[next(found) for _ in range(4)] for _ in range(2)] for _ in PICTURES]


def test_a_click_prompts_every_backbone_and_gives_the_evaluators_mask(browser, page, encoders):
    assert_masks_are_the_evaluators(browser, page, encoders)
    similarity = canvases(browser)[0][0][1]
    browser.click(similarity, x=0.7, y=0.2)  # of 3 rows and 5 columns
    assert prompt_of(browser, 0, 0) == {"row": 0, "column": 3, "index": 3}
    assert prompt_of(browser, 0, 1) == {"row": 2, "column": 9, "index": 2 * 14 + 9}  # of 14 and 14, at the middle of the other's patch
    assert prompt_of(browser, 1, 0) == {"row": 1, "column": 2, "index": 7}  # the other picture keeps its own
    assert_masks_are_the_evaluators(browser, page, encoders)
    for which in range(4):
        browser.click(canvases(browser)[1][1][which], x=0.1 + 0.2 * which, y=0.9)
        assert prompt_of(browser, 1, 1)["column"] == int((0.1 + 0.2 * which) * 14)
    assert_masks_are_the_evaluators(browser, page, encoders)


def test_the_slider_moves_the_masks(browser, page, encoders):
    before = shown(browser, 0, 0).sum()
    slider = browser.find("#threshold-0-0")[0]
    browser.keys(slider, 40 * ARROWS["right"])
    assert threshold_of(browser, 0, 0) == pytest.approx(0.6) == threshold_of(browser, 1, 1)
    assert shown(browser, 0, 0).sum() < before
    assert_masks_are_the_evaluators(browser, page, encoders)
    assert browser.run("return document.querySelector('#threshold-1-1').value") == "0.6"
    assert "above 0.600" in browser.run("return document.querySelector('.readout').textContent")
    browser.press(browser.find("#linked")[0])
    browser.keys(browser.find("#threshold-1-1")[0], ARROWS["left"])
    assert [threshold_of(browser, 0, b) for b in (0, 1)] == pytest.approx([0.6, 0.595])
    assert_masks_are_the_evaluators(browser, page, encoders)


def test_a_slider_that_was_never_in_sight_starts_from_the_threshold(browser):
    browser.run("document.querySelector('#main').style.marginTop = '9000px'")
    browser.keys(browser.find("#threshold-1-0")[0], ARROWS["right"])
    assert threshold_of(browser, 1, 0) == pytest.approx(0.405)


def test_arrow_keys_move_the_prompt_and_stop_at_the_border(browser):
    similarity = canvases(browser)[0][0][1]
    browser.keys(similarity, ARROWS["right"] + ARROWS["down"])
    assert prompt_of(browser, 0, 0) == {"row": 2, "column": 3, "index": 13}
    browser.keys(similarity, 5 * ARROWS["down"] + 4 * ARROWS["left"] + ARROWS["up"])
    assert prompt_of(browser, 0, 0) == {"row": 1, "column": 0, "index": 5}


def test_the_saved_mask_is_the_mask(browser):
    browser.press(browser.find(".pictures button")[1])
    with Image.open(browser.downloaded("one & only-after-mask.png")) as image:
        assert np.array_equal(np.array(image.convert("L")) == 255, shown(browser, 0, 1).numpy())


def test_attention_shows_the_chosen_block(browser, page):
    view = stored(page)["views"][0][0]
    shades = np.frombuffer(base64.b64decode(view["attention"]), np.uint8).reshape(3, 3, 3, 5)
    colours = np.frombuffer(base64.b64decode(stored(page)["colours"]), np.uint8).reshape(256, 3)
    read = "const c = document.querySelector('.heads canvas'); return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    for block in (2, 0):
        browser.run("const s = document.querySelector('select'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))", block)
        pixels = np.array(browser.run(read)).reshape(3, 5, 4)
        assert np.array_equal(pixels[:, :, :3], colours[shades[block, 0]])
    assert len(browser.find(".heads canvas")) == len(PICTURES) * (3 + 1 + 2 + 1)  # heads and their mean


def test_names_are_shown_as_they_are(browser):
    headings = browser.run("return [...document.querySelectorAll('.backbone h3')].map((heading) => heading.textContent)")
    assert headings == 2 * ["before <1>", "after"]
    assert browser.run("return document.title") == "Inspection of one & only.png, two.png"


def test_everything_to_operate_has_a_name_and_a_phone_needs_no_sideways_scrolling(page):
    with Browser(width=360, height=740, scheme="dark") as phone:
        phone.open(page)
        phone.run("return window.glpretrainReport.ready")
        assert phone.run("return document.documentElement.scrollWidth") == 360
        named = "(one) => one.textContent.trim() || one.labels?.length || one.ariaLabel"
        unnamed = f"return [...document.querySelectorAll('button, input, select, canvas')].filter((one) => !({named})(one)).length"
        assert phone.run(unnamed) == 0


def test_a_page_of_one_backbone_without_attention_offers_neither_tie_nor_blocks(window, tmp_path):
    page = write_report({"map": FeatureMap("resnet18", img_size=64).eval()}, [save(tmp_path / "a.png", picture())], out=tmp_path / "r.html")
    window.open(page)
    window.run("return window.glpretrainReport.ready")
    assert window.run("return document.querySelector('#linked').checkVisibility()") is False
    assert window.find("select") == []
    note = window.run("return document.querySelector('.backbone .note').textContent")
    assert note == "No attention maps: resnet18 given; accepted: a ViT or a PointTransformer."
    assert window.console() == []
