"""Kinds of items: what each says of itself leads somewhere, and a new one needs its own folder and one line."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from signals import Signal, SignalCrops, SignalTransformer, Waves

from glpretrain import modalities
from glpretrain.cli.training import Training
from glpretrain.core.frames import token_centres
from glpretrain.core.imports import imported
from glpretrain.data import Source
from glpretrain.data.module import DataModule
from glpretrain.data.own import embedded_source, source_for
from glpretrain.evaluate import Evaluator, default_evaluators
from glpretrain.masking import RandomMask
from glpretrain.weights import load_backbone

KNOWN = modalities.names()


@pytest.mark.parametrize("name", KNOWN)
def test_import_paths_of_a_kind_lead_to_what_they_promise(name: str) -> None:
    kind = modalities.get(name)
    for path in (kind.embedded_source, kind.masked_source, *kind.own_sources):
        assert issubclass(imported(path), Source), path
    assert all(isinstance(evaluator, Evaluator) for evaluator in default_evaluators(name).values())
    assert callable(imported(kind.page)) and all(callable(imported(path)) for path in kind.held)
    source = embedded_source(name, size=64)
    assert source.modality == name and source.classes and source.has_masks and source.train_test_split() is not None


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one line elsewhere."""
    known = dict(modalities._KNOWN)
    modalities.register(Signal())
    yield
    modalities._KNOWN.clear()
    modalities._KNOWN.update(known)


def test_a_name_is_registered_once_and_an_unknown_one_is_named(signals: None) -> None:
    with pytest.raises(ValueError, match="'signal' is registered already"):
        modalities.register(Signal())
    with pytest.raises(ValueError, match="modality: 'sound' given; known: image, points, audio, signal"):
        modalities.get("sound")


def test_frames_of_one_axis_say_where_tokens_lie(signals: None) -> None:
    data = DataModule(Waves(12), SignalCrops(), batch_size=6)
    encoder = SignalTransformer()
    raw = data.raw_batch(range(6), encoder=encoder, epoch=0)
    ramp = raw._replace(parts={"items": ((torch.arange(64) + 0.5) / 64).expand(6, 1, -1)})
    group = data.make_batch(ramp, encoder=encoder).views["local"]
    shown = group.items[:, :, 0] * encoder.card.std[0] + encoder.card.mean[0]  # [V B 16]
    centres = token_centres(group.frame, grid=(2,))  # [V B 2 1]
    torch.testing.assert_close(centres.squeeze(-1), shown.unflatten(2, (2, 8)).mean(dim=3))
    assert (group.frame[..., 0, 0] < 0).any() and (group.frame[..., 0, 0] > 0).any()


@pytest.mark.parametrize("method", ["DINO", "IBOT", "LocalContrast"])
def test_signals_are_trained_on_scored_exported_and_drawn(method: str, signals: None, tmp_path: Path) -> None:
    sizes = {"DINO": {"num_prototypes": 7}, "IBOT": {"num_prototypes": 7}, "LocalContrast": {"projection_dim": 8}}[method]
    recipe = {
        "seed_everything": 0,
        "model": {
            "class_path": f"glpretrain.methods.{method}",
            "init_args": {"encoder": {"class_path": "signals.SignalTransformer"}, "hidden_dim": 16, **sizes},
        },
        "data": {
            "source": {"class_path": "signals.Waves", "init_args": {"length": 48}},
            "views": {"class_path": "signals.SignalCrops" if method != "LocalContrast" else "test_modalities.GlobalCrops"},
            "batch_size": 12,
            "masked": None,
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    if method == "IBOT":
        recipe["data"]["mask"] = {"class_path": "glpretrain.masking.RandomMask", "init_args": {"ratio": 0.5}}
    written = tmp_path / "signals.yaml"
    written.write_text(yaml.safe_dump(recipe))
    training = Training(
        [
            "--import",
            "signals",
            "--import",
            "test_modalities",
            "--config",
            str(written),
            "--runs",
            str(tmp_path / "runs"),
            "--evaluate",
            "false",
            "--report",
            "false",
        ]
    )
    run = training.fit()
    assert run.results["steps"] == 2 and (run.folder / "views.png").is_file()
    backbone = load_backbone(run.folder / "backbone")
    items = torch.randn(3, 1, 32)
    # Not bit for bit: torch runs its transformer layer in another kernel where no parameter has a gradient, as in the teacher.
    torch.testing.assert_close(backbone(items).cls, training.model.backbone().eval()(items).cls, rtol=1e-5, atol=1e-5)
    sources = {"train": Waves(60), "test": Waves(90)}
    for name, evaluator in default_evaluators("signal").items():
        scores = evaluator.run(backbone, {role: sources[role] for role in evaluator.needs}).scores
        assert 0.0 <= scores["accuracy"].value <= 100.0, name
    assert source_for(tmp_path, "signal") == "signals.Waves"


class GlobalCrops(SignalCrops):
    """Without local crops."""

    def __init__(self) -> None:
        super().__init__()
        del self.sizes["local"]


def test_a_mask_over_one_axis_hides_whole_patches(signals: None) -> None:
    data = DataModule(Waves(12), SignalCrops(), batch_size=4, mask=RandomMask(0.5))
    encoder = SignalTransformer()
    group = data.make_batch(data.raw_batch(range(4), encoder=encoder, epoch=0), encoder=encoder).views["global"]
    hidden = modalities.get("signal").inputs_of_tokens(group.mask[0], group.items[0], grid=(4,))
    assert hidden.shape == (4, 32) and (hidden.unflatten(1, (4, 8)).float().mean(dim=2) % 1 == 0).all()
    assert (hidden.sum(dim=1) == 16).all()
