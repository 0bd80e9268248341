"""No code from files: what a configuration names is not imported, called or read unless the user has said so."""

import os
import random
import subprocess
import sys
import time
import tracemalloc
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from fuzzing import counted, time_limit
from PIL import Image
from shrinking import ROOT, shrunk

from glpretrain.cli import main
from glpretrain.cli.parsing import parse
from glpretrain.cli.scored_sources import Own, parts_of_config
from glpretrain.cli.training import Training
from glpretrain.cli.trust import read_yaml
from glpretrain.encoders import ViT
from glpretrain.weights import export

CALLBACKS = "pytorch_lightning.callbacks"
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "marker"]}}
ELASTIC = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"
CONSTRUCTED = {
    "class_path": ELASTIC,
    "init_args": {"entrypoint": "touch", "args": ["marker"], "env": {}, "stdout": "", "stderr": "", "local_rank_id": 0},
}
LAYER = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}
QUIET = {"max_steps": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


def callback(name: str, **arguments: object) -> list[object]:
    return [{"class_path": f"{CALLBACKS}.{name}", "init_args": arguments}]


ATTACKS: dict[str, tuple[str, object]] = {
    **{f"command as {key}": (key, POPEN) for key in ("model", "model.init_args.encoder", "data.source", "data.views", "data.mask")},
    **{
        f"command as {key}": (key, POPEN)
        for key in ("data.corruption", "data.order", "data.labelled", "trainer.logger", "trainer.strategy")
    },
    "command as callback": ("trainer.callbacks", [POPEN]),
    "command as plugin": ("trainer.plugins", [POPEN]),
    "function of os": ("data.source", "os.system"),
    "os behind an allowed package": ("data.source", {"class_path": "torch.hub.os.system", "init_args": {"command": "touch marker"}}),
    "own module": ("data.source", "planted.Waves"),
    "own module as text of an error": ("data.batch_size", "module 'planted' has no attribute 'x'"),
    "own module as class of an error": ("data.batch_size", "class_path 'planted.Waves' Option 'x'"),
    "command as callable": ("trainer.callbacks", callback("LambdaCallback", on_fit_start="os.system")),
    "hub as callable": ("trainer.callbacks", callback("LambdaCallback", on_fit_start="torch.hub.load")),
    "layer as callable": ("trainer.callbacks", callback("LambdaCallback", on_fit_start=LAYER)),
    "process as callable": ("trainer.callbacks", callback("LambdaCallback", on_fit_start=CONSTRUCTED)),
    "hub as average": ("trainer.callbacks", callback("WeightAveraging", avg_fn="torch.hub.load")),
    "hub as hook": (
        "trainer.strategy",
        {"class_path": "pytorch_lightning.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": "torch.hub.load"}},
    ),
    "hub as source": ("data.source", {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": ".", "model": "m", "source": "local"}}),
    "class of another kind": ("data.source", {"class_path": "torch.utils.cpp_extension.BuildExtension"}),
    "layer as objective": ("model.init_args.pixel_objective", LAYER),
    "file as data": ("data", "further.yaml"),
    "file as source": ("data.source", "further.yaml"),
    "file as model": ("model", "further.yaml"),
    "file as optimization": ("model.init_args.optimization", "further.yaml"),
    "further configuration": ("config", "further.yaml"),
    "import by the file": ("import", ["planted"]),
    "address": ("data.source", "https://localhost/x.yaml"),
    "standard input": ("init_from", "-"),
    "bomb in a text": (
        "data.batch_size",
        "[&a [1,1,1,1,1,1,1,1,1,1],"
        + ",".join(f"&{b} [{('*' + a + ',') * 10}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        + "]",
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what must not be read: a module that leaves a marker, and a further configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "planted.py").write_text("open('marker', 'w').close()\nfrom glpretrain.data import Scenes\nclass Waves(Scenes): pass\n")
    (tmp_path / "further.yaml").write_text("class_path: glpretrain.data.Scenes\ninit_args: {length: 3}\n")
    return tmp_path


def recipe(key: str, value: object) -> Path:
    values = yaml.safe_load((ROOT / "mmc.yaml").read_text())
    values["trainer"] |= QUIET
    values["evaluate"] = False
    part = values
    *parents, last = key.split(".")
    for name in parents:
        part = part[name]
    part[last] = value
    path = Path("attack.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that is refused, after which nothing was run."""
    status = main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glpretrain: error: ")]
    assert (status, len(lines)) == (2, 1)
    assert not Path("marker").exists() and "planted" not in sys.modules and not Path("runs").exists()
    return lines[0]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_recipe_runs_imports_and_reads_nothing_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe(*ATTACKS[name]))
    assert refused(["fit", "--config", path], capsys) == refused(["pretrain", path], capsys)


@pytest.mark.parametrize("path", ["data.views", "data.batch_size"])
def test_views_are_checked_where_only_they_are_read(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in (POPEN, "planted.Waves"):
        written = str(recipe(path, value))
        refused(["bench", written, "--views"], capsys)
        refused(["bench", written, "--plan"], capsys)
        refused(["pretrain", written, "--data", "."], capsys)


@pytest.fixture
def backbone() -> Path:
    """A backbone as somebody sends it: in a folder, beside a configuration that names a command."""
    encoder = ViT("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=24, depth=1, num_heads=3).eval()
    export(encoder, Path("sent/backbone"), source="a test")
    recipe("data.source", POPEN).rename("sent/config.yaml")
    return Path("sent/backbone")


def test_a_configuration_of_scores_builds_sources_and_evaluators_only(backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = {"class_path": "glpretrain.data.Scenes", "init_args": {"length": 8, "size": 48}}
    for given in (POPEN, "planted.Waves", LAYER, "torch.hub.load"):
        for sources, evaluators in (({"train": given}, {}), ({"train": scenes}, {"knn": given})):
            Path("attack.yaml").write_text(yaml.safe_dump({"sources": sources, "evaluators": evaluators}))
            refused(["evaluate", str(backbone), "--config", "attack.yaml"], capsys)


def test_what_lies_beside_a_backbone_is_data(backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "data.source: subprocess.Popen is not imported" in refused(["evaluate", str(backbone)], capsys)
    outside = {"class_path": "glpretrain.data.ImageFolder", "init_args": {"root": "/usr/share"}}
    for source in (outside, {"class_path": "glpretrain.data.HuggingFaceImages", "init_args": {"path": "name/of-a-data-set"}}):
        recipe("data.source", source).rename("sent/config.yaml")
        said = refused(["evaluate", str(backbone)], capsys)
        assert "found beside the backbone, names" in said and "or --data FOLDER" in said
    recipe("data.masked", {"class_path": "glpretrain.data.MaskedFolder", "init_args": {"root": "/usr/share"}}).rename("sent/config.yaml")
    Path("photos").mkdir()
    Image.new("RGB", (8, 8)).save("photos/one.png")
    said = refused(["evaluate", str(backbone), "--data", "photos"], capsys)
    assert "as data.masked; give" in said and "or --masks FOLDER" in said
    assert main(["export", str(backbone), "out"]) == 0
    assert not Path("marker").exists()


@pytest.mark.parametrize("key", ["init_from", "ckpt_path", "model.init_args.experts.dino.init_args.path"])
def test_files_of_weights_that_a_recipe_names_are_not_run(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Command:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, ("touch marker",)

    torch.save({"state_dict": Command(), "pytorch-lightning_version": "2.6.0"}, "weights.ckpt")
    path = shrunk(ROOT / ("gpfm.yaml" if "experts" in key else "mmc.yaml"), Path.cwd())
    status = main(
        ["fit", "--config", str(path), f"--{key}", "weights.ckpt", "--evaluate", "false", "--trainer.enable_checkpointing", "false"]
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glpretrain: error: ")]
    assert (status, len(lines)) == (2, 1) and not Path("marker").exists()


def test_a_module_of_the_users_is_imported_where_the_user_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Path("planted.py").rename("my_data.py")
    path = shrunk(ROOT / "mae.yaml", Path.cwd())
    values = yaml.safe_load(path.read_text())
    values["data"]["source"]["class_path"] = "my_data.Waves"
    path.write_text(yaml.safe_dump(values))
    assert "data.source: my_data.Waves is not imported because a file names it" in (line := refused(["pretrain", str(path)], capsys))
    assert line.endswith("; if you trust the module my_data, add --import my_data")
    for name in ("my_dat", "os", "jsonargparse", "a-b", "my_data.py"):
        assert f"--import {name}: " in refused(["pretrain", str(path), "--import", name], capsys)
    try:
        training = Training(["--import=my_data", "--config", str(path), "--evaluate", "false"])
        assert type(training.datamodule.source).__module__ == "my_data" and Path("marker").exists()
        assert "import" not in read_yaml(next(Path("runs").rglob("config.yaml")))
    finally:
        sys.modules.pop("my_data", None)


def test_a_file_in_the_current_folder_replaces_no_package(folder: Path) -> None:
    for name in ("kornia", "yaml", "timm", "planted"):
        (folder / f"{name}.py").write_text("open('marker', 'w').close()\n")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "glpretrain.cli", "bench", "nowhere.yaml", "--views"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(root)})
    assert ended.returncode == 2 and "there is no 'nowhere.yaml'" in ended.stderr
    assert not Path("marker").exists()


def laughs(levels: int) -> str:
    return "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels))])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (laughs(30), "more than 50000 values"),
        ("a: &a [*a]", "stands for nothing"),
        ("a: *b", "stands for nothing"),
        ("a: " + "[" * 100_000, "nested deeper than 32"),
        ("a: '" + "[" * 9_000 + "'", "nested deeper than 32"),
        ("- " * 40_000, "nested deeper than 32"),
        ("a: [" + "1," * 400_000 + "]", "more than 50000 values"),
        ("a: " + "1" * 900_000, "a value of 900000 characters"),
        ("a: 1" + ":10" * 200_000, "characters"),
        ("x" * 2_000_000, "more than 1000000 bytes"),
        ("a: !!python/object/apply:os.system [touch marker]", "asks for an object"),
        ("a: !!int x", "asks for an object"),
        ("a: !own x", "asks for an object"),
        ("a: \0", "control characters|special characters"),
        ("a: [", "node content"),
        ("- a", "a list given"),
        ("", "a NoneType given"),
        ("1: a", "accepted: names"),
        ("? [a]\n: b", "unhashable"),
        ("a: 2001-99-99", "month"),
    ],
    ids=lambda value: value[:12],
)
def test_yaml_is_refused_while_it_is_small(text: str, said: str) -> None:
    path = Path("attack.yaml")
    path.write_text(text)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=said) as caught:
        read_yaml(path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and "attack.yaml" in str(caught.value)
    assert seconds < 5.0 and peak < 60e6  # half a second here without the tracing; a bomb takes minutes and all memory


def test_aliases_that_stand_for_little_are_read() -> None:
    Path("plain.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")
    assert read_yaml(Path("plain.yaml")) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


@pytest.mark.parametrize("content", [b"\xff\xfea\0:\0", b"a: \xe9"])
def test_other_encodings_are_named(content: bytes) -> None:
    Path("attack.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"attack\.yaml: not text in UTF-8"):
        read_yaml(Path("attack.yaml"))


PLANTED = [
    "planted.Waves",
    "planted",
    "this.c",
    "antigravity.fly",
    "subprocess.Popen",
    "os.system",
    "torch.hub.load",
    "glpretrain.runs.Path",
]
VALUES = [
    None,
    True,
    -1,
    0,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "-",
    "x",
    "null",
    "[",
    "{a",
    "&a",
    "*a",
    "!!int x",
    "1_",
    "._",
    "0x",
    "1:2",
    "\t",
    "~",
]


def mutated(text: str, draw: random.Random) -> str:
    """The text of a configuration with one to three changes of its characters, or of its values and keys."""
    if draw.random() < 0.4:
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(text))
            piece = draw.choice([*"[]{}:,&*!|>-'\"#%@`?\n\t \0", "\u00e9", "<<: ", "!!set ", text[place : place + 20]])
            text = text[:place] + piece + text[place + draw.randint(0, 9) :]
        return text
    values = yaml.safe_load(text)
    for _ in range(draw.randint(1, 3)):
        part: dict[object, object] | list[object] = values
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not keys:
                break
            key = draw.choice(keys)
            inner = part[key]  # pyright: ignore[reportCallIssue, reportArgumentType] - a key of this part
            if isinstance(inner, dict | list) and draw.random() < 0.8:
                part = inner
                continue
            given: object = draw.choice([*VALUES, *PLANTED, POPEN, {"class_path": draw.choice(PLANTED)}, [], {}, [inner], {"x": inner}])
            if isinstance(part, dict) and draw.random() < 0.2:
                part[draw.choice(["x", "class_path", "init_args", "dict_kwargs", "__path__", "config", "<<", "$schema", "a.b"])] = given
            else:
                part[key] = given  # pyright: ignore[reportCallIssue, reportArgumentType] - likewise
            break
    return yaml.safe_dump(values)


def fuzz(count: int) -> None:
    """Parse mutated recipes and configurations of scores. Whatever they hold, they are parsed or refused with a message."""
    training = Training(["--config", str(shrunk(ROOT / "mae.yaml", Path.cwd())), "--evaluate", "false"])
    recipes = [path.read_text() for path in sorted(ROOT.glob("*.yaml"))]
    scores = [path.read_text() for path in sorted((ROOT / "eval").glob("*.yaml"))]
    card = training.model.encoder.card
    draw, path = random.Random(0), Path("fuzz.yaml")
    with counted("yaml", megabytes=400) as outcomes:
        for number in range(count):
            of_scores = number % 5 == 4
            text = mutated(draw.choice(scores if of_scores else recipes), draw)
            path.write_text(text, encoding="utf-8")
            try:
                with time_limit(f"number {number}: {text}"):
                    if of_scores:
                        parts_of_config(path, [], card=card, own=Own(None, None, None))
                    else:
                        parse(training.parser, ["--config", str(path)])
                outcomes["parsed"] += 1
            except (ValueError, OSError, ImportError, ArgumentError):
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"number {number}: {type(error).__name__}: {error}\n{text}") from error
            assert not {"planted", "this", "antigravity"} & sys.modules.keys() and not Path("marker").exists(), text


def test_mutated_configurations_are_parsed_or_refused() -> None:
    fuzz(20)


@pytest.mark.slow
def test_ten_thousand_mutated_configurations_are_parsed_or_refused() -> None:
    fuzz(10_000)
