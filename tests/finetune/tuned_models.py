"""A tiny backbone, folders of pictures, and models on them: what the tests of fine-tuning share."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from golden import noise
from PIL import Image

from glpretrain.core.batch import Batch, ViewGroup
from glpretrain.data import ImageFolder
from glpretrain.encoders import ViT
from glpretrain.finetune import Classification, FineTuned, LabelledData, LabelledViews, Transform

CLASSES = ("blue", "green", "red")
_COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (230, 30, 20)}


def vit(**changes: object) -> ViT:
    return ViT("vit_tiny_patch16_224", **{"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, **changes})


def pictures(folder: Path, *, each: int = 8, size: tuple[int, int] = (26, 20)) -> Path:
    """Pictures of one colour with noise, in a folder per class."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = torch.tensor(_COLOURS[name]) + 25 * noise(size[1], size[0], 3, name=f"{name}{number}")
            Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(folder / name / f"{number}.png")
    return folder


def data(folder: Path, *, batch_size: int = 4, cache: bool = False, **views: object) -> LabelledData:
    return LabelledData(ImageFolder(folder), LabelledViews(16, **views), batch_size=batch_size, num_workers=0, cache=cache)


def classifier(encoder: ViT | None = None, **settings: object) -> Classification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classification(vit() if encoder is None else encoder, CLASSES, **settings)


def trained(model: Classification, module: LabelledData, *, steps: int, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    with TemporaryDirectory() as folder:  # of the list of unreadable files
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            default_root_dir=folder,
            **quiet,
        )
        trainer.fit(model, datamodule=module)
    return trainer


def batch(*, items: int = 4) -> Batch:
    group = ViewGroup(noise(1, items, 3, 16, 16, name="items"), keys=torch.arange(items)[None])
    return Batch(torch.arange(items), {"global": group}, torch.ones(items), torch.arange(items) % len(CLASSES))


def apart(model: Classification) -> Classification:
    """With a head that is far from zero."""
    with torch.no_grad():
        for name, parameter in model.student.heads.named_parameters():
            parameter.copy_(noise(*parameter.shape, name=name))
    return model


def finished(model: Classification) -> FineTuned:
    card = model.encoder.card
    scores = {"accuracy": {"value": 50.0, "low": 40.0, "high": 60.0, "n": 12, "measured_on": "photos"}}
    return FineTuned.of(model, transform=Transform((16, 16), 0.875, card.mean, card.std), scores=scores)
