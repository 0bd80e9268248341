"""Items with any number of labels: what the loss is handed, mixtures, scores, what a saved model says, and what is refused."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import noise
from scipy.io import wavfile
from sklearn.metrics import average_precision_score
from tuned_models import pictures, trained, vit

from glpretrain.cli import main
from glpretrain.core.fbank import RATE
from glpretrain.data import ImageList, Sounds, Subset
from glpretrain.data.label_sets import LabelSets
from glpretrain.encoders import ViT
from glpretrain.finetune import Classification, FineTuned, LabelledData, LabelledViews, Multilabel, SoundViews, Transform
from glpretrain.finetune.data import mixed_targets
from glpretrain.weights import export

LABELS = ["bright", "dark", "red"]


def listed(folder: Path) -> Path:
    """A list of pictures of three colours with the labels that they have."""
    pictures(folder / "pictures")
    tags = {"blue": "dark", "green": "bright", "red": "red;bright"}
    lines = [f"pictures/{name}/{number}.png\t{tags[name]}" for name in tags for number in range(8)]
    (folder / "list.tsv").write_text("\n".join([*lines[:-1], "pictures/red/7.png\t;"]) + "\n")
    return folder / "list.tsv"


def data(folder: Path, *, separator: str | None = ";") -> LabelledData:
    return LabelledData(ImageList(listed(folder)), LabelledViews(16), batch_size=4, num_workers=0, cache=False, separator=separator)


def model(encoder: ViT | None = None, **settings: object) -> Multilabel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Multilabel(vit() if encoder is None else encoder, LABELS, **settings)


def test_a_training_batch_hands_the_loss_the_labels_of_each_item(tmp_path: Path) -> None:
    module, seen = data(tmp_path), []
    assert module.classes == LABELS
    tagger = model()

    def watched(batch, progress):
        found = Multilabel.losses(tagger, batch, progress)
        logits = tagger.logits(batch)
        torch.testing.assert_close(found["labels"], F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none").mean(dim=1))
        seen.append((batch.index, batch.targets))
        return found

    tagger.losses = watched  # type: ignore[method-assign]
    trained(tagger, module, steps=4)
    sets = LabelSets(module.source.classes)
    for index, targets in seen:
        expected = sets.targets(torch.tensor([module.source.label_of(one) for one in index.tolist()]))
        assert torch.equal(targets, expected) and targets.shape[1] == 3
    assert sum(len(index) for index, _ in seen) == 16


def test_mixed_targets_weigh_the_labels_of_both_items() -> None:
    sets = LabelSets(["a;b", "b", ";"])
    assert mixed_targets(torch.tensor([0, 2]), sets).tolist() == [[1, 1], [0, 0]]
    mixed = mixed_targets(torch.tensor([[0, 1, 0.25], [2, 0, 0.5], [1, 1, 0.7]]), sets)
    torch.testing.assert_close(mixed, torch.tensor([[0.75, 1.0], [0.5, 0.5], [0.0, 1.0]]))


def test_mixed_sounds_are_learned_and_scored_over_the_labels() -> None:
    source = Subset(Sounds(24, frames=40, labels="all"), indices=range(24))  # without the source's own test part, which is large
    module = LabelledData(source, SoundViews(24, num_bins=16, mix_prob=0.9), batch_size=4, num_workers=0, cache=False, separator=";")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"img_size": [24, 16], "patch_size": 8, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 3}
        encoder = ViT("vit_tiny_patch16_224", **sizes, mean=[-4.0], std=[9.0], modality="audio")
        tagger = Multilabel(encoder, module.classes, ema=None)
    before = {name: value.clone() for name, value in tagger.student.state_dict().items()}
    seen: list[torch.Tensor] = []
    losses = tagger.losses
    tagger.losses = lambda batch, progress: (seen.append(batch.targets), losses(batch, progress))[1]  # type: ignore[method-assign]
    trained(tagger, module, steps=3).validate(tagger, datamodule=module, verbose=False)
    assert any(((targets > 0) & (targets < 1)).any() for targets in seen)
    assert any(not torch.equal(value, before[name]) for name, value in tagger.student.state_dict().items() if "blocks.0" in name)
    assert tagger.found["map"].n == len(module.test) > 0


def test_the_score_is_scikit_learns_mean_average_precision() -> None:
    tagger, logits, targets = model(), noise(50, 3, name="logits"), (noise(50, 3, name="targets") > 0.3).float()
    found = tagger.scores(tagger.outcomes(logits, targets), None)["map"]
    assert found.value == pytest.approx(100 * average_precision_score(targets.numpy(), logits.numpy(), average="macro"))


def test_a_saved_model_gives_each_label_a_probability_of_its_own(tmp_path: Path) -> None:
    tuned = FineTuned.of(model(), transform=Transform((16, 16), 0.875, (0.5,) * 3, (0.2,) * 3, "bicubic"), scores={})
    again = FineTuned.load(tuned.save(tmp_path / "model"))
    items = noise(4, 3, 16, 16, name="items")
    with torch.inference_mode():
        assert again.card.task == "multilabel" and torch.equal(again.predict(items), tuned(items).sigmoid())


def test_data_and_model_must_agree_on_the_number_of_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.separator=None given with Multilabel; accepted: what stands between"):
        trained(model(), data(tmp_path, separator=None), steps=1)
    other = tmp_path / "other"
    other.mkdir()
    module = data(other)
    with pytest.raises(ValueError, match=r"data.separator=';' given with Classification; accepted: null, or Multilabel"):
        trained(Classification(vit(), module.classes), module, steps=1)
    with pytest.raises(ValueError, match=r"Multilabel: drop_path=1.0"):
        model(drop_path=1.0)


@pytest.mark.slow
def test_a_list_with_several_labels_becomes_a_model_and_its_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"img_size": [24, 16], "patch_size": 8, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 3}
    export(ViT("vit_tiny_patch16_224", **sizes, mean=[-4.0], std=[9.0], modality="audio"), tmp_path / "backbone")
    lines = []
    for number in range(24):
        low, high = number % 2, number // 2 % 2
        time = np.arange(RATE // 2) / RATE
        wave = 6000 * (low * np.sin(600 * np.pi * time) + high * np.sin(6000 * np.pi * time)) + 300 * np.random.default_rng(number).normal(
            size=len(time)
        )
        wavfile.write(tmp_path / f"{number}.wav", RATE, wave.astype(np.int16))
        lines.append(f"{number}.wav\t" + ";".join(["low"] * low + ["high"] * high or [";"]))
    (tmp_path / "list.tsv").write_text("\n".join(lines) + "\n")
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    command = ["finetune", "backbone", "--config", "finetune/sound_tags", "--data", "list.tsv", "--epochs", "1", "--runs", "runs"]
    assert main([*command, "--data.batch_size", "4", "--data.views.init_args.time_mask", "4", *quiet]) == 0
    (saved,) = (tmp_path / "runs" / "finetune" / "sound_tags").glob("2*/model")
    assert main(["predict", str(saved), "0.wav", "3.wav", "--out", "table.csv"]) == 0
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [{row["class"], row["class_2"]} for row in rows] == [{"low", "high"}] * 2
    for row in rows:
        likely = {row[f"class{place}"] for place in ("", "_2") if float(row[f"probability{place}"]) > 0.5}
        assert set(filter(None, row["labels"].split(";"))) == likely
