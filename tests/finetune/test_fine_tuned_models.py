"""A fine-tuned model as a folder and as a program: the same predictions, completely written or not at all, refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import noise
from PIL import Image
from tuned_models import CLASSES, apart, classifier, finished, vit

from glpretrain.encoders import FeatureMap
from glpretrain.finetune import FineTuned, is_fine_tuned
from glpretrain.weights import export

MODELS = {
    "mean": lambda: classifier(vit(drop_path_rate=0.1), drop_path=0.2),
    "cls": lambda: classifier(vit(reg_tokens=2), pool="cls"),
    "both": lambda: classifier(vit(positions="sincos"), pool="cls_mean", ema=0.9),
    "convolutions": lambda: classifier(FeatureMap("resnet10t", img_size=32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_predicts_the_same_to_the_last_bit(name: str, tmp_path: Path) -> None:
    model = finished(apart(MODELS[name]()))
    images = noise(3, 3, 32, 32, name="images")
    again = FineTuned.load(model.save(tmp_path / "model"))
    assert torch.equal(again.predict(images), model.predict(images))
    assert again.card == model.card and not again.training
    assert again.classes == CLASSES and again.card.scores["accuracy"]["n"] == 12
    assert is_fine_tuned(tmp_path / "model")


def test_pictures_go_through_the_transform_of_the_card(tmp_path: Path) -> None:
    model = FineTuned.load(finished(apart(classifier())).save(tmp_path / "model"))
    picture = Image.fromarray((127 * (noise(30, 40, 3, name="picture") + 1)).byte().numpy())
    probabilities = model.predict([picture, picture])
    assert torch.equal(probabilities, model.predict(torch.stack([model.transform(picture)] * 2)))
    assert probabilities.shape == (2, 3) and probabilities.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = finished(classifier())
    with torch.no_grad():
        model.branch.heads["task"].linear.bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = finished(classifier())
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        model.save(tmp_path / "model")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("glpretrain.finetune.model.write_json", fail)
    with pytest.raises(OSError, match="the disk is full"):
        model.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_no_fine_tuned_model_is_refused(tmp_path: Path) -> None:
    export(vit(), tmp_path / "backbone")
    for path, said in (
        (tmp_path / "nowhere", "nowhere does not exist; accepted: a folder that glpretrain finetune wrote"),
        (tmp_path, "has no card.json"),
        (tmp_path / "backbone", "is a backbone; accepted: a fine-tuned model; fine-tune it with: glpretrain finetune"),
    ):
        with pytest.raises(ValueError, match=said):
            FineTuned.load(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 99}, "an object of format 1"),
        ({"task": "poetry"}, "task='poetry'; accepted: classification"),
        ({"classes": ["a"]}, "classes: accepted: a list of two names or more"),
        ({"classes": ["a", "b"]}, "heads.task.linear.weight has shape"),
        ({"head": {"pool": "max"}}, "card.json"),
        ({"head": {"pool": "max", "norm": True}}, "pool='max'"),
        ({"transform": {}}, "transform: accepted: an object with"),
        ({"encoder": {"encoder": "ViT"}}, "encoder card: missing fields"),
    ],
    ids=str,
)
def test_a_card_that_does_not_fit_is_refused(changes: dict, said: str, tmp_path: Path) -> None:
    card = finished(classifier()).save(tmp_path / "model") / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | changes))
    with pytest.raises(ValueError, match=f"model: .*{said}"):
        FineTuned.load(tmp_path / "model")


def test_the_program_of_torch_export_gives_the_same_logits(tmp_path: Path) -> None:
    model = finished(apart(classifier()))
    written = model.export(tmp_path / "out", format="torch")
    assert written.difference == 0.0 and "largest difference of logits to the model 0.0e+00" in str(written)
    held = {"card.json": ""}
    program = torch.export.load(written.file, extra_files=held).module()
    images = noise(7, 3, 16, 16, name="images")  # a number of images that it was not traced with
    torch.testing.assert_close(program(images).softmax(dim=1), model.predict(images), rtol=0, atol=0)
    card = json.loads(json.dumps(model.card.to_json()))  # JSON has lists only
    assert json.loads(held["card.json"]) == json.loads((tmp_path / "out" / "card.json").read_text()) == card


@pytest.mark.slow
def test_the_onnx_program_gives_the_same_logits_and_names_classes_and_transform(tmp_path: Path) -> None:
    session = pytest.importorskip("onnxruntime").InferenceSession
    model = finished(apart(classifier()))
    written = model.export(tmp_path / "out", format="onnx")
    assert written.difference is not None and written.difference < 1e-5
    opened = session(written.file, providers=["CPUExecutionProvider"])
    images = noise(7, 3, 16, 16, name="images")
    (logits,) = opened.run(["logits"], {"images": images.numpy()})
    # 1e-5: other kernels add up in another order.
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(dim=1).numpy(), model.predict(images).numpy(), atol=1e-5)
    metadata = opened.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["transform"]) == model.transform.to_json()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='folder' given; accepted for a fine-tuned model: torch, onnx"):
        finished(classifier()).export(tmp_path / "out", format="folder")
