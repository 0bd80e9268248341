"""The report in a browser, without network: a click on the map shows an item and its neighbours, a click on a patch its mask."""

import pytest
import torch
from browser import MISSING, Browser
from report.test_report import small
from test_run_report import pictures, written

pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(tmp_path_factory.mktemp("report"), pictures(40, classes=2))


@pytest.fixture
def browser(page):
    with Browser(width=1400) as window:
        opened(window, page)
        yield window
        assert [url for url in window.requested() if not url.startswith("data:")] == [page.as_uri()]
        assert window.console() == []


def opened(window, page):
    window.open(page)
    window.run("return Promise.all([window.glpretrainMap.ready, window.glpretrainReport.ready]).then(() => 1)")


def of_map(window, call, *arguments):
    return window.run(f"return window.glpretrainMap.{call}", *arguments)


def test_a_click_on_the_map_shows_the_item_and_its_neighbours(browser):
    (canvas,) = browser.find("#map-canvas")
    x, y = of_map(browser, "place(7)")
    expected = of_map(browser, "itemAt(arguments[0], arguments[1])", x, y)
    browser.click(canvas, x=x, y=y)
    chosen = of_map(browser, "chosen()")
    assert chosen == expected is not None
    assert browser.run("return document.querySelector('#map-chosen h3').textContent") == str(chosen)
    names = browser.run("return [...document.querySelectorAll('#map-chosen .thumb canvas')].map((one) => one.ariaLabel)")
    found = [
        one["item"] for moment in ("after", "before") for one in of_map(browser, "neighbours(arguments[0], arguments[1])", moment, chosen)
    ]
    assert names == [str(item) for item in found] and len(found) == 16
    browser.press(browser.find("#map-chosen .thumb")[0])  # go on from neighbour to neighbour
    assert of_map(browser, "chosen()") == found[0]


def test_buttons_zoom_keys_move_and_the_name_finds_an_item(browser):
    (canvas,), (closer,), (all_of_it,) = (browser.find(f"#map-{name}") for name in ("canvas", "in", "whole"))
    start = of_map(browser, "place(3)")
    browser.press(closer)
    assert of_map(browser, "zoom()") == 1.5
    zoomed = of_map(browser, "place(3)")
    browser.keys(canvas, "\ue014")
    assert of_map(browser, "place(3)")[0] < zoomed[0]
    browser.press(all_of_it)
    assert of_map(browser, "place(3)") == pytest.approx(start)
    browser.run("const f = document.querySelector('#map-find'); f.value = '31'; f.dispatchEvent(new Event('input')); return 1")
    assert of_map(browser, "chosen()") == 31
    browser.press(browser.find("#map-before")[0])
    assert of_map(browser, "moment()") == "before"
    browser.run("return new Promise((done) => setTimeout(done, 700))")
    assert of_map(browser, "place(3)") != pytest.approx(start)


def test_a_click_on_a_patch_gives_its_mask(browser):
    before = browser.run("return window.glpretrainReport.mask(0, 1).pixels")
    similarity = browser.find(".pictures canvas")[5]  # of the second backbone of the first picture
    browser.click(similarity, x=0.9, y=0.1)
    assert browser.run("return window.glpretrainReport.prompt(0, 1)")["index"] == 4  # of 3 rows and 5 columns
    mask = browser.run("return window.glpretrainReport.mask(0, 1)")
    assert mask["pixels"] != before and 0 < sum(mask["pixels"]) < len(mask["pixels"])
    threshold = browser.run("return window.glpretrainReport.threshold(0, 1)")
    shown = torch.tensor(browser.run("return window.glpretrainReport.similarity(0, 1)"))
    assert (shown > threshold).int().tolist() == mask["pixels"]


def test_pictures_are_shown_in_their_true_proportions(browser):
    shapes = browser.run("return [...document.querySelectorAll('.pictures canvas')].map((one) => one.width / one.height)")
    expected = [60 / (40 + 13 * (number % 2)) for number in (5, 15, 25, 35) for _ in range(8)]
    assert shapes == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (1400, "dark")])
def test_neither_a_phone_nor_a_screen_scrolls_sideways(page, width, scheme):
    with Browser(width=width, height=800, scheme=scheme) as window:
        opened(window, page)
        window.run("window.glpretrainMap.choose(2); return 1")
        assert window.run("return document.documentElement.scrollWidth") == width
        named = "(one) => one.textContent.trim() || one.labels?.length || one.ariaLabel"
        assert (
            window.run(f"return [...document.querySelectorAll('button, input, select, canvas')].filter((one) => !({named})(one)).length")
            == 0
        )
        assert window.console() == []


def test_three_hundred_pictures_stay_far_below_five_megabytes(tmp_path):
    assert written(tmp_path, pictures(300), encoder=small()).stat().st_size < 3e6
