"""Three people with an installed wheel and no checkout: with photographs, with code of their own, and with a method of their own."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import wheels
from PIL import Image

pytestmark = pytest.mark.slow
_PHOTOS = {"cat": skimage.data.chelsea, "cup": skimage.data.coffee, "rocket": skimage.data.rocket}
_EACH, _SIDE = 100, 96  # photographs of each class; pixels
QUICK = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
SMALL = ["--evaluate", "false", "--data.batch_size", "16", *QUICK]
METHOD = '''
"""A method of one's own: the student predicts what its teacher makes of the other view."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import Encoder
from glpretrain.methods.base import Method
from glpretrain.training.branch import Branch


class Agreement(Method):
    terms = ("cls",)
    uses = {"global": Uses()}

    def __init__(self, encoder: Encoder, *, hidden_dim: int = 64, momentum: Schedule = Schedule(0.99, 1.0), **kwargs) -> None:
        head = nn.Sequential(nn.Linear(encoder.embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, encoder.embed_dim))
        super().__init__(Branch(encoder, {"cls": head}), momentum=momentum, **kwargs)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        group = batch.views["global"]
        views, shape = group.items.flatten(0, 1), group.items.shape[:2]
        with torch.no_grad():
            targets = self.teacher_branch.encode(views, cls_only=True).cls.unflatten(0, shape)  # [G B D]
        (output,) = self.student.encode([views], keys=[group.keys], cls_only=True)
        predicted = self.student.heads["cls"](output.cls).unflatten(0, shape)
        return {"cls": (1 - cosine_similarity(predicted, targets.flip(0), dim=2)).mean(dim=0)}
'''
RECIPE = """
seed_everything: 0
model:
  class_path: my_method.Agreement
  init_args:
    encoder:
      class_path: glpretrain.encoders.ViT
      init_args: {name: vit_tiny_patch16_224, img_size: 24, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}
    optimization:
      lr: {base: 1.0e-3, end: 1.0e-6, warmup: 0.1}
data:
  source:
    class_path: glpretrain.data.Scenes
    init_args: {length: 32, size: 32}
  labelled:
    class_path: glpretrain.data.Scenes
    init_args: {length: 40, size: 32}
  labelled_test:
    class_path: glpretrain.data.Scenes
    init_args: {length: 20, size: 32, split: test}
  masked:
    class_path: glpretrain.data.Scenes
    init_args: {length: 12, size: 32, split: test}
  batch_size: 8
  views:
    class_path: glpretrain.data.views.MultiCrop
    init_args:
      global_views:
        - {size: 24, scale: [0.4, 1.0], count: 2, brightness: 0.4}
trainer:
  max_steps: 3
"""
ENGINEER = """
import json, sys
import numpy as np, timm, torch
import glpretrain

backbone = glpretrain.load_backbone(sys.argv[1])
picture = np.linspace(0, 255, 80 * 100 * 3).reshape(80, 100, 3).astype(np.uint8)
items = backbone.transform([picture, picture[:, ::-1]])
with torch.no_grad():
    output = backbone(items)
    timms = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval().forward_features(items)
found = backbone.embed(sys.argv[2])
print(json.dumps({
    "shape": list(items.shape), "cls": list(output.cls.shape), "features": list(found.features.shape), "first": found.names[0],
    "difference": (output.cls - timms[:, 0]).abs().max().item(), "unreadable": len(found.unreadable), "file": glpretrain.__file__,
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return wheels.installed(wheels.built(folder), folder / "site")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of photographs in folders by class, and one file that is damaged."""
    folder = tmp_path_factory.mktemp("photographs") / "photos"
    for name, load in _PHOTOS.items():
        whole = load()
        (folder / name).mkdir(parents=True)
        for number in range(_EACH):
            top, left = number * 37 % (whole.shape[0] - _SIDE), number * 53 % (whole.shape[1] - _SIDE)
            Image.fromarray(np.ascontiguousarray(whole[top : top + _SIDE, left : left + _SIDE])).save(folder / name / f"{number:03d}.jpg")
    (folder / "cat" / "050.jpg").write_bytes(b"\xff\xd8\xff damaged")
    return folder


@pytest.fixture(scope="module")
def backbone(site: Path, photos: Path) -> Path:
    command = ["-m", "glpretrain.cli", "pretrain", "mmc", "--data", "photos", "--trainer.max_steps", "4", *SMALL]
    wheels.said(command, site=site, folder=photos.parent)
    return photos.parent / "runs" / "mmc" / "latest" / "backbone"


def test_photographs_become_a_classifier(site: Path, photos: Path, backbone: Path) -> None:
    place = photos.parent

    def said(*words: str) -> str:
        return wheels.said(["-m", "glpretrain.cli", *words], site=site, folder=place)

    assert (backbone / "model.safetensors").is_file()
    said("embed", str(backbone), "photos", "--out", "features.npy")
    assert np.load(place / "features.npy").shape == (3 * _EACH - 1, 96)
    assert "050.jpg" in (place / "features_unreadable.txt").read_text()
    lines = said("neighbours", "features.npy", "photos/rocket/007.jpg", "--k", "3", "--picture", "neighbours.png").splitlines()
    nearest = [line.split() for line in lines if line[:1] in "01"]
    assert len(nearest) == 3 and nearest[0] == ["1.0000", "rocket/007.jpg"] and (place / "neighbours.png").is_file()
    tuning = ["--data", "photos", "--epochs", "1", "--no_probe", "--data.batch_size", "32", *QUICK]
    said("finetune", str(backbone), *tuning)
    model = place / "runs" / "finetune" / "classification" / "latest" / "model"
    assert json.loads((model / "card.json").read_text())["classes"] == sorted(_PHOTOS)
    said("predict", str(model), "photos/cup", "--out", "predictions.csv")
    with (place / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == _EACH


def test_an_engineer_uses_a_backbone_in_code_of_their_own(site: Path, photos: Path, backbone: Path, tmp_path: Path) -> None:
    listed = wheels.said(["-m", "glpretrain.cli", "recipes"], site=site, folder=tmp_path)
    assert "mmc" in listed and str(site) in listed
    (tmp_path / "use.py").write_text(ENGINEER)
    found = json.loads(wheels.said(["use.py", str(backbone), str(photos / "cup")], site=site, folder=tmp_path).splitlines()[-1])
    assert found["file"].startswith(str(site)) and found["difference"] < 1e-5
    assert (found["shape"], found["cls"], found["features"]) == ([2, 3, 48, 48], [2, 96], [_EACH, 96])
    assert found["first"] == "000.jpg" and found["unreadable"] == 0


def test_a_researcher_compares_a_method_of_their_own(site: Path, tmp_path: Path) -> None:
    (tmp_path / "my_method.py").write_text(METHOD)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    given = ["pretrain", "mine.yaml", "--import", "my_method", "--seeds", "0,1", *QUICK]
    table = wheels.said(["-m", "glpretrain.cli", *given], site=site, folder=tmp_path)
    assert "linear" in table
    command = ["-m", "glpretrain.cli", "compare", "runs", "--out", "page.md", "--scores", "knn,linear"]
    wheels.said(command, site=site, folder=tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "mine" in page and "linear" in page and "±" in page
