"""`glpretrain evaluate --videos`: a folder of videos instead of the configuration's."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from glpretrain.cli import main
from glpretrain.encoders import ViT
from glpretrain.weights import export

CONFIG = {
    "sources": {"videos": {"class_path": "glpretrain.data.SceneVideos", "init_args": {"length": 2, "frames": 4, "size": [24, 36]}}},
    "evaluators": {"videos": {"class_path": "glpretrain.evaluate.LabelPropagation", "init_args": {"short_side": 32}}},
}


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(ViT("vit_tiny_patch16_224", img_size=24, patch_size=4, embed_dim=12, depth=2, num_heads=3), "backbone")
    Path("videos.yaml").write_text(yaml.safe_dump(CONFIG))


def lines(*options: str) -> list[dict]:
    assert main(["evaluate", "backbone", "--config", "videos.yaml", "--no_cache", *options]) == 0
    found = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    Path("results.jsonl").unlink()
    return found


def test_videos_of_the_configuration_or_of_a_folder_are_scored() -> None:
    embedded = {line["score"]: line for line in lines()}
    assert embedded["jf"]["measured_on"] == "scene_videos" and embedded["jf"]["protocol"]["short_side"] == 32
    assert Path("results_pictures/videos_videos.png").is_file()
    for kind in ("JPEGImages", "Annotations"):
        for time in range(4):
            path = Path("davis", kind, "bee", f"{time:05d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = np.zeros((24, 36, 3) if kind == "JPEGImages" else (24, 36), dtype=np.uint8)
            picture[6:18, 8 + time : 20 + time] = 1
            Image.fromarray(picture).save(path)
    own = {line["score"]: line for line in lines("--videos", "davis")}
    assert own["jf"]["measured_on"] == "davis" and own["jf_bee"]["n"] == own["jf"]["n"] == 1
    assert len(own["jf"]["fingerprint"]) == 64 and own["jf"]["fingerprint"] != embedded["jf"]["fingerprint"]


def test_videos_without_an_evaluator_of_them_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "backbone", "--videos", "davis"]) == 2
    assert "videos davis need a config with an evaluator of videos" in capsys.readouterr().err
    assert main(["evaluate", "backbone", "--config", "videos.yaml", "--videos", "nowhere"]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
