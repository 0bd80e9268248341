"""`glpretrain push`: the files of a repository, and what is asked of the hub."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from embed_parts import backbone, encoder

from glpretrain import load_backbone
from glpretrain.cli import main

RESULTS = {
    "recipe": "mmc",
    "method": "MMC",
    "seed": 0,
    "steps": 500,
    "data": "photos | of mine",
    "before": {"knn": 20.0, "knn_low": 18.0, "knn_high": 22.0, "knn_n": 300},
    "after": {"knn": 45.71, "knn_low": 42.6, "knn_high": 48.8, "knn_n": 300, "prompt_miou": 52.0, "linear": None},
    "measured_on": {"knn": "scenes", "prompt": "annotated"},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    backbone(tmp_path / "run" / "backbone")
    (tmp_path / "run" / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path / "run"


def test_the_files_of_a_repository_open_in_glpretrain_timm_and_transformers_layout(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "run", "me/mine", "--licence", "CC-BY-4.0", "--dry_run"]) == 0
    folder = Path("hub/me/mine")
    names = "README.md, card.json, config.json, model.safetensors, transformers"
    assert f"hub/me/mine: {names}; nothing was uploaded" in capsys.readouterr().out
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)
    expected = encoder()(pixels)
    assert torch.equal(load_backbone(folder)(pixels).cls, expected.cls) and load_backbone(folder).card.licence == "CC-BY-4.0"
    assert torch.allclose(load_backbone(folder / "transformers")(pixels).cls, expected.cls, atol=1e-5)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert torch.allclose(model.forward_features(pixels)[:, 0], expected.cls, atol=1e-5)


def test_the_card_says_data_scores_licence_and_how_to_load(run: Path) -> None:
    main(["push", "run", "me/mine", "--licence", "CC-BY-4.0", "--dry_run", "--out", "files"])
    text = Path("files/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["license"], facts["library_name"]) == ("cc-by-4.0", "timm") and "glpretrain" in facts["tags"]
    assert "| data | photos \\| of mine |" in body and "| licence | CC-BY-4.0 |" in body and "| steps | 500 |" in body
    assert "| knn | 20.0 [18.0, 22.0] | 45.7 [42.6, 48.8] | 300 | scenes |" in body
    assert "| prompt_miou |  | 52.0 |  | annotated |" in body and "| linear |" not in body
    for code in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
        compile(code, "README.md", "exec")
    for line in ('load_backbone("hf:me/mine")', 'create_model("hf-hub:me/mine"', 'from_pretrained("me/mine", subfolder="transformers")'):
        assert line in body


def test_a_backbone_without_a_run_says_that_nothing_was_measured(run: Path) -> None:
    (run / "backbone").rename("alone")
    main(["push", "alone", "me/mine", "--dry_run"])
    text = Path("hub/me/mine/README.md").read_text()
    assert "None were measured." in text and "license: other" in text and "| licence | none |" in text


def test_what_was_written_is_uploaded(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[object] = []

    class Api:
        def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
            asked.append((repository, private, exist_ok))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            asked.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main(["push", "run", "me/mine", "--private"]) == 0
    names = ["README.md", "card.json", "config.json", "model.safetensors", "transformers"]
    assert asked == [("me/mine", True, True), ("me/mine", names)]
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "mine"], "push: 'mine' given; accepted: user/name"),
        (["run", "me/mine", "--out", "files"], "push: --out files given; accepted with --dry_run only"),
        (["nowhere", "me/mine", "--dry_run"], "nowhere does not exist"),
        (["run", "me/mine", "--dry_run", "--out", "run"], "push: run is not empty and nothing is overwritten"),
    ],
)
def test_mistakes_cost_one_line(run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_a_network_the_line_says_what_to_do(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Api:
        def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main(["push", "run", "me/mine"]) == 2
    line = "push: https://huggingface.co/me/mine: no route to host; log in with `hf auth login`, or write the files with --dry_run"
    assert line in capsys.readouterr().err
