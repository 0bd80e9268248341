"""What cannot be trained or scored as it was asked for: one line that names it, before anything is written."""

import json
import warnings
from pathlib import Path

import pytest
from PIL import Image
from shrinking import ROOT, shrunk

from glpretrain.cli import main
from glpretrain.cli.pretraining import pretrain
from glpretrain.prepare.faces import Preparation, TemplateParser
from glpretrain.runs import new_folder, point_latest

QUIET = ["--evaluate", "false", "--report", "false", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
ONE_VIEW = ["--data.views.init_args.global_views", "[{size: 48, scale: [0.4, 1.0]}]"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(name: str = "mae") -> str:
    return str(shrunk(ROOT / f"{name}.yaml", Path.cwd()))


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glpretrain: error: ")]
    assert (status, len(lines)) == (2, 1)
    return lines[0]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mae", ["--trainer.precision", "bf16-true"], "trainer.precision=bf16-true: weights are kept in float32; accepted: 32-true"),
        ("mae", ["--trainer.precision", "16-true"], "trainer.precision=16-true"),
        ("mae", ["--trainer.precision", "64"], "trainer.precision=64"),
        ("mae", ["--trainer.accelerator", "cpu", "--trainer.devices", "-1"], "`devices` selected with `CPUAccelerator`"),
        ("mae", ["--trainer.max_steps", "0"], "trainer.max_steps=0: nothing would be trained"),
        ("mae", ["--trainer.max_steps", "-1"], "give max_steps or max_epochs"),
        ("mae", ["--trainer.max_time", "00:00:00:00"], "the run ended before its first step"),
        ("mae", ["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches=0; accepted: whole numbers from 1 on"),
        ("mae", ["--trainer.overfit_batches", "1"], "trainer.overfit_batches=1 would be ignored"),
        ("mae", ["--trainer.sync_batchnorm", "true"], "trainer.sync_batchnorm=True would be ignored; leave it out: batch norm always"),
        ("mae", ["--trainer.gradient_clip_val", "1.0"], "set model.init_args.optimization.clip"),
        ("mae", ["--trainer.callbacks", "pytorch_lightning.callbacks.LearningRateMonitor"], "that has no logger"),
        ("mae", ["--model.init_args.optimization.lr.base", "-1e-3"], "optimization: lr: base is -0.001; accepted: values from 0 on"),
        ("mae", ["--model.init_args.optimization.lr.end", ".nan"], "Schedule: end=nan given; accepted: finite numbers"),
        ("mae", ["--model.init_args.optimization.weight_decay.base", "-0.1"], "optimization: weight_decay: base is -0.1"),
        ("mae", ["--model.init_args.optimization.betas", "[0.9, 1.0]"], "betas are in [0, 1), not (0.9, 1.0)"),
        ("dino", ["--model.init_args.optimization.clip.max_norm", ".nan"], "max_norm is nan"),
        ("dino", ["--model.init_args.momentum.end", "1.1"], "momentum: end is 1.1; accepted: values from 0 to 1"),
        ("dino", ["--model.init_args.teacher_temp.base", "0"], "teacher_temp: base is 0.0; accepted: values above 0"),
        ("dino", ["--model.init_args.student_temp", "-0.1"], "student_temp: accepted are values above 0, not -0.1"),
        ("dino", ["--model.init_args.num_prototypes", "0"], "num_prototypes: 0 given"),
        ("dino", ["--model.init_args.hidden_dim", "-3"], "negative dimension -3"),
        ("dino", ["--model.init_args.weights", "{cls: -1}"], "weights: {'cls': -1.0} given; accepted: numbers from 0 on"),
        ("dino", ["--data.batch_size", "0"], "batch_size is 0"),
        (
            "dino",
            [*ONE_VIEW, "--data.views.init_args.local_views", "null"],
            "so it needs at least two views of an item, not 1: set count: 2 in",
        ),
        ("ibot", [*ONE_VIEW, "--data.views.init_args.local_views", "null"], "or add data.views.local_views"),
        ("mae", ["--config", str(ROOT / "dino.yaml")], "are both whole recipes; give one of them"),
        ("mae", ["--runs", "photos/runs", "--data", "photos"], "runs: photos/runs lies in ./photos"),
    ],
    ids=lambda value: " ".join(value).replace("init_args.", "") if isinstance(value, list) else "",
)
def test_a_setting_that_cannot_be_trained_with_is_one_line(
    name: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(Path("photos"))
    assert said in refusal(["pretrain", recipe(name), *QUIET, *options], capsys)
    assert not Path("runs").exists(), "a start that fails leaves no folder"


def photos(folder: Path) -> None:
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 20, 90)).save(folder / f"{number}.png")


def test_one_global_view_beside_local_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    run = pretrain(recipe("dino"), overrides=[*QUIET, *ONE_VIEW])
    assert run.results["steps"] == 2


def test_a_fault_of_ours_keeps_its_traceback_and_says_how_to_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("glpretrain.cli.pretraining.find_recipe", broken)
    with pytest.raises(KeyError, match="lost") as caught:
        main(["pretrain", "mmc"])
    assert "Please report it" in "".join(caught.value.__notes__)


def test_memory_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr("glpretrain.cli.pretraining.find_recipe", full)
    assert "out of memory" in refusal(["pretrain", "mmc"], capsys)


def test_a_run_goes_on_through_latest_and_another_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe("dino")
    first = pretrain(path, overrides=QUIET)
    checkpoint = "runs/dino/latest/checkpoints/last.ckpt"
    assert Path(checkpoint).is_file()
    for options, said in (
        (["--model.init_args.num_prototypes", "7"], "is 16 x 8 in it and 7 x 8 in this run"),
        (["--model.init_args.encoder.init_args.depth", "2"], "its encoder has depth = 1, this run's 2; give the same encoder"),
    ):
        assert said in refusal(["pretrain", path, "--ckpt_path", checkpoint, *QUIET, *options], capsys)
    assert [one.name for one in Path("runs/dino").iterdir() if one.name != "latest"] == [first.folder.name]
    second = pretrain(path, overrides=["--ckpt_path", checkpoint, "--trainer.max_steps", "3", *QUIET])
    assert second.results["steps"] == 3
    assert second.results["resumed_from"] == str(first.folder / "checkpoints" / "last.ckpt")
    assert Path("runs/dino/latest").resolve() == second.folder.resolve()


def test_latest_stays_where_it_was_while_a_run_has_nothing_to_show() -> None:
    old = new_folder("mae", runs=Path("runs"))
    point_latest(old)
    new_folder("mae", runs=Path("runs"))
    assert Path("runs/mae/latest").resolve() == old.resolve()


def test_faces_of_an_earlier_run_are_no_pictures(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    out = tmp_path / "photos" / "faces"
    for _ in range(2):
        preparation = Preparation(tmp_path / "photos", out, parser=TemplateParser(), detector=None, size=16, workers=0)
        assert len(list(preparation.run())) == 4
    assert len(list(out.rglob("*.png"))) == 8


@pytest.mark.parametrize("inner", ["", "images", "images/people", "regions"])
def test_faces_are_not_written_over_the_pictures(inner: str, tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    (tmp_path / "out" / inner).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "photos").rename(tmp_path / "out" / inner)
    with pytest.raises(ValueError, match="would be written over the pictures"):
        Preparation(tmp_path / "out" / inner, tmp_path / "out", parser=TemplateParser(), detector=None, size=16)


def test_pictures_of_scores_are_not_drawn_into_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    photos(Path("photos"))
    said = refusal(["evaluate", "backbone", "--data", "photos", "--pictures", "photos/drawn"], capsys)
    assert "pictures: photos/drawn lies in photos" in said


def test_a_folder_that_is_no_backbone_is_one_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    for number in range(300):
        Path("photos", f"a_name_that_is_long_{number}.jpg").touch()
    line = refusal(["evaluate", "photos"], capsys)
    assert "and 294 more" in line and len(line) < 600


def test_settings_of_a_run_folder_name_the_run_and_not_the_link() -> None:
    run = pretrain(recipe(), overrides=QUIET)
    again = pretrain(recipe(), init_from="runs/mae/latest/backbone", overrides=QUIET)
    assert json.dumps(str(run.folder / "backbone")) in json.dumps(again.results["init_from"])
