"""Views of sounds, mixtures, and what a model of sounds reads, saves and refuses."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import noise
from scipy.io import wavfile
from tuned_models import trained

from glpretrain.cli import main
from glpretrain.core.fbank import RATE, log_mel, num_samples
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data import Sounds, Subset, UnreadableItemError
from glpretrain.encoders import ViT
from glpretrain.finetune import Classification, FineTuned, LabelledData, SoundTransform, SoundViews, predictions
from glpretrain.finetune.item_transforms import transform_from_json
from glpretrain.weights import export

CARD = EncoderCard("ViT", {"name": "a"}, "audio", (1, 24, 16), (8, 8), 4, (-4.0,), (9.0,))


def encoder() -> ViT:
    sizes = {"img_size": [24, 16], "patch_size": 8, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViT("vit_tiny_patch16_224", **sizes, mean=[-4.0], std=[9.0], modality="audio")


def classifier(**settings: object) -> Classification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classification(encoder(), Sounds.classes, **settings)


def views(**settings: object) -> SoundViews:
    return SoundViews(24, num_bins=16, **settings)


def sound(name: str, *, label: int, frames: int = 60) -> Item:
    return Item(noise(1, num_samples(frames), name=name), label, None, None)


def keys(count: int) -> torch.Tensor:
    return torch.arange(count) * 7919


def test_a_test_view_is_the_middle_of_the_sound() -> None:
    item = sound("long", label=3)
    view, label = views(shift=0.5, time_mask=9, mix_prob=1.0).plain(item, card=CARD)
    torch.testing.assert_close(view, (log_mel(item.values, num_bins=16)[:, 18:42] + 4.0) / 9.0)
    assert label == 3
    short, _ = views().plain(sound("short", label=0, frames=10), card=CARD)
    assert short.shape == (1, 24, 16) and bool(short[0, 14:].std(dim=1).max() == 0)  # silence behind it


def test_training_views_are_stretches_that_depend_on_the_key_alone() -> None:
    items = [sound("a", label=0), sound("b", label=1), sound("a", label=0)]
    made = views().prepare(items, keys=torch.tensor([5, 5, 6]), card=CARD)
    again = views().prepare(items[:1], keys=torch.tensor([5]), card=CARD)
    assert torch.equal(made["items"][0], again["items"][0]) and not torch.equal(made["items"][0], made["items"][2])
    assert made["targets"].tolist() == [0, 1, 0]
    starts = set()
    for key in range(12):
        view = views().prepare(items[:1], keys=torch.tensor([key]), card=CARD)["items"][0]
        wave = items[0].values[0]
        loudest = ((view * 9.0 - 4.0) > -20).float().mean()
        starts.add(round(float(view.mean()), 6))
        assert loudest == 1.0 and len(wave) == num_samples(60)
    assert len(starts) > 6


def test_bands_of_time_and_frequency_are_set_to_the_mean() -> None:
    made = views(time_mask=8, frequency_mask=5).prepare([sound("a", label=0)] * 40, keys=keys(40), card=CARD)["items"][:, 0]
    frames, bins = (made == 0).all(dim=2).sum(dim=1), (made == 0).all(dim=1).sum(dim=1)  # [B]
    assert frames.max() == 8 and frames.min() == 0 and bins.max() == 5 and bins.min() == 0
    assert not (views().prepare([sound("a", label=0)] * 4, keys=keys(4), card=CARD)["items"] == 0).any()


def test_sounds_are_mixed_before_the_filterbank_with_the_share_of_their_target() -> None:
    items = [sound("a", label=0, frames=24), sound("b", label=1, frames=24), sound("c", label=2, frames=24)]
    made = views(mix_prob=1.0, mix_alpha=2.0).prepare(items, keys=keys(3), card=CARD)
    assert made["targets"].shape == (3, 3) and made["targets"][:, :2].tolist() == [[0, 1], [1, 0], [2, 1]]
    for number, (own, other, share) in enumerate(made["targets"].tolist()):
        assert 0.0 < share < 1.0
        wave = torch.lerp(items[int(own)].values, items[int(other)].values, share)
        torch.testing.assert_close(made["items"][number], (log_mel(wave, num_bins=16) + 4.0) / 9.0)
    half = views(mix_prob=0.5).prepare([sound("a", label=0), sound("b", label=1)] * 100, keys=keys(200), card=CARD)["targets"][:, 2]
    assert 70 < int((half == 0).sum()) < 130 and 0.4 < half[half > 0].mean() < 0.6
    alone = views(mix_prob=1.0).prepare(items[:1], keys=keys(1), card=CARD)
    assert alone["targets"].tolist() == [[0.0, 0.0, 0.0]]


def test_the_loss_of_a_mixture_is_that_of_its_two_classes() -> None:
    model = classifier(label_smoothing=0.1)
    logits = noise(5, 10, name="logits")
    targets = torch.tensor([[0, 3, 0.25], [1, 1, 0.5], [2, 9, 0.0], [4, 5, 1.0], [6, 7, 0.7]])
    soft = torch.lerp(F.one_hot(targets[:, 0].long(), 10).float(), F.one_hot(targets[:, 1].long(), 10).float(), targets[:, 2:])
    torch.testing.assert_close(model._mixed_loss(logits, targets), F.cross_entropy(logits, soft, reduction="none", label_smoothing=0.1))


def test_two_steps_with_mixtures_move_the_backbone_and_give_scores() -> None:
    source = Subset(Sounds(15, frames=40), indices=range(15))  # without the source's own test part, which is large
    module = LabelledData(source, views(mix_prob=0.5, time_mask=4), batch_size=4, num_workers=0, cache=False)
    model = classifier(ema=None)
    before = {name: value.clone() for name, value in model.student.state_dict().items()}
    trained(model, module, steps=2).validate(model, datamodule=module, verbose=False)
    after = model.student.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before if "blocks.0" in name)
    assert model.found["accuracy"].n == len(module.test) > 0 and 0 <= model.found["accuracy"].value <= 100


def write(path: Path, hertz: float, *, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, np.round(9_000 * np.sin(2 * np.pi * hertz * np.arange(rate // 2) / rate)).astype(np.int16))
    return path


def test_a_model_of_sounds_is_saved_and_reads_files(tmp_path: Path) -> None:
    transform = SoundTransform(24, 16, -4.0, 9.0)
    model = FineTuned.of(classifier(), transform=transform, scores={})
    again = FineTuned.load(model.save(tmp_path / "model"))
    assert again.transform == transform and again.transform.item_shape == (1, 24, 16)
    waves = [noise(9000, name="a"), noise(2000, name="b").numpy()]
    assert torch.equal(again.predict(waves), model.predict(torch.stack([transform(wave) for wave in waves])))
    paths = [write(tmp_path / "a.wav", 500.0), tmp_path / "broken.wav", write(tmp_path / "b.wav", 900.0, rate=8_000)]
    paths[1].write_bytes(b"nothing")
    found = list(predictions(again, paths))
    assert [one.probabilities is None for one in found] == [False, True, False] and "broken.wav" in found[1].reason
    with pytest.raises(UnreadableItemError, match="no such file"):
        transform.read(tmp_path / "missing.wav")


@pytest.mark.slow
def test_a_folder_of_sounds_becomes_a_model_and_its_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(encoder(), tmp_path / "backbone")
    for number in range(8):
        write(tmp_path / "sounds" / "low" / f"{number}.wav", 300.0 + 9 * number)
        write(tmp_path / "sounds" / "high" / f"{number}.wav", 3000.0 + 90 * number)
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    command = ["finetune", "backbone", "--config", "finetune/sounds", "--data", "sounds", "--epochs", "1", "--runs", "runs"]
    assert main([*command, "--data.batch_size", "4", "--data.views.init_args.time_mask", "4", *quiet]) == 0
    (model,) = (tmp_path / "runs" / "finetune" / "sounds").glob("2*/model")
    assert main(["predict", str(model), "sounds", "--out", "table.csv", "--pictures", "sheets"]) == 0
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(rows) == 16 and {row["class"] for row in rows} <= {"low", "high"}
    assert len(list((tmp_path / "sheets").glob("*.png"))) == 2
    with pytest.raises(ValueError, match="does not divide by the patch of 8"):
        SoundViews.sized(encoder(), {"size": 20, "num_bins": 16})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 24, "bins": 16, "mean": 0.0}, "accepted: an object with bins, frames, mean, std"),
        ({"frames": 0, "bins": 16, "mean": 0.0, "std": 1.0}, "has a value out of range"),
        ({"frames": 24, "bins": 16, "mean": 0.0, "std": 0.0}, "has a value out of range"),
        ({"frames": 24, "bins": 16, "mean": "0", "std": 1.0}, "has a value out of range"),
    ],
)
def test_a_broken_transform_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transform_from_json(values)


def test_settings_out_of_range_are_refused_and_the_backbones_sizes_are_taken() -> None:
    wrong = {"shift": 2.0, "mix_prob": -1.0, "time_mask": -1, "frequency_mask": -2, "mix_alpha": 0.0, "num_bins": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            SoundViews(24, **{name: value})
    assert SoundViews.settings_of(CARD) == {"size": 24, "num_bins": 16}
    with pytest.raises(ValueError, match="only images are mixed"):
        classifier(mixup=0.2)
