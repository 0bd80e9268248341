"""A fine-tuned model as it is saved, loaded and used: the network, its classes, and what is done to an item before it.

A folder holds `model.safetensors` and `card.json`. Nothing in it is ever unpickled, and no recipe is needed to use it.
Left out: training (`base`), and how programs for other tools are written (`exports`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from glpretrain import __version__
from glpretrain.core.files import new_folder, write_json
from glpretrain.core.types import EncoderCard
from glpretrain.encoders.base import build
from glpretrain.encoders.states import load_strictly
from glpretrain.finetune.base import HEAD, FineTune, Head, logits_of
from glpretrain.finetune.class_heads import class_head
from glpretrain.finetune.classification import Classification
from glpretrain.finetune.cloud_transform import CloudTransform
from glpretrain.finetune.exports import ExportedModel, Format, export_model
from glpretrain.finetune.item_transforms import AnyTransform, transform_from_json
from glpretrain.finetune.multilabel import Multilabel
from glpretrain.finetune.parts import PartHead, Parts
from glpretrain.finetune.segmentation import Segmentation
from glpretrain.finetune.segmentation_heads import segmentation_head
from glpretrain.finetune.transforms import Transform
from glpretrain.finetune.windows import classes_at, whole_logits
from glpretrain.training.branch import Branch
from glpretrain.weights.files import read_json, read_safetensors
from glpretrain.weights.folders import CARD, WEIGHTS, require_finite, write_weights

FORMAT = 1
HEADS: Mapping[str, Callable[..., Head]] = {  # by the task
    Classification.task: class_head,
    Multilabel.task: class_head,
    Segmentation.task: segmentation_head,
    Parts.task: PartHead,
}
_FIELDS = {"format", "written_by", "task", "classes", "head", "transform", "scores", "encoder"}


@dataclass(frozen=True)
class TaskCard:
    """What is stored with the weights of a fine-tuned model.

    Args:
        task: name of the task.
        classes: names of the classes, in the order of the logits.
        head: settings of the head.
        transform: what is done to an item.
        encoder: card of the encoder.
        scores: by name the value, both ends of the interval, the number of items, and the data that it was measured on.
    """

    task: str
    classes: tuple[str, ...]
    head: dict[str, object]
    transform: AnyTransform
    encoder: EncoderCard
    scores: dict[str, dict[str, object]]

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "format": FORMAT,
            "written_by": f"glpretrain {__version__}",
            "task": self.task,
            "classes": list(self.classes),
            "head": self.head,
            "transform": self.transform.to_json(),
            "scores": self.scores,
            "encoder": self.encoder.to_json(),
        }

    @classmethod
    def from_json(cls, values: object) -> "TaskCard":
        """Inverse of `to_json`.

        Raises:
            ValueError: a field is missing, unknown or of another kind.
        """
        if not isinstance(values, dict) or values.keys() != _FIELDS or values["format"] != FORMAT:
            raise ValueError(f"accepted: an object of format {FORMAT} with {', '.join(sorted(_FIELDS))}")
        task, classes, head, scores = (values[name] for name in ("task", "classes", "head", "scores"))
        if task not in HEADS:
            raise ValueError(f"task={task!r}; accepted: {', '.join(HEADS)}")
        if not (isinstance(classes, list) and len(classes) > 1 and all(isinstance(name, str) for name in classes)):
            raise ValueError("classes: accepted: a list of two names or more")
        if not (isinstance(head, dict) and isinstance(scores, dict)):
            raise ValueError("head and scores: accepted: objects")
        return cls(task, tuple(classes), head, transform_from_json(values["transform"]), EncoderCard.from_json(values["encoder"]), scores)


class FineTuned(nn.Module):
    """A fine-tuned model: items to logits, with everything that is needed to use it.

    Args:
        branch: the network.
        card: its card.
    """

    def __init__(self, branch: Branch, card: TaskCard) -> None:
        super().__init__()
        self.branch, self.card = branch, card
        self.eval()

    @classmethod
    def of(cls, trained: FineTune, *, transform: AnyTransform, scores: dict[str, dict[str, object]]) -> "FineTuned":
        """What a training gives, which shares its weights.

        Args:
            trained: the module that was trained.
            transform: what an evaluation did to an item.
            scores: see `TaskCard`.
        """
        card = TaskCard(trained.task, tuple(trained.classes), trained.head.settings, transform, trained.backbone().card, scores)
        return cls(trained.evaluated, card)

    @classmethod
    def load(cls, folder: str | Path) -> "FineTuned":
        """The model of a folder that `save` wrote, in evaluation mode on the CPU.

        Raises:
            ValueError: the folder is no such folder, or a file in it is missing or broken.
        """
        path = Path(folder)
        if not (path / CARD).is_file():
            found = "does not exist" if not path.exists() else f"has no {CARD}"
            raise ValueError(f"model: {path} {found}; accepted: a folder that glpretrain finetune wrote, such as runs/.../latest/model")
        if not is_fine_tuned(path):
            raise ValueError(f"model: {path} is a backbone; accepted: a fine-tuned model; fine-tune it with: glpretrain finetune {path}")
        try:
            card = TaskCard.from_json(read_json(path / CARD))
            encoder = build(card.encoder)
            head = HEADS[card.task](encoder.embed_dim, len(card.classes), **card.head)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {path / CARD}: {error}") from error
        branch = Branch(encoder, {HEAD: head})
        try:
            load_strictly(branch, read_safetensors(path / WEIGHTS))
        except ValueError as error:
            raise ValueError(f"model: {path}: {error}") from error
        return cls(branch, card)

    def save(self, folder: str | Path) -> Path:
        """Write the model to a new folder, completely or not at all.

        Raises:
            ValueError: the folder has something in it, or a weight is not finite.
        """
        folder, state = Path(folder), self.branch.state_dict()
        require_finite(state)
        with new_folder(folder, last=CARD, argument="model") as part:
            write_weights(state, part)
            write_json(part / CARD, self.card.to_json())
        return folder

    def export(self, out: str | Path, *, format: Format = "onnx") -> ExportedModel:
        """Write a program that needs neither this package nor timm, with the card beside it.

        Args:
            out: a new or empty folder.
            format: `torch` or `onnx`.

        Raises:
            ValueError: a model of clouds is to be written as ONNX, whose converter lacks the steps that choose points; or see
                `exports.export_model`.
        """
        if format == "onnx" and isinstance(self.transform, CloudTransform):
            raise ValueError("export: format='onnx' given; accepted for a model of clouds: torch")
        return export_model(self.cpu(), Path(out), format=format, item_shape=self.transform.item_shape, card=self.card.to_json())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.card.classes

    @property
    def transform(self) -> AnyTransform:
        """What is done to an item: a PIL image, or UInt8[C h w], to Float[C H W]; a cloud, Float[p 3+], to Float[P 3]; or a sound,
        Float[S], to Float[1 T F]."""
        return self.card.transform

    def forward(self, items: Tensor) -> Tensor:
        """Logits, Float[B K *S], of Float[B *item] that `transform` made."""
        return logits_of(self.branch, items)

    @torch.inference_mode()
    def predict(self, items: Tensor | Sequence[Image.Image] | Sequence[np.ndarray]) -> Tensor:
        """Probabilities, Float[B K *S], on the CPU; those of one item add up to 1, but where it may have any number of labels.

        Args:
            items: Float[B *item] that `transform` made; or PIL images, or the arrays of clouds, Float[p 3+], or of sounds, Float[S].

        Raises:
            ValueError: the model segments pictures, which have sizes of their own.
        """
        if not isinstance(items, Tensor):
            if self.card.task == Segmentation.task:
                raise ValueError("predict: pictures given to a model for segmentation; accepted: windows, Float[B C H W]; or call segment")
            items = torch.stack([self.transform(item) for item in items])  # pyright: ignore[reportArgumentType]  of the model's own kind
        device = next(self.branch.parameters()).device
        logits = self(items.to(device)).float()
        return (logits.sigmoid() if self.card.task == Multilabel.task else logits.softmax(dim=1)).cpu()

    @torch.inference_mode()
    def segment(self, image: Image.Image | Tensor, *, batch_size: int = 32) -> Tensor:
        """The class of every pixel, Int[h w], on the CPU.

        Args:
            image: a PIL image, or UInt8[C h w].
            batch_size: number of windows that are computed at once.

        Raises:
            ValueError: the model classifies pictures.
        """
        transform = self.transform
        if self.card.task != Segmentation.task or not isinstance(transform, Transform) or transform.crop_pct is not None:
            raise ValueError(f"segment: a model for {self.card.task} given; accepted: one for {Segmentation.task}")
        size = tuple(image.shape[1:]) if isinstance(image, Tensor) else (image.height, image.width)
        device = next(self.branch.parameters()).device
        logits = whole_logits(transform(image).to(device), self, batch_size=batch_size)
        return classes_at(logits, (size[0], size[1])).cpu()


def is_fine_tuned(path: str | Path) -> bool:
    """Whether a path is a folder with a fine-tuned model, and not a backbone."""
    card = Path(path) / CARD
    if not card.is_file():
        return False
    values = read_json(card)
    return isinstance(values, dict) and "task" in values
