"""The command line: a mistake costs one line and a non-zero exit; a run folder holds what it promises; nothing is overwritten."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from processes import together
from shrinking import QUIET, ROOT, shrunk

import glpretrain
from glpretrain.callbacks.evaluators import result_key
from glpretrain.cli import VERBS, main, one_line
from glpretrain.cli.parsing import parse_verb, verb_parser
from glpretrain.cli.pretraining import pretrain
from glpretrain.cli.training import Training
from glpretrain.core.imports import imported
from glpretrain.core.types import EncoderCard
from glpretrain.runs import find_recipe, new_folder, point_latest, recipe_name, recipe_names


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mae(tmp_path: Path) -> Path:
    return shrunk(ROOT / "mae.yaml", tmp_path)


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        ramp = torch.arange(20 * 30 * 3).reshape(20, 30, 3)
        Image.fromarray((127 + 127 * torch.sin(ramp * 0.01 + number)).to(torch.uint8).numpy()).save(folder / f"{number}.png")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which `glpretrain` refuses."""
    status = main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glpretrain: error: ")]
    assert status == 2
    assert len(lines) == 1
    return lines[0]


def test_help_lists_verbs_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("pretrain", "evaluate", "export", "inspect", "bench", "mmc"))


@pytest.mark.parametrize("given", [[], ["runs"], ["recipes"], ["compare", "--help"], ["tiles", "--help"]])
def test_what_needs_no_tensor_imports_nothing_heavy(given: list[str]) -> None:
    code = (
        f"import sys, contextlib, glpretrain.cli\nwith contextlib.suppress(SystemExit):\n    glpretrain.cli.main({given})\n"
        "sys.exit(bool({'pytorch_lightning', 'timm', 'torch', 'wandb'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_package_offers_its_names_lazily() -> None:
    assert glpretrain.fit.__module__ == "glpretrain.cli.pretraining"
    with pytest.raises(AttributeError, match="it offers"):
        _ = glpretrain.fits


def test_unknown_recipe_lists_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(["pretrain", "mmcc"], capsys)
    assert "'mmcc'" in line
    assert "local_contrast" in line
    assert "paper/mmc_vits16_in1k" in line


def test_unknown_verb_lists_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(["pretrian", "mmc"], capsys)
    assert "there is no verb 'pretrian'; did you mean pretrain? (accepted: pretrain, fit, evaluate" in line


def test_purposes_in_the_help_are_the_first_lines_of_the_verbs() -> None:
    for verb in VERBS.values():
        assert (imported(verb.function).__doc__ or "").splitlines()[0] == verb.purpose


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "fit"])
def test_every_verb_explains_each_of_its_arguments(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: glpretrain {verb} ") and VERBS[verb].purpose in text
    for action in verb_parser(imported(VERBS[verb].function), verb=verb)._actions:
        assert action.help, action.dest


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shell_completes_verbs_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--print_shtab={shell}"]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*VERBS, "--no_pictures", "--min_tissue"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "b", "out", "--formt", "onnx"], "nothing reads 'formt'; did you mean format?"),
        (["export", "b", "out", "--format", "pickle"], "format: 'pickle' given; accepted: Literal['folder', 'timm', 'huggingface'"),
        (["export", "b"], "the following arguments are required: out"),
        (["tiles", "a.svs"], "the following arguments are required: out"),
        (["tiles", "a.svs", "--out", "t", "--size", "large"], "size: 'large' given; accepted: int"),
        (["inspect", "b", "a.png", "--treshold", "0.4"], "nothing reads 'treshold'; did you mean threshold?"),
        (["bench", "mmc", "--scaling", "local"], "scaling: 'local' given; accepted: Literal['locals', 'batch', 'prototypes', 'files']"),
        (["faces", "f", "--out", "o", "--table", "laba"], "table: 'laba' given; accepted:"),
        (["evaluate"], "the following arguments are required: backbone"),
        (["--print_shtab=elvish"], "shtab-elvish"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_cost_one_line_in_every_verb(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(arguments, capsys)


def test_options_and_positions_may_be_mixed() -> None:
    def verb(first: str, others: list[str], *, size: tuple[int, ...] | None = None, compare: list[str] | None = None, dry: bool = False):
        """Do it.

        Args:
            first: one
            others: more
            size: sizes
            compare: others
            dry: only
        """

    given = ["a", "--dry", "b", "--compare=x", "c", "--compare", "y", "--size", "3", "4"]
    assert parse_verb(verb, given, verb="verb") == {
        "first": "a", "others": ["b", "c"], "size": [3, 4], "compare": ["x", "y"], "dry": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("section", "known"),
    [
        ("trainer", "max_steps"),
        ("data", "batch_size"),
        ("model.init_args", "weights"),
        ("model.init_args.encoder.init_args", "img_size"),
        ("data.views.init_args", "global_views"),
    ],
)
def test_misspelt_key_is_named_with_what_is_accepted(mae: Path, section: str, known: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(mae.read_text())
    inner = recipe
    for key in section.split("."):
        inner = inner[key]
    inner["bacth"] = 3
    mae.write_text(yaml.safe_dump(recipe))
    line = refusal(["pretrain", str(mae), *QUIET], capsys)
    assert "bacth" in line
    assert known in line
    assert not Path("runs").exists()


def test_misspelt_override_is_named(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(["pretrain", str(mae), "--trainer.max_stepz", "3"], capsys)
    assert "trainer: nothing reads 'max_stepz'; did you mean max_steps? (accepted: accelerator," in line


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data.batch_size", "many", "data.batch_size: 'many' given; accepted: int"),
        ("model.init_args.optimization", {"lr": {"base": "fast"}}, "model.optimization.lr.base: 'fast' given; accepted: float"),
        ("model.init_args.optimization", {"lr": {"bse": 1.0}}, "model.optimization.lr: nothing reads 'bse'; did you mean base?"),
        ("model.init_args.encoder.init_args.depth", "deep", "model.encoder.depth: 'deep' given; accepted: int, null"),
        ("data.source.class_path", "glpretrain.data.Scene", "data.source: there is no class glpretrain.data.Scene; did you mean Scenes?"),
    ],
)
def test_a_mistake_in_a_recipe_names_key_value_and_what_is_accepted(
    mae: Path, key: str, value: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load(mae.read_text())
    *parents, last = key.split(".")
    inner = recipe
    for name in parents:
        inner = inner[name]
    inner[last] = value
    mae.write_text(yaml.safe_dump(recipe))
    assert said in refusal(["pretrain", str(mae), *QUIET], capsys)


def test_unknown_method_lists_what_exists(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mae.write_text(mae.read_text().replace("methods.MAE", "methods.MEA"))
    line = refusal(["pretrain", str(mae)], capsys)
    assert "MEA" in line
    assert "LocalContrast" in line


def test_fit_without_config_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data.source" in refusal(["fit"], capsys)


def test_missing_folder_is_named(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere is not a folder" in refusal(["pretrain", str(mae), "--data", "nowhere", *QUIET], capsys)
    assert not Path("runs").exists()


def test_empty_folder_is_named_with_accepted_endings(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    line = refusal(["pretrain", str(mae), "--data", "empty", *QUIET], capsys)
    assert "empty" in line
    assert ".jpg" in line


def test_file_that_is_no_image_is_named(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    for number in range(4):
        Path("texts", f"{number}.jpg").write_text("no picture")
    assert "texts/0.jpg" in refusal(["pretrain", str(mae), "--data", "texts", *QUIET], capsys)


def test_weights_that_do_not_match_the_terms_are_named(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(["pretrain", str(mae), "--model.init_args.weights", '{"pixel": 1.0}', *QUIET], capsys)
    assert line.startswith("glpretrain: error: weights: ") and "MAE needs one weight for each of" in line
    assert "'pixel'" in line


def test_view_that_does_not_divide_by_the_patch_is_refused(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    views = '[{"size": 47, "scale": [0.4, 1.0]}]'
    line = refusal(["pretrain", str(mae), "--data.views.init_args.global_views", views, *QUIET], capsys)
    assert "47" in line
    assert "patch of 8" in line


def test_checkpoint_of_another_method_is_refused(mae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain(str(mae), overrides=QUIET)
    checkpoint = run.folder / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    line = refusal(["pretrain", str(shrunk(ROOT / "dino.yaml", tmp_path)), "--ckpt_path", str(checkpoint), *QUIET], capsys)
    assert "MAE" in line
    assert "DINO" in line
    assert checkpoint.read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_device_that_is_not_there_is_one_line(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No supported gpu" in refusal(["pretrain", str(mae), "--trainer.accelerator", "gpu", *QUIET], capsys)


def test_missing_checkpoint_is_named(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.ckpt is not a file" in refusal(["pretrain", str(mae), "--ckpt_path", "none.ckpt"], capsys)


def test_file_that_is_no_checkpoint_is_named(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.ckpt").write_text("no checkpoint")
    assert "text.ckpt is no checkpoint" in refusal(["pretrain", str(mae), "--ckpt_path", "text.ckpt"], capsys)
    assert not Path("runs").exists()


def test_missing_reader_is_one_line(mae: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    options = ["--data.source", "glpretrain.data.HuggingFaceImages", "--data.source.init_args.path", "photos"]
    assert "glpretrain[huggingface]" in refusal(["pretrain", str(mae), *options], capsys)


def test_run_folder_holds_what_it_promises(mae: Path) -> None:
    write_images(Path("photos"), 5)
    run = glpretrain.fit(
        str(mae),
        data="photos",
        max_steps=3,
        seed=7,
        overrides=["--evaluate", "false", "--trainer.log_every_n_steps", "1"],
    )
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.csv",
        "results.json",
        "views.png",
        "checkpoints",
        "backbone",
        "start",
        "report.html",
        "report.csv",
    }
    assert run.results["steps"] == 3
    assert run.results["seed"] == 7
    assert run.results["data"] == "photos"
    assert run.results["images_seen"] == 12
    assert (run.folder.parent / "latest").resolve() == run.folder.resolve()
    assert json.loads((run.folder / "backbone" / "card.json").read_text())["embed_dim"] == run.backbone.embed_dim


def test_resolved_config_trains_again_into_its_own_folder(mae: Path) -> None:
    first = pretrain(str(mae), overrides=QUIET)
    kept = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}
    assert main(["fit", "--config", str(first.folder / "config.yaml"), *QUIET]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(first.folder.parent.glob("2*"))) == 2


def test_resumed_run_goes_on_where_it_stopped(mae: Path) -> None:
    first = pretrain(str(mae), overrides=QUIET)
    checkpoint = str(first.folder / "checkpoints" / "last.ckpt")
    second = pretrain(str(mae), overrides=["--ckpt_path", checkpoint, "--trainer.max_steps", "5", *QUIET])
    assert second.results["steps"] == 5
    assert second.results["resumed_from"] == checkpoint
    assert second.results["images_seen"] == 20  # of both parts of the run


def test_an_interrupt_reaches_the_caller_and_leaves_the_next_one_possible(mae: Path) -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, *arguments) -> None:
            raise KeyboardInterrupt

    training = Training(["--config", str(mae), *QUIET])
    training.trainer.callbacks.append(Interrupt())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert not (training.folder / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "mugs"])  # without state; with queues and memories
def test_two_processes_share_a_run_folder_and_have_the_losses_of_one(name: str, mae: Path, tmp_path: Path) -> None:
    recipe = mae if name == "mae" else shrunk(ROOT / f"{name}.yaml", tmp_path)
    for processes, batch_size in ((1, 4), (2, 2)):
        count = ["--trainer.devices", str(processes), "--data.batch_size", str(batch_size), "--runs", str(processes)]
        options = [
            "--trainer.strategy",
            "ddp",
            "--trainer.accelerator",
            "cpu",
            "--evaluate",
            "false",
            "--report",
            "false",
            "--trainer.log_every_n_steps",
            "1",
        ]
        command = [sys.executable, "-m", "glpretrain.cli", "fit", "--config", str(recipe), *options, *count]
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"WANDB_MODE": "disabled"})
    folders = [path for processes in "12" for path in Path(processes, name).iterdir() if path.name != "latest"]
    one, two = ([float(row["train/loss"]) for row in csv.DictReader((path / "metrics.csv").open())] for path in folders)
    assert len(one) == 2
    assert two == pytest.approx(one, rel=1e-5)  # float32 sums in another order
    results = json.loads((folders[1] / "results.json").read_text())
    assert results["devices"] == 2
    assert results["images_seen"] == 2 * 4
    states = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in folders]
    held = [key for key in states[0] if key.endswith((".rows", ".place"))]
    assert len(held) == (8 if name == "mugs" else 0)
    for key in held:
        torch.testing.assert_close(states[1][key], states[0][key], rtol=1e-4, atol=1e-5, msg=key)


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    folders = {new_folder("mmc", runs=tmp_path) for _ in range(3)}
    assert len(folders) == 3
    for folder in folders:
        point_latest(folder)
    assert (tmp_path / "mmc" / "latest").resolve() in {folder.resolve() for folder in folders}


def test_runs_of_four_processes_that_start_together_get_a_folder_each(tmp_path: Path) -> None:
    outcomes = together(lambda _: [new_folder("mmc", runs=tmp_path) for _ in range(10)], count=4)
    folders = [folder for one in outcomes for folder in one.value]
    assert len(set(folders)) == 40 and not [one.error for one in outcomes if one.error]
    assert {path.name for path in (tmp_path / "mmc").iterdir()} == {folder.name for folder in folders}
    together(lambda number: point_latest(folders[number]), count=4)
    assert (tmp_path / "mmc" / "latest").resolve() in {folder.resolve() for folder in folders}


def test_recipe_beside_the_user_comes_before_ours(tmp_path: Path) -> None:
    (tmp_path / "recipes" / "own").mkdir(parents=True)
    (tmp_path / "recipes" / "own" / "mine.yaml").write_text("seed_everything: 0\n")
    assert find_recipe("own/mine").parent == tmp_path / "recipes" / "own"
    assert recipe_name(Path("recipes/own/mine.yaml")) == "own/mine"
    assert {"own/mine", "mmc"} <= set(recipe_names())


def test_worker_traceback_becomes_its_last_line() -> None:
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\nValueError: photo"
    )
    assert one_line(error) == "ValueError: photo"


def test_an_evaluation_is_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "eval/images says how a backbone is scored, not trained" in refusal(["pretrain", "eval/images"], capsys)


def test_evaluate_refuses_what_is_no_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refusal(["evaluate", "nowhere"], capsys)
    assert not Path("results.jsonl").exists()


def test_evaluate_reproduces_the_scores_of_the_run(mae: Path) -> None:
    recipe = yaml.safe_load(mae.read_text())
    scenes = {"labelled": {"length": 30}, "labelled_test": {"length": 15, "split": "test"}, "masked": {"length": 20, "size": 80}}
    recipe["data"] |= {name: {"class_path": "glpretrain.data.Scenes", "init_args": given} for name, given in scenes.items()}
    mae.write_text(yaml.safe_dump(recipe))
    run = pretrain(str(mae), overrides=QUIET[2:])
    assert main(["evaluate", str(run.folder / "backbone")]) == 0
    lines = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    assert lines
    for line in lines:
        key = result_key(line["evaluator"], line["score"])
        assert [line[name] for name in ("value", "low", "high", "n")] == [
            run.results["after"][name] for name in (key, f"{key}_low", f"{key}_high", f"{key}_n")
        ]
        assert (
            len(line["fingerprint"]) == 64
            and line["protocol"]["features"]["batch_size"] == 64
            and EncoderCard.from_json(line["card"]) == run.backbone.card
        )


def test_inspect_writes_a_page_and_overwrites_nothing(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain(str(mae), overrides=QUIET)
    write_images(Path("photos"), 2)
    backbone = str(run.folder / "backbone")
    assert main(["inspect", backbone, "photos/0.png", "--compare", f"again={backbone}", "photos/1.png", "--untrained"]) == 0
    assert "report.html: " in capsys.readouterr().out
    text = Path("report.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    recipe, time = run.folder.parts[-2:]
    assert [backbone["name"] for backbone in data["backbones"]] == ["untrained", f"{recipe}/{time}", "again"]
    assert [image["name"] for image in data["images"]] == ["0.png", "1.png"]
    assert main(["inspect", backbone, "photos/0.png"]) == 0
    assert Path("report.html").read_text() == text and Path("report-2.html").is_file()


def test_inspect_names_what_it_does_not_understand(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain(str(mae), overrides=QUIET)
    write_images(Path("photos"), 1)
    arguments = ["inspect", str(run.folder / "backbone"), "photos/0.png"]
    assert "photos/1.png" in refusal([*arguments, "photos/1.png"], capsys)
    assert "--size 2x3x4; accepted: PIXELS, or HEIGHTxWIDTH" in refusal([*arguments, "--size", "2x3x4"], capsys)
    assert "--layers 1,b; accepted: all, last" in refusal([*arguments, "--layers", "1,b"], capsys)
    assert "two backbones are called" in refusal([*arguments, "--compare", arguments[1]], capsys)
    assert "nowhere does not exist" in refusal([*arguments, "--compare", "new=nowhere"], capsys)
    arguments_of_two = ["inspect", f"untrained={arguments[1]}", *arguments[2:], "--untrained"]
    assert "'untrained' and --untrained adds another" in refusal(arguments_of_two, capsys)
    assert "required: images" in refusal(arguments[:2], capsys)
    assert not Path("report.html").exists()


def test_export_writes_what_the_run_exported(mae: Path) -> None:
    run = pretrain(str(mae), overrides=QUIET)
    assert main(["export", str(run.folder / "checkpoints" / "last.ckpt"), "out"]) == 0
    exported = glpretrain.load_backbone("out").backbone_state()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in run.backbone.backbone_state().items())


def test_paths_in_the_readme_exist() -> None:
    root = ROOT.parent
    named = re.findall(r"`((?:recipes|notebooks|glpretrain|tests)/[\w./-]*|[A-Z]+(?:\.md)?)`", (root / "README.md").read_text())
    assert named
    missing = [name for name in named if not (root / name).exists()]
    assert not missing
    targets = set(re.findall(r"^make ([a-z-]+)", (root / "README.md").read_text(), re.MULTILINE))
    assert targets <= set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))


def test_odd_names_of_folders_and_files_cost_nothing_but_a_line(mae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(Path("~a: b"), 5)
    Path("~a: b", os.fsdecode(b"caf\xe9.png")).write_bytes(b"no image")
    run = pretrain(str(mae), data="~a: b", overrides=QUIET)
    assert run.results["data"] == "~a: b"
    assert b"caf\xe9.png: " in (run.folder / "unreadable.txt").read_bytes()
    Path("photos.zip").write_bytes(b"PK\5\6" + bytes(18))
    assert "photos.zip is a zip archive" in refusal(["pretrain", str(mae), "--data", "photos.zip", *QUIET], capsys)


@pytest.mark.parametrize("setting", ["cross_entropy fused", "packed_attention flex"])
def test_what_needs_a_gpu_is_refused_before_the_first_step(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name, value = setting.split()
    recipe = shrunk(ROOT / "dino.yaml", tmp_path)
    options = [*QUIET, "--trainer.accelerator", "cpu", "--runs", str(tmp_path / "runs"), f"--model.init_args.optimization.{name}", value]
    line = refusal(["pretrain", str(recipe), *options], capsys)
    assert f"optimization: {name}='{value}' given, but " in line and "leave it out" in line
    assert not list((tmp_path / "runs").glob("*/checkpoints/*"))
