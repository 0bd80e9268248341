"""Runs on labelled sets that scores cannot do with: training goes on, exits with 0, and the table says what was left out and why."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from shrinking import ROOT, shrunk

from glpretrain.cli import main
from glpretrain.cli.pretraining import pretrain
from glpretrain.data import ImageFolder
from glpretrain.data.own import train_test_parts

PLAIN = ["--data.views.init_args.global_views", "[{size: 48, scale: [0.4, 1.0], count: 2, saturation: 0.0, grayscale_prob: 0.0}]"]
QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]


def write(folder: Path, count: int, *, start: int = 0, channels: int = 3) -> None:
    folder.mkdir(parents=True)
    for number in range(start, start + count):
        ramp = torch.sin(torch.arange(20 * 30 * channels).reshape(20, 30, channels) * 0.013 * (1 + number))
        Image.fromarray((127 + 127 * ramp).to(torch.uint8).squeeze(2).numpy()).save(folder / f"{number}.png")


def write_mask(folder: Path) -> None:
    write(folder / "images", 1)
    (folder / "masks").mkdir()
    mask = torch.zeros(20, 30, dtype=torch.uint8)
    mask[4:16, 6:24] = 1
    Image.fromarray(mask.numpy()).save(folder / "masks" / "0.png")


def class_missing_in_val(folder: Path) -> None:
    for number, part in enumerate(("train/a", "train/b", "val/a")):
        write(folder / part, 5, start=10 * number)


def class_only_in_val(folder: Path) -> None:
    for number, part in enumerate(("train/a", "train/b", "val/c", "val/b")):
        write(folder / part, 5, start=10 * number)


def class_of_one(folder: Path) -> None:
    write(folder / "good", 12)
    write(folder / "defect", 1, start=99)


def one_item_in_train(folder: Path) -> None:
    write(folder / "train" / "a", 5)
    write(folder / "train" / "b", 1, start=10)
    write(folder / "val" / "b", 2, start=20)


def nothing_alike(folder: Path) -> None:
    for number, part in enumerate(("train/a", "train/b", "val/c")):
        write(folder / part, 3, start=10 * number)


CASES = {
    class_missing_in_val: ({"knn", "linear"}, {"knn_class b", "linear_class b", "prompt_miou"}),
    class_only_in_val: ({"knn", "linear"}, {"knn_class c", "knn_class a", "linear_class c"}),
    class_of_one: ({"knn", "linear"}, {"knn_class defect", "linear_class defect"}),
    one_item_in_train: ({"knn", "linear"}, {"knn_class a"}),
    nothing_alike: (set(), {"knn", "linear"}),
}


@pytest.mark.parametrize(("write_case", "expected"), CASES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_training_goes_on_and_says_what_was_left_out(
    write_case: Callable[[Path], None],
    expected: tuple[set[str], set[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_case(Path("data"))
    write_mask(Path("annotated"))
    trained = pretrain(str(shrunk(ROOT / "mae.yaml", tmp_path)), data="data", masks="annotated", overrides=QUIET)
    scored, left_out = expected
    results = trained.results
    assert results["steps"] == 2 and (trained.folder / "backbone" / "card.json").is_file()
    assert scored <= results["after"].keys() and results["before"].keys() == results["after"].keys()
    assert left_out <= results["left_out"].keys() and not results["left_out"].keys() & results["after"].keys()
    said = capsys.readouterr()
    lines = [line.split(": ")[1].split(", ") for line in said.err.splitlines() if line.startswith("left out: ")]
    assert all(sum(name in line for line in lines) == 1 for name in left_out)  # before training, and not again after it
    assert "left out" in said.out and "the backbone before and after" in said.out


def test_an_evaluation_without_any_score_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    nothing_alike(Path("data"))
    write_mask(Path("annotated"))
    run = pretrain(str(shrunk(ROOT / "mae.yaml", tmp_path)), overrides=[*QUIET, "--evaluate", "false", "--report", "false"])
    options = ["evaluate", str(run.folder / "backbone"), "--data", "data", "--masks", "annotated", "--no_cache"]
    assert main(options) == 1  # some evaluators were refused, others have scores
    said = capsys.readouterr()
    assert "left out: prompt miou" in said.err and "left out" in said.out
    lines = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    assert {line["evaluator"] for line in lines} == {"prompt"} and all(line["low"] is None for line in lines)
    assert "Infinity" not in Path("results.jsonl").read_text() and "NaN" not in Path("results.jsonl").read_text()
    Path("own.yaml").write_text(
        "sources: {test: {class_path: glpretrain.data.ImageFolder, init_args: {root: data/val/c}}}\n"
        "evaluators: {health: {class_path: glpretrain.evaluate.Health, init_args: {features: {size: 50}}}}\n"
    )
    assert main(["evaluate", str(run.folder / "backbone"), "--config", "own.yaml", "--no_cache"]) == 2
    assert "no score could be computed; health: " in capsys.readouterr().err


def test_pictures_that_no_embedded_source_replaces_train_without_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey pictures without labels: the embedded ones that scores would take have three channels."""
    monkeypatch.chdir(tmp_path)
    write(Path("grey"), 5, channels=1)
    options = ["--data.source.init_args.channels", "1", "--model.init_args.encoder.init_args.in_chans", "1", *PLAIN]
    card = ["--model.init_args.encoder.init_args.mean", "[0.5]", "--model.init_args.encoder.init_args.std", "[0.5]"]
    run = pretrain(str(shrunk(ROOT / "mae.yaml", tmp_path)), data="grey", overrides=[*QUIET, *options, *card])
    assert run.results["steps"] == 2 and not run.results["after"]
    assert set(run.results["left_out"]) == {"knn", "linear", "prompt_miou", "prompt_auc"}
    assert all("grey has 1 channels" in reason for reason in run.results["left_out"].values())


def test_a_resumed_run_is_scored_although_a_class_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    class_missing_in_val(Path("data"))
    write_mask(Path("annotated"))
    recipe = str(shrunk(ROOT / "mae.yaml", tmp_path))
    first = pretrain(recipe, data="data", masks="annotated", overrides=[*QUIET, "--evaluate", "false", "--report", "false"])
    checkpoint = ["--ckpt_path", str(first.folder / "checkpoints" / "last.ckpt"), "--trainer.max_steps", "3"]
    again = pretrain(recipe, data="data", masks="annotated", overrides=[*QUIET, *checkpoint])
    assert again.results["before"] is None and "knn" in again.results["after"] and "prompt_miou" in again.results["left_out"]


def test_frames_of_one_video_are_in_one_part(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / "data" / "ab"[number % 2] / f"video{number}", 3, start=3 * number)
    source = ImageFolder(tmp_path / "data")
    train, test = train_test_parts(source)
    assert len(train) + len(test) == len(source) == 60 and len(test) > 0 and set(train.groups).isdisjoint(test.groups)


def test_both_parts_of_a_folder_number_the_classes_alike(tmp_path: Path) -> None:
    class_only_in_val(tmp_path / "data")
    split = ImageFolder(tmp_path / "data").train_test_split()
    assert split is not None
    train, test = split
    assert list(train.classes) == list(test.classes) == ["a", "b", "c"]
    assert {train[index].label for index in range(len(train))} == {0, 1} and {test[index].label for index in range(len(test))} == {1, 2}
