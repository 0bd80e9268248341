"""Runs side by side: what becomes a row, means and tests against plain loops, and what the tables and the page hold."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from browser import MISSING, Browser
from scipy import stats

from glpretrain.cli import main
from glpretrain.cli.trust import read_yaml
from glpretrain.compare import Row, labels, pairs, read_record, records_below, rows_of


def write_run(
    runs: Path,
    *,
    recipe: str,
    seed: int,
    knn: float | None,
    time: str | None = None,
    batch_size: int = 32,
    steps: int = 100,
    data: str = "scenes",
    method: str | None = None,
    settings: bool = True,
    losses: Sequence[float] = (),
    **more: object,
) -> Path:
    """A finished run; `knn` is its score after training, and its linear probe is 1 above."""
    folder = runs / recipe / (time or f"20261130-00000{seed}")
    folder.mkdir(parents=True)
    after = None if knn is None else {"knn": knn, "knn_low": knn - 1, "knn_high": knn + 1, "knn_n": 50, "linear": knn + 1, "linear_n": 50}
    before = None if knn is None else {"knn": 10.0 + seed, "knn_n": 50, "linear": 11.0, "linear_n": 50, "knn_k": 5.0}
    results = {
        **{"recipe": recipe, "method": method or recipe.upper(), "data": data, "seed": seed, "steps": steps, "seconds": 100.0 + seed},
        **{"before": before, "after": after, "measured_on": {"knn": data, "linear": data}, "health": {"verdicts": []}},
    }
    (folder / "results.json").write_text(json.dumps(results | more))
    if settings:
        written = {"seed_everything": seed, "runs": str(runs), "trainer": {"max_steps": steps}}
        model = {"class_path": method or recipe.upper(), "init_args": {"width": 8}}
        written |= {"model": model, "data": {"seed": seed, "batch_size": batch_size, "source": {"class_path": data}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(written))
    if losses:
        lines = [f"{step},{loss},{1 + step}" for step, loss in enumerate(losses)]
        (folder / "metrics.csv").write_text("\n".join(["step,train/loss,health/rank_cls", *lines, ""]))
    return folder


def rows_in(runs: Path, *, by: Sequence[str] = ()) -> list[Row]:
    return rows_of(records_below([runs], settings=read_yaml)[0], by=by)[0]


def two_recipes(runs: Path, *, losses: Sequence[float] = ()) -> None:
    for seed, (one, other) in enumerate(((30.0, 21.0), (34.0, 22.0), (35.0, 26.0))):
        write_run(runs, recipe="mmc", seed=seed, knn=one, losses=losses)
        write_run(runs, recipe="mae", seed=seed, knn=other, losses=losses)


def test_means_spreads_and_intervals_are_those_of_the_formulas(tmp_path: Path) -> None:
    two_recipes(tmp_path)
    (row,) = [row for row in rows_in(tmp_path) if row.key == (("recipe", "mmc"), ("data", "scenes"))]
    found = row.summary("knn")
    assert found is not None and row.seeds == (0, 1, 2) and row.seconds == 101.0
    std = math.sqrt(((30 - 33) ** 2 + (34 - 33) ** 2 + (35 - 33) ** 2) / 2)
    half = 4.302653 * std / math.sqrt(3)  # Student's 97.5 % quantile with two degrees of freedom, from a table
    assert found == pytest.approx((3, 11.0, 33.0, std, 33 - half, 33 + half), rel=1e-6)


def test_the_paired_test_is_that_of_the_differences(tmp_path: Path) -> None:
    two_recipes(tmp_path)
    (pair,) = pairs(rows_in(tmp_path), "knn")
    assert (pair.first, pair.second) == ("mmc", "mae")  # the better one first
    differences = [30 - 21, 34 - 22, 35 - 26]
    mean = sum(differences) / 3
    error = math.sqrt(sum((one - mean) ** 2 for one in differences) / 2 / 3)
    p = 2 * stats.t.sf(abs(mean) / error, 2)
    assert (pair.difference, pair.low, pair.high) == pytest.approx((mean, mean - 4.302653 * error, mean + 4.302653 * error), rel=1e-6)
    assert pair.p == pytest.approx(p) and pair.adjusted == pytest.approx(p) and pair.seeds == (0, 1, 2)


def test_of_several_pairs_the_smallest_p_is_taken_most_often(tmp_path: Path) -> None:
    two_recipes(tmp_path)
    for seed, knn in enumerate((29.0, 34.5, 33.0)):
        write_run(tmp_path, recipe="dino", seed=seed, knn=knn)
    found = sorted(pairs(rows_in(tmp_path), "knn"), key=lambda pair: pair.p or 0)
    p = [pair.p or 0 for pair in found]
    expected = [min(1, 3 * p[0]), max(3 * p[0], 2 * p[1]), max(3 * p[0], 2 * p[1], p[2])]
    assert [pair.adjusted for pair in found] == pytest.approx([min(1, one) for one in expected])
    assert p[0] < p[1] < p[2]


def test_rows_are_paired_over_common_seeds_of_the_same_items_only(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path, recipe="mmc", seed=seed, knn=30.0 + seed**2)
    for seed in (1, 2, 3):
        write_run(tmp_path, recipe="mae", seed=seed, knn=20.0)
        write_run(tmp_path, recipe="dino", seed=seed, knn=20.0, data="flowers")
    write_run(tmp_path, recipe="ibot", seed=1, knn=20.0)
    (pair,) = pairs(rows_in(tmp_path), "knn")
    assert (pair.first, pair.second) == ("mmc, scenes", "mae, scenes") and pair.seeds == (1, 2)


def test_equal_differences_have_no_p(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, recipe="mmc", seed=seed, knn=30.0 + seed)
        write_run(tmp_path, recipe="mae", seed=seed, knn=20.0 + seed)
    (pair,) = pairs(rows_in(tmp_path), "knn")
    assert abs(pair.difference) == 10.0 and pair.p is None and pair.low is None


def test_a_setting_that_differs_makes_a_row_of_its_own(tmp_path: Path) -> None:
    write_run(tmp_path, recipe="mmc", seed=0, knn=30.0, time="1")
    write_run(tmp_path, recipe="mmc", seed=0, knn=31.0, time="2", batch_size=64)
    write_run(tmp_path, recipe="mmc", seed=1, knn=32.0, time="3", batch_size=64)
    rows = rows_in(tmp_path)
    assert labels(rows) == ["data.batch_size 32", "data.batch_size 64"] and [row.seeds for row in rows] == [(0,), (0, 1)]
    assert [row.seeds for row in rows_in(tmp_path, by=["method", "data.batch_size"])] == [(0,), (0, 1)]
    with pytest.raises(ValueError, match=r"runs with method MMC differ in more than their seed: data\.batch_size is 32 and 64; add"):
        rows_in(tmp_path, by=["method"])
    with pytest.raises(ValueError, match=r"by: no run has a setting 'data\.bach_size'"):
        rows_in(tmp_path, by=["recipe", "data.bach_size"])


def test_names_of_settings_may_leave_out_init_args(tmp_path: Path) -> None:
    write_run(tmp_path, recipe="mmc", seed=0, knn=30.0)
    assert rows_in(tmp_path, by=["model.width"])[0].key == (("model.width", "8"),)
    assert labels(rows_in(tmp_path, by=["model.init_args.width"])) == ["model.init_args.width 8"]


def test_the_newest_run_of_a_seed_counts_and_the_other_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, recipe="mmc", seed=0, knn=90.0, time="1")
    write_run(tmp_path, recipe="mmc", seed=0, knn=20.0, time="2")
    (tmp_path / "mmc" / "latest").symlink_to("2")
    unfinished = tmp_path / "mmc" / "3"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("seed_everything: 0\n")
    assert main(["compare", str(tmp_path), str(tmp_path / "mmc" / "latest")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "20.0" in said and "90.0" not in said
    assert f"a newer run has the same settings and seed: {tmp_path}/mmc/1" in said
    assert f"left out, not finished: {unfinished}" in said


def test_rows_by_method_and_seed_are_single_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_recipes(tmp_path)
    assert main(["compare", str(tmp_path), "--by", "method,seed", "--out", str(tmp_path / "t.csv")]) == 0
    lines = [line for line in csv.DictReader((tmp_path / "t.csv").open()) if line["score"] == "knn"]
    assert sorted((line["method"], line["seed"], float(line["mean"])) for line in lines)[:2] == [("MAE", "0", 21.0), ("MAE", "1", 22.0)]
    assert len(lines) == 6 and {line["std"] for line in lines} == {""}


def test_markdown_has_the_rows_and_the_differences(tmp_path: Path) -> None:
    two_recipes(tmp_path)
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "t.md")]) == 0
    text = (tmp_path / "t.md").read_text()
    assert "| recipe | data | seeds | steps | seconds | k-NN | linear probe |" in text
    assert "| mmc | scenes | 0, 1, 2 | 100 | 101 | 11.0 -> 33.0 ± 2.6 [26.4, 39.6] | 11.0 -> 34.0 ± 2.6 [27.4, 40.6] |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| k-NN |")]
    assert "| 0, 1, 2 |" in line and "10.0 [" in line and "(Holm " in line


def test_csv_has_every_score_and_no_choice(tmp_path: Path) -> None:
    write_run(tmp_path, recipe="mmc", seed=0, knn=30.0)
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "t.csv")]) == 0
    lines = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [line["score"] for line in lines] == ["knn", "linear"]
    assert lines[0]["before"] == "10.0" and lines[0]["count"] == "1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not a folder; accepted: folders of runs"),
        (["empty"], "no finished run in empty"),
        (["runs", "--scores", "knnn"], "scores: no run has 'knnn'; accepted: knn, linear"),
        (["runs", "--out", "table.txt"], "out: table.txt; accepted: a file that ends in .html, .md, .csv"),
        (["broken"], "results.json: this is not what a run writes (KeyError: 'recipe')"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs"), recipe="mmc", seed=0, knn=30.0)
    Path("empty").mkdir()
    Path("broken/mmc/1").mkdir(parents=True)
    Path("broken/mmc/1/results.json").write_text("{}")
    assert main(["compare", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_runs_that_were_not_scored_are_still_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, recipe="mmc", seed=0, knn=None)
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "p.html")]) == 0
    assert "mmc" in capsys.readouterr().out


def test_seconds_of_a_run_that_went_on_are_marked(tmp_path: Path) -> None:
    write_run(tmp_path, recipe="mmc", seed=0, knn=30.0, resumed_from="last.ckpt")
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "t.md")]) == 0
    text = (tmp_path / "t.md").read_text()
    assert "| 100* |" in text and "its seconds are those of its last part" in text


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_page_shows_tables_scatter_and_curves_and_asks_for_nothing(tmp_path: Path) -> None:
    two_recipes(tmp_path, losses=(3.0, 2.0, 1.5, 1.2))
    page = tmp_path / "page.html"
    assert main(["compare", str(tmp_path), "--out", str(page)]) == 0
    with Browser(width=400, height=800, scheme="dark") as browser:
        browser.open(page)
        assert [url for url in browser.requested() if not url.startswith(("file:", "data:"))] == []
        assert browser.console() == []
        shown = browser.run("return [...document.querySelectorAll('.panel svg')].map(e => e.getAttribute('aria-label'))")
        assert shown == [
            "seconds of training against k-NN",
            "seconds of training against linear probe",
            "rank of cls over the steps",
            "loss of MAE over the steps",
            "loss of MMC over the steps",
        ]
        assert browser.run("return [...document.querySelectorAll('.best')].map(e => e.textContent)") == ["33.0 ± 2.6", "34.0 ± 2.6"]
        assert browser.run("return document.documentElement.scrollWidth") <= 400


def test_a_fine_tuned_run_is_read_in_the_terms_of_a_pretraining(tmp_path: Path) -> None:
    score = {"value": 52.0, "low": 48.0, "high": 56.0, "n": 600, "measured_on": "flowers/val"}
    written = {
        **{"recipe": "finetune/classification", "task": "classification", "seed": 1, "steps": 910, "seconds": 90.0},
        **{"scores": {"accuracy": score}, "data": {"train": {"name": "flowers"}, "test": {"name": "flowers/val"}}},
    }
    (tmp_path / "results.json").write_text(json.dumps(written))
    record = read_record(tmp_path, settings=read_yaml)
    assert (record.method, record.data, record.seed, record.before) == ("classification", "flowers", 1, {})
    assert record.after == {"accuracy": 52.0, "accuracy_low": 48.0, "accuracy_high": 56.0, "accuracy_n": 600.0}
    assert record.scored_on == {"accuracy": "flowers/val"}
