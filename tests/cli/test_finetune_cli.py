"""`glpretrain finetune` and `predict`: from a backbone and a folder to a model, its scores and a table; mistakes cost one line."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from glpretrain.cli import main
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.finetune import Classification, FineTuned
from glpretrain.runs import Run
from glpretrain.weights import export, load_backbone

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (230, 30, 20)}
SMALL = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--data.batch_size", "4", "--data.num_workers", "0"]


def picture(path: Path, colour: tuple[int, int, int], *, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), tuple(max(0, value - 9 * shade) for value in colour)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, photos/ and new/."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(1)  # fresh weights of a run are drawn from 0
    export(ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3), folder / "backbone")
    for name, colour in COLOURS.items():
        for number in range(8):
            picture(folder / "photos" / "train" / name / f"{number}.png", colour, shade=number)
            picture(folder / "photos" / "val" / name / f"{number}.png", colour, shade=number)
        picture(folder / "new" / f"{name}.png", colour)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    """A model that was fine-tuned by the command."""
    settings = ["--model.init_args.optimization.lr.base", "0.01", "--model.init_args.mixup", "0", "--no_probe", "--resume", "never"]
    options = ["--data", str(place / "photos"), "--epochs", "12", "--runs", str(place / "runs"), *settings]
    assert main(["finetune", str(place / "backbone"), *options, *SMALL]) == 0
    return place / "runs" / "finetune" / "classification" / "latest" / "model"


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("glpretrain: error: ")
    return line


def test_a_run_learns_scores_and_leaves_a_model(model: Path) -> None:
    run = Run(model.parent)
    results = run.results
    assert results["scores"]["accuracy"]["value"] > 90.0 and results["scores"]["accuracy"]["n"] == 24
    assert (results["epochs"], results["steps"]) == (12, 72)
    assert results["classes"] == list(COLOURS) and results["data"]["test"]["items"] == 24
    card = FineTuned.load(model).card
    assert card.scores == results["scores"] and card.transform.size == (16, 16)
    assert "classification" in card.encoder.source and str(model.parents[4] / "backbone") in card.encoder.source
    assert {path.name for path in model.parent.iterdir()} >= {"config.yaml", "results.json", "model", "checkpoints", "views.png"}
    assert (model.parent / "config.yaml").read_text().count("size: 16") == 1  # the size of the backbone, written out


def test_predict_names_the_classes_of_new_files(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "new" / "broken.png").write_bytes(b"no picture")
    assert main(["predict", str(model), "new", "--pictures", "sheets"]) == 0
    (here / "new" / "broken.png").unlink()
    said = capsys.readouterr()
    assert said.err.strip() == "skipped, cannot be read: new/broken.png: no image file that Pillow can read"
    assert "3 predictions in predictions.csv, 1 that cannot be read are left out" in said.out
    rows = list(csv.DictReader((here / "predictions.csv").open()))
    assert {Path(row["file"]).stem: row["class"] for row in rows} == {name: name for name in COLOURS}
    for row in rows:
        probabilities = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1.0, abs=1e-5)
    with Image.open(here / "new" / "red.png") as red:
        best = FineTuned.load(model).predict([red]).max().item()
    assert float(next(row for row in rows if row["class"] == "red")["probability"]) == pytest.approx(best, abs=1e-6)
    assert {path.name for path in (here / "sheets").iterdir()} == {"most_certain.png", "least_certain.png"}


def test_predict_takes_files_and_names_as_many_classes_as_asked_for(model: Path, here: Path) -> None:
    assert main(["predict", str(model), "new/red.png", "new/red.png", "new/blue.png", "--out", "two.csv", "--top", "1"]) == 0
    assert (here / "two.csv").read_text().splitlines()[0] == "file,class,probability"
    assert len((here / "two.csv").read_text().splitlines()) == 3


def test_predict_leaves_no_half_table(model: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["glpretrain.cli.predict"], "predictions", broken)
    assert main(["predict", str(model), "new", "--out", "half.csv"]) == 130
    assert not list(here.glob("*half.csv*"))


def test_a_table_of_unreadable_files_only_is_refused(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "text.png").write_text("no picture")
    assert "none of 1 files can be read" in refusal(["predict", str(model), "text.png", "--out", "none.csv"], capsys)
    assert not (here / "none.csv").exists()


def test_a_fine_tuned_model_is_exported_by_the_verb_for_backbones(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(model), "program", "--format", "torch"]) == 0
    assert "exported to program/model.pt2: largest difference of logits to the model 0.0e+00" in capsys.readouterr().out
    assert json.loads((here / "program" / "card.json").read_text())["transform"]["size"] == [16, 16]
    assert "a fine-tuned model is written as torch or onnx" in refusal(["export", str(model), "other"], capsys)
    assert "licence given; a fine-tuned model takes --format only" in refusal(
        ["export", str(model), "other", "--format", "onnx", "--licence", "mine"], capsys
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", "nowhere", "new"], "model: nowhere does not exist; accepted: a folder that glpretrain finetune wrote"),
        (["predict", "backbone", "new"], "model: backbone is a backbone"),
        (["predict", "MODEL", "empty"], "predict: no image in empty"),
        (["predict", "MODEL", "nothing.png"], "predict: nothing.png does not exist"),
        (["predict", "MODEL", "new", "--out", "new"], "--out new is a folder; accepted: a file"),
        (["predict", "MODEL", "new", "--top", "0"], "--top 0"),
        (["predict", "MODEL", "new", "--pictures", "new/sheets"], "would be read as items"),
        (["finetune", "nowhere"], "nowhere does not exist"),
        (["finetune", "backbone", "--data", "new"], "new has no classes; accepted: a folder for each of two classes or more"),
        (["finetune", "backbone", "--data", "one"], "one has no classes; accepted: a folder for each of two classes or more"),
        (["finetune", "backbone", "--data", "empty"], "no image in"),
        (["finetune", "clouds", "--data", "photos"], "is a backbone for points; accepted: backbones for images"),
        (["finetune", "backbone", "--config", "mmc"], "--config mmc pretrains; accepted: a recipe of fine-tuning"),
        (["finetune", "backbone", "--model.init_args.drop_pth", "0.1"], "did you mean drop_path?"),
        (["finetune", "backbone", "--data.views.init_args.size", "17"], "17"),
        (["pretrain", "finetune/classification"], "use it as in: glpretrain finetune BACKBONE --config finetune/classification"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_cost_one_line(arguments: list[str], said: str, model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir(exist_ok=True)
    picture(here / "one" / "only" / "0.png", (0, 0, 0))
    if "clouds" in arguments and not (here / "clouds").exists():
        sizes = {"num_points": 40, "points_per_token": 4, "group_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
        export(PointTransformer("pos_bert_base", **sizes), here / "clouds")
    before = sorted(path.name for path in here.glob("runs/finetune/*/*"))
    assert said in refusal([str(model) if word == "MODEL" else word for word in arguments], capsys)
    assert sorted(path.name for path in here.glob("runs/finetune/*/*")) == before


@pytest.mark.slow
def test_the_frozen_backbone_is_scored_first_and_the_head_alone_may_learn(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "photos", "--freeze", "--epochs", "1", "--seed", "3", "--runs", "frozen", "--resume", "never"]
    assert main(["finetune", "backbone", *options, *SMALL]) == 0
    said = capsys.readouterr().out
    assert "linear probe on the frozen backbone: accuracy" in said and "start: backbone, frozen; 3 classes" in said
    run = Run(here / "frozen" / "finetune" / "classification" / "latest")
    assert run.results["frozen_backbone"] and run.results["linear_probe"]["n"] == 24 and run.results["seed"] == 3
    trained, start = FineTuned.load(run.folder / "model").branch.encoder.backbone_state(), load_backbone("backbone").backbone_state()
    assert trained.keys() == start.keys() - {"norm.weight", "norm.bias"}
    assert all(torch.equal(value, start[name]) for name, value in trained.items())


@pytest.mark.slow
def test_a_run_from_scratch_has_other_weights_of_the_same_architecture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "photos", "--from_scratch", "--epochs", "1", "--no_probe", "--runs", "scratch", "--resume", "never"]
    assert main(["finetune", "backbone", *options, *SMALL, "--model.init_args.optimization.lr.base", "1e-9"]) == 0
    assert "fresh weights of backbone" in capsys.readouterr().out
    model = FineTuned.load(here / "scratch" / "finetune" / "classification" / "latest" / "model")
    state, start = model.branch.encoder.backbone_state(), load_backbone(here / "backbone").backbone_state()
    assert all(state[name].shape == start[name].shape for name in state)
    assert not torch.allclose(state["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"], atol=1e-3)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the third of six steps and given again: the model is that of a run without a break, to the last bit."""
    options = ["finetune", "backbone", "--data", "photos", "--no_probe", "--model.init_args.mixup", "0.8", *SMALL]
    assert main([*options, "--trainer.max_epochs", "1", "--runs", "whole"]) == 0
    count, losses = [0], Classification.losses

    def interrupted(self, batch, progress):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return losses(self, batch, progress)

    monkeypatch.setattr(Classification, "losses", interrupted)
    assert main([*options, "--trainer.max_epochs", "1", "--runs", "broken"]) == 130
    assert main([*options, "--trainer.max_epochs", "1", "--runs", "broken"]) == 0
    states = [
        FineTuned.load(here / runs / "finetune" / "classification" / "latest" / "model").branch.state_dict() for runs in ("whole", "broken")
    ]
    assert Run(here / "broken" / "finetune" / "classification" / "latest").results["resumed_from"]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
