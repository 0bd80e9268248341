"""The report of a run: what its parts find in features and pictures, and what the page holds of a run."""

import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate.evaluate_stubs import TableSource
from golden import noise
from PIL import Image
from report.test_report import picture, small

from glpretrain.compare import Record
from glpretrain.core.clouds import in_unit_sphere
from glpretrain.data.sources.base import Item
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.report import untrained
from glpretrain.report.maps import own_threshold
from glpretrain.run_report import write_run_report
from glpretrain.run_report.facts import duration, scores
from glpretrain.run_report.findings import agreement, apart, copies, nearest
from glpretrain.run_report.projection import projected
from glpretrain.run_report.sampling import evenly_spaced, sampled
from glpretrain.run_report.sheet import sheet

ROOT = Path(__file__).parents[2]


def record(folder: Path, **changes: object) -> Record:
    values = {
        **{"folder": folder, "recipe": "mmc", "method": "MMC", "data": "photos <1>", "seed": 0, "steps": 7, "seconds": 61.0},
        "before": {"knn": 18.0, "knn_low": 16.0, "knn_high": 20.0, "knn_n": 100.0},
        "after": {"knn": 48.0, "knn_low": 46.0, "knn_high": 51.0, "knn_n": 100.0, "rank": 3.0, "rank_n": 5.0},
        **{"scored_on": {"knn": "scenes"}, "verdicts": (), "went_on": False, "settings": {}},
    }
    return Record(**{**values, **changes})  # type: ignore[arg-type]


def pictures(count: int, *, classes: int = 0) -> TableSource:
    """Pictures of two sizes, each of its own colours."""
    items = []
    for number in range(count):
        pixels = picture(40 + 13 * (number % 2), 60)
        shifted = (pixels.float() * (0.4 + 0.6 * torch.sin(torch.tensor([1.0, 2.0, 3.0]) * number).square()[:, None, None])).byte()
        items.append(Item(values=shifted.roll(5 * number, dims=2), label=number % classes if classes else -1, instances=None, regions=None))
    return TableSource(items, classes=[f"c{n}" for n in range(classes)])


def data_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def written(folder: Path, source: TableSource, *, encoder=None, **changes: object) -> Path:
    after = small() if encoder is None else encoder
    options = {"start": "fresh weights", "commands": ["glpretrain runs"], "out": folder / "report.html", **changes}
    return write_run_report(record(folder), {}, {"before": untrained(after), "after": after}, source, **options).page


def test_a_sample_is_evenly_spaced_and_never_larger_than_asked():
    assert evenly_spaced(3, 10) == [0, 1, 2]
    assert evenly_spaced(100, 4) == [12, 37, 62, 87]
    assert evenly_spaced(100_000, 2000)[-1] < 100_000 and len(set(evenly_spaced(100_000, 2000))) == 2000


def test_only_the_sample_of_a_large_source_is_read():
    source = pictures(40)
    found = sampled({"after": small()}, source, max_items=5)
    assert source.num_reads == 5 and len(found) == 5 and found.num_items == 40
    assert found.features["after"].shape == (5, 48)
    assert {one.size for one in found.pictures} == {(60, 40)}  # width and height, in the proportions of the items


def test_an_item_that_cannot_be_read_costs_one_picture():
    source = pictures(6)
    source.unreadable = {2}
    found = sampled({"after": small()}, source)
    assert found.index == (0, 1, 3, 4, 5) and found.unreadable == {"2": "item 2: truncated"}
    source.unreadable = set(range(6))
    with pytest.raises(ValueError, match="none of 6 items of table can be read"):
        sampled({"after": small()}, source)


def test_neighbours_are_the_largest_cosines_without_the_item_itself():
    rows = noise(29, 5, name="rows")
    found = nearest(rows, k=3)
    unit = torch.nn.functional.normalize(rows, dim=1)
    for item in range(29):
        table = unit @ unit[item]
        others = sorted((n for n in range(29) if n != item), key=lambda n: -table[n].item())
        assert found.index[item].tolist() == others[:3]
    assert nearest(rows[:2]).index.shape == (2, 1) and nearest(rows[:1]).index.shape == (1, 0)


def test_neighbours_of_the_same_class_are_counted():
    rows = torch.cat([torch.tensor([[1.0, 0.0]]) + 0.01 * noise(5, 2, name="a"), torch.tensor([[0.0, 1.0]]) + 0.01 * noise(5, 2, name="b")])
    found = nearest(rows, k=4)
    assert agreement(found, [0] * 5 + [1] * 5) == 100.0
    assert agreement(found, [0, 1] * 5) < 60.0
    assert agreement(found, [-1] * 10) is None


def test_what_lies_far_from_all_others_stands_apart():
    rows = torch.tensor([3.0, 0, 0, 0, 0]) + noise(40, 5, name="near")
    rows[17] = torch.tensor([-5.0, 1.0, -3.0, 0.0, 0.0])
    found = apart(nearest(rows))
    assert found[0].item == 17 and found[0].deviations > 4
    assert len(found) < 6
    assert apart(nearest(rows[:1])) == []


def test_copies_are_found_at_another_size_and_quality_and_blanks_are_not():
    first, second = (Image.fromarray(one.permute(1, 2, 0).numpy()) for one in (picture(), picture().flip(1)))
    shown = [first, second, first.resize((36, 27)), Image.new("RGB", (20, 20)), Image.new("RGB", (20, 20), (3, 3, 3))]
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.5], [1.0, 0.01], [0.0, 1.0], [0.0, 1.01]])
    (pair,) = copies(nearest(rows), shown)
    assert (pair.first, pair.second) == (0, 2) and pair.correlation > 0.97


def test_groups_of_features_are_groups_on_the_map():
    centres = 6 * noise(3, 8, name="centres")
    groups = torch.arange(60) % 3
    found = projected(centres[groups] + noise(60, 8, name="rows"))
    assert "t-SNE" in found.method and found.places.min() >= 0 and found.places.max() <= 1
    distance = np.linalg.norm(found.places[:, None] - found.places[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (groups.numpy()[distance.argmin(axis=1)] == groups.numpy()).mean() > 0.95


def test_few_items_lie_along_their_principal_components_and_one_alone_somewhere():
    found = projected(noise(7, 5, name="few"))
    assert "principal components" in found.method and np.isfinite(found.places).all()
    for count in (1, 2):
        assert np.isfinite(projected(noise(count, 5, name="few")).places).all()


def test_features_that_have_collapsed_give_a_map_too():
    """scikit-learn's t-SNE crashes the process on rows that are all the same."""
    for rows in (torch.ones(20, 5), torch.ones(20, 5) + 1e-9 * noise(20, 5, name="near"), torch.zeros(20, 5)):
        assert np.isfinite(projected(rows).places).all()
    copied = noise(20, 5, name="rows")
    copied[3:] = copied[2]
    assert np.isfinite(projected(copied).places).all()


def test_a_map_is_turned_towards_another_one():
    rows = noise(7, 5, name="few")
    first = projected(rows).places
    turned = np.stack([first[:, 1], 1 - first[:, 0]], axis=1)
    again = projected(rows, like=turned).places
    assert np.abs((again - again.mean(axis=0)) - (turned - turned.mean(axis=0))).max() < 0.05


def test_a_sheet_keeps_its_bound_with_smaller_pictures():
    rows = [Image.fromarray(picture(160, 160).roll(n, dims=2).permute(1, 2, 0).numpy()) for n in range(20)]
    large, bounded = sheet(rows), sheet(rows, most_bytes=12_000)
    assert large["side"] == 160 and bounded["side"] < 100
    assert len(str(bounded["picture"])) < 12_000 * 4 / 3 + 100
    assert sheet([Image.new("RGB", (33, 20))])["sizes"] == [(32, 19)] or sheet([Image.new("RGB", (33, 20))])["sizes"] == [(33, 20)]


def test_the_threshold_of_a_backbone_divides_its_own_cosines():
    groups = torch.eye(2).repeat_interleave(6, dim=0)  # two kinds of patches
    near_one = torch.cat([groups, 3 * torch.ones(12, 1)], dim=1)  # and a direction that all of them share
    assert 0 < own_threshold([groups]) < 1
    assert 0.9 < own_threshold([near_one]) < 1
    assert own_threshold([torch.ones(5, 3)]) == 0.5 == own_threshold([])


def test_durations_and_scores_are_said_in_words(tmp_path: Path):
    assert [duration(seconds) for seconds in (41.2, 552, 18180)] == ["41 s", "9 min 12 s", "5 h 3 min"]
    text = scores(record(tmp_path), {"prompt_miou": "no <masks>"})
    assert "[46.0, 51.0]" in text and "left out: prompt_miou: no &lt;masks&gt;" in text and "<details>" in text
    assert "Measured on scenes, and not on your items" in text
    assert "--evaluate false" in scores(record(tmp_path, before={}, after={}), {})


def test_the_page_holds_items_neighbours_and_what_to_act_on(tmp_path: Path):
    source = pictures(30, classes=3)
    source.items.append(source.items[4]._replace(values=source.items[4].values.clone()))
    page = written(tmp_path, source)
    data, text = data_of(page), page.read_text(encoding="ascii")
    assert len(data["items"]) == 31 and data["classes"] == ["c0", "c1", "c2"]
    assert [4, 30] in [pair[:2] for pair in data["copies"]]
    assert list(data["moments"]) == ["before", "after"] and data["moments"]["after"]["k"] == 8
    assert [one["name"] for one in data["backbones"]] == ["before training", "after training"]
    assert all(one["origin"] == "computed from these items" for one in data["backbones"])
    assert "photos &lt;1&gt;" in text and "<1>" not in text
    assert "of their item before training" in text and "glpretrain runs" in text
    table = page.with_suffix(".csv").read_text().splitlines()
    assert table[0] == "why,file,other,number,meaning" and any(line.startswith("near duplicate,4,30,") for line in table)
    assert not re.findall(r"(?:https?:)?//[\w-]+\.\w+|\bimport\(|\beval\(|\bfetch\(", text)


def test_a_page_of_many_items_says_how_many_of_them_it_shows(tmp_path: Path):
    text = written(tmp_path, pictures(30), max_items=12).read_text()
    assert "12 of 30, evenly spaced" in text and len(data_of(tmp_path / "report.html")["items"]) == 12


def test_calibrated_thresholds_of_the_run_open_the_pictures(tmp_path: Path):
    results = {"before": {"prompt_threshold": 0.12}, "after": {"prompt_threshold": 0.449999988}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    data = data_of(written(tmp_path, pictures(5)))
    assert [(one["threshold"], one["origin"]) for one in data["backbones"]] == [
        (0.12, "calibrated on masks"),
        (0.45, "calibrated on masks"),
    ]


def test_clouds_have_a_map_of_their_drawings_and_nothing_to_look_into(tmp_path: Path):
    class Clouds(TableSource):
        modality = "points"

    torch.manual_seed(0)
    encoder = PointTransformer("point_mae", num_points=90, points_per_token=8, group_size=8, embed_dim=24, depth=2, num_heads=3).eval()
    clouds = [in_unit_sphere(noise(90, 3, name=f"cloud {n}")) for n in range(5)]
    source = Clouds([Item(values=cloud, label=-1, instances=None, regions=None) for cloud in clouds])
    page = written(tmp_path, source, encoder=encoder)
    assert "looked into by the command `glpretrain inspect`" in page.read_text() and len(data_of(page)["items"]) == 5
    assert "Only pictures are compared" in page.read_text()


def test_a_report_on_sounds_plays_them(tmp_path: Path):
    class Recordings(TableSource):
        modality = "audio"

    sizes = {"img_size": [32, 16], "patch_size": 8, "in_chans": 1, "embed_dim": 12, "depth": 1, "num_heads": 3}
    encoder = untrained(ViT("vit_tiny_patch16_224", **sizes, mean=[-4.3], std=[9.1], modality="audio"))
    waves = [0.3 * noise(1, 5000 + 100 * number, name=f"sound {number}") for number in range(5)]
    source = Recordings([Item(values=wave, label=-1, instances=None, regions=None) for wave in waves])
    data = data_of(written(tmp_path, source, encoder=encoder))
    assert len(data["images"]) == 4 and all(sound["sound"].startswith("data:audio/wav;base64,") for sound in data["images"])
    assert [backbone["name"] for backbone in data["backbones"]] == ["before training", "after training"]
    assert data["backbones"][0]["grid"] == [2, 4] and len(data["items"]) == 5


def test_pictures_of_other_channels_cost_one_section(tmp_path: Path):
    source = pictures(5)
    source.items = [item._replace(values=torch.cat([item.values, item.values[:2]])) for item in source.items]
    page = written(tmp_path, source, encoder=small(in_chans=5))
    assert "No pictures to look into" in page.read_text() and len(data_of(page)["items"]) == 5


def test_wheels_hold_the_parts_of_the_report():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["glpretrain.run_report"]
    parts = [path.name for path in (ROOT / "glpretrain" / "run_report").iterdir() if path.is_file() and path.suffix != ".py"]
    assert parts and all(any(fnmatch(part, pattern) for pattern in listed) for part in parts)
    assert all((ROOT / "glpretrain" / "run_report" / part).read_text().isascii() for part in parts)
