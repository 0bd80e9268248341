"""A run ends with its report and the commands that go on from it; a report that fails costs a line, and never the run."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from shrinking import ROOT, shrunk
from test_cli import refusal, write_images

from glpretrain.cli import VERBS, main
from glpretrain.cli.parsing import parse_verb
from glpretrain.cli.pretraining import pretrain
from glpretrain.core.imports import imported
from glpretrain.runs import calibrated_threshold

QUIET = ["--evaluate", "false", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos"), 14)
    return str(shrunk(ROOT / "mae.yaml", tmp_path))


def data_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.slow
def test_a_run_ends_with_its_report_and_commands_that_exist(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain(recipe, data="photos", overrides=QUIET)
    lines = capsys.readouterr().out.splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith(f"report: {run.folder / 'report.html'}"))
    assert lines[place + 1] == "next:"
    commands = [line.strip() for line in lines[place + 2 :]]
    assert [command.split()[1] for command in commands] == ["inspect", "embed", "finetune", "compare"]
    for command in commands:
        verb, *words = shlex.split(command)[1:]
        parse_verb(imported(VERBS[verb].function), words, verb=verb)
    text = (run.folder / "report.html").read_text()
    assert all(command in text for command in commands) and "the weights that the run started from" in text
    assert [item["name"] for item in data_of(run.folder / "report.html")["items"]] == sorted(f"{number}.png" for number in range(14))
    with (run.folder / "report.csv").open() as file:
        assert {row["why"] for row in csv.DictReader(file)} <= {"near duplicate", "stands apart"}
    for command in commands[:2]:
        assert main(shlex.split(command)[1:]) == 0

    # Again, for this run and for other items.
    page = (run.folder / "report.html").read_bytes()
    (run.folder / "report.html").unlink()
    assert main(["report", str(run.folder)]) == 0
    assert (run.folder / "report.html").read_bytes() == page
    write_images(Path("others"), 3)
    assert main(["report", str(run.folder), "--data", "others", "--out", "new/other.html"]) == 0
    assert len(data_of(Path("new/other.html"))["items"]) == 3
    assert "ends in .html" in refusal(["report", str(run.folder), "--out", "page.pdf"], capsys)
    assert "max_items: 1; accepted: 2 to 20000" in refusal(["report", str(run.folder), "--max_items", "1"], capsys)
    assert "config.yaml" in refusal(["report", "photos"], capsys)


def test_a_report_that_fails_costs_one_line(recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **options: object) -> None:
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr("glpretrain.cli.reporting.write_run_report", broken)
    run = pretrain(recipe, data="photos", overrides=QUIET)
    assert run.results["steps"] > 0 and (run.folder / "backbone").is_dir()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no report: ")]
    assert lines == [f"no report: no memory for this; the run itself is complete (glpretrain report {run.folder} tries again)"]


def test_a_run_without_a_report_keeps_nothing_for_it(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain(recipe, data="photos", overrides=[*QUIET, "--report", "false"])
    assert not {"start", "report.html", "report.csv"} & {path.name for path in run.folder.iterdir()}
    assert "report" not in capsys.readouterr().out.replace("report false", "")
    # It can be made later, with fresh weights in the place of those that were not kept.
    assert main(["report", str(run.folder)]) == 0
    assert "since the run did not keep those" in (run.folder / "report.html").read_text()


def test_inspect_takes_a_folder_and_opens_with_the_threshold_of_the_run(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain(recipe, data="photos", overrides=[*QUIET, "--report", "false"])
    backbone = run.folder / "backbone"
    assert main(["inspect", str(backbone), "photos", "--untrained"]) == 0
    data = data_of(Path("report.html"))
    assert len(data["images"]) == 8 and data["images"][0]["name"] == "0.png"
    assert {one["origin"] for one in data["backbones"]} == {"computed from these items"}
    results = json.loads((run.folder / "results.json").read_text())
    (run.folder / "results.json").write_text(json.dumps({**results, "after": {"prompt_threshold": 0.815}}))
    assert calibrated_threshold(run.folder, when="after") == 0.815 and calibrated_threshold(run.folder, when="before") is None
    assert main(["inspect", str(backbone), "photos/1.png", "--untrained"]) == 0
    data = data_of(Path("report-2.html"))
    assert [one["origin"] for one in data["backbones"]] == ["computed from these items", "calibrated on masks"]
    assert data["backbones"][1]["threshold"] == 0.815
    assert main(["inspect", str(backbone), "photos/1.png", "--threshold", "0.3"]) == 0
    assert data_of(Path("report-3.html"))["backbones"][0]["threshold"] == 0.3


def test_items_without_classes_are_scored_with_what_needs_none(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain(recipe, data="photos", overrides=[*QUIET, "--report", "false"])
    capsys.readouterr()
    assert main(["evaluate", str(run.folder / "backbone"), "--data", "photos", "--no_cache", "--out", "own.jsonl"]) == 0
    said = capsys.readouterr().err
    assert "left out: knn: " in said and "photos has no classes" in said and "left out: prompt: " in said
    lines = [json.loads(line) for line in Path("own.jsonl").read_text().splitlines()]
    assert {"rank_cls", "uniformity_cls", "found", "kept"} <= {line["score"] for line in lines}
    assert {line["n"] for line in lines} == {14} and {line["measured_on"] for line in lines} == {"photos"}
    scenes = {"class_path": "glpretrain.data.Scenes", "init_args": {"length": 9, "size": 48}}
    evaluators = {name: {"class_path": f"glpretrain.evaluate.{name}"} for name in ("Agreement", "Health", "KNN")}
    Path("mine.yaml").write_text(json.dumps({"sources": {"train": scenes, "test": scenes}, "evaluators": evaluators}))
    arguments = ["evaluate", str(run.folder / "backbone"), "--data", "photos", "--config", "mine.yaml", "--no_cache", "--no_pictures"]
    assert main([*arguments, "--out", "all.jsonl"]) == 0
    assert {json.loads(line)["evaluator"] for line in Path("all.jsonl").read_text().splitlines()} == {"Agreement", "Health"}
