"""ASiT: rebuild groups of replaced inputs, and distil `cls` between views and every patch within a view.

Idea: the teacher sees clean views, the student the same views with groups of inputs replaced (`masking.GroupCorruption`). A small head
rebuilds what was replaced; `cls` is distilled between views as in DINO; and each patch, replaced or not, is distilled from the teacher's
patch at the same place of the same view. Made for log-mel filterbanks of sounds, it takes any encoder with patches on a grid.
Paper: Atito et al., "ASiT: local-global audio spectrogram vision transformer for event classification", arXiv 2211.13189. Its text was not
available to us; what is here follows the authors' code.
Reference code: two forms by the same author. 2023: Sara-Ahmed/ASiT at 1f1d63c. 2024: the same author's later commits, kept in
aneeshp4/Vision-Transformer-Based-Audio-Deepfake-Detection at 63eda5b (main_ASiT.py, data_transformations.py, vision_transformer.py). The
defaults are those of 2024, with one layer of prototypes for `cls` and patches, and short local views. The form of 2023 is
`num_patch_prototypes: 1024`, `decoder_dim: 768`, `decoder_bottleneck_dim: 128`, `train_gain: false`, `weights: {cls: 1, patch: 1,
inputs: 2}`, no local views, and `shift_prob: 0.5` of the views.
Known differences: replaced inputs show the neighbour in the batch, which is never the item itself; sounds have 16 kHz (2023 declares 32 kHz
without resampling); the last layer of the head that rebuilds starts as its other layers do; temperatures follow progress step by step, not
epoch by epoch; bf16 in place of fp16 with a scaler. Two defects of the official code are settings here: in 2023 the prototypes are never
frozen, because no parameter has the name that is looked for (`freeze_prototypes: 0`); in 2024 the gains always learn, whatever
`norm_last_layer` says (`train_gain: true`, the default as there).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from glpretrain.core.batch import Batch, Uses, ViewGroup
from glpretrain.core.patches import patchify
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.objectives.distillation import PatchDistillation, ViewDistillation
from glpretrain.objectives.reconstruction import CorruptedPixels
from glpretrain.training.branch import Branch
from glpretrain.training.heads import PixelHead, ProjectionHead
from glpretrain.training.prototypes import PrototypeLogits, Prototypes


class ASiT(Method):
    """Reconstruction of replaced inputs, self-distillation of `cls` between views and of patches within a view.

    Args:
        encoder: the trunk; its patches must be on a grid of two axes.
        num_prototypes: number of prototypes, K, of `cls`.
        num_patch_prototypes: number of prototypes of a layer of their own for patches (2023: 1024); None shares that of `cls`.
        hidden_dim: hidden width of the projection's MLP, which `cls` and patches share.
        bottleneck_dim: width of the projection, which is on the unit sphere.
        num_layers: number of layers of the projection's MLP.
        train_gain: whether one gain per prototype is learned (2024; not in 2023).
        decoder_dim: hidden width of the head that rebuilds the inputs; None is the encoder's width (2023: 768).
        decoder_bottleneck_dim: width before its last layer; None is `decoder_dim` (2023: 128).
        student_temp: temperature of the student's assignments.
        teacher_temp: temperature of the teacher's targets, over progress (2023: `warmup: 0.3`).
        centre_momentum: momentum of the running centres of the teacher's logits, one for `cls` and one for patches.
        weights: weight of every term; None is 0.5 for `cls` and `patch` and 1 for `inputs`.
        momentum: momentum of the teacher's moving average, over progress.
        **kwargs: arguments of `Method`.

    Raises:
        ValueError: the patches of the encoder are on no grid of two axes.
    """

    terms = ("cls", "patch", "inputs")
    in_batch = ("inputs",)  # the number of replaced inputs, which differs from item to item, divides their error
    uses: ClassVar = {
        "global": Uses(needs=("corrupted", "corruption"), paired_with=("global", "local")),
        "local": Uses(required=False),
    }

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_prototypes: int = 8192,
        num_patch_prototypes: int | None = None,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        train_gain: bool = True,
        decoder_dim: int | None = None,
        decoder_bottleneck_dim: int | None = None,
        student_temp: float = 0.1,
        teacher_temp: Schedule = Schedule(0.07, warmup=0.05, warmup_start=0.04, shape="constant"),  # noqa: B008
        centre_momentum: float = 0.9,
        weights: dict[str, float] | None = None,
        momentum: Schedule = Schedule(0.996, 1.0),  # noqa: B008
        **kwargs,  # noqa: ANN003
    ) -> None:
        card = encoder.card
        if len(card.patch_size) != 2:
            raise ValueError(f"ASiT: rebuilds patches of two axes, the encoder is for {card.modality}; give one of images or sounds")
        rows, columns = card.patch_size
        self.patch_size, self.num_channels = (rows, columns), len(card.mean)
        counts = {"cls": num_prototypes} | ({} if num_patch_prototypes is None else {"patch": num_patch_prototypes})
        heads: dict[str, nn.Module] = {
            "projection": ProjectionHead(encoder.embed_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=num_layers),
            **{name: Prototypes(bottleneck_dim, num_prototypes=count, train_gain=train_gain) for name, count in counts.items()},
        }
        weights = {"cls": 0.5, "patch": 0.5, "inputs": 1.0} if weights is None else weights
        super().__init__(Branch(encoder, heads), weights=weights, momentum=momentum, **kwargs)
        # Not in the branch, because the teacher rebuilds nothing.
        self.decoder = PixelHead(
            encoder.embed_dim,
            patch_dim=rows * columns * self.num_channels,
            hidden_dim=decoder_dim,
            bottleneck_dim=decoder_bottleneck_dim,
            num_channels=self.num_channels,
        )
        self._patch_prototypes = "cls" if num_patch_prototypes is None else "patch"
        self.teacher_temp = teacher_temp
        self.cls_objective = ViewDistillation(num_prototypes=num_prototypes, student_temp=student_temp, centre_momentum=centre_momentum)
        self.patch_objective = PatchDistillation(
            num_prototypes=num_patch_prototypes or num_prototypes, student_temp=student_temp, centre_momentum=centre_momentum
        )
        self.input_objective = CorruptedPixels()

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`cls`: pairs of a teacher view and another student view; `patch`: all patches, in place; `inputs`: what was replaced."""
        group = batch.views["global"]
        assert group.corrupted is not None
        num_global, num_items = group.items.shape[:2]
        with torch.no_grad():
            seen = self.teacher_branch.encode(group.items.flatten(0, 1))
            teacher_cls = self._logits(self.teacher_branch, seen.cls, "cls").unflatten(0, (num_global, num_items))  # [G B K]
            teacher_patches = self._logits(self.teacher_branch, seen.patches, self._patch_prototypes)  # [(G B) N K]
        local = [batch.views["local"]] if "local" in batch.views else []
        views = [group.corrupted.flatten(0, 1), *(one.items.flatten(0, 1) for one in local)]
        keys = [group.keys, *(one.keys for one in local)]
        outputs = self.student.encode(views, keys=keys, cls_only=[False] + [True] * len(local))
        student_cls = self._logits(self.student, torch.cat([output.cls for output in outputs]), "cls")  # [(V B) K]
        patches = outputs[0].patches  # [(G B) N D]
        temp = self.teacher_temp(progress)
        terms = {
            "cls": self.cls_objective(
                student_logits=student_cls.unflatten(0, (-1, num_items)), teacher_logits=teacher_cls, teacher_temp=temp
            ),
            "patch": self.patch_objective(
                student_logits=self._logits(self.student, patches, self._patch_prototypes).flatten(0, 1),
                teacher_logits=teacher_patches.flatten(0, 1),
                mask=torch.ones(num_global, num_items, patches.shape[1], dtype=torch.bool, device=patches.device),
                teacher_temp=temp,
            ),
            "inputs": self._replaced_inputs(group, patches).unflatten(0, (num_global, num_items)).mean(dim=0),
        }
        self.cls_objective.update(teacher_logits=teacher_cls)
        self.patch_objective.update(teacher_logits=teacher_patches)
        return terms

    @staticmethod
    def _logits(branch: Branch, features: Tensor, prototypes: str) -> PrototypeLogits:
        return branch.heads[prototypes](branch.heads["projection"](features))

    def _replaced_inputs(self, group: ViewGroup, patches: Tensor) -> Tensor:
        """Float[(G B)]: error of the rebuilt inputs, from the student's patches Float[(G B) N D]."""
        assert group.corruption is not None
        predictions, targets = (
            inputs.unflatten(2, (-1, self.num_channels)).permute(0, 3, 1, 2)  # [(G B) C N P]
            for inputs in (self.decoder(patches), patchify(group.items.flatten(0, 1), patch_size=self.patch_size))
        )
        corruption = patchify(group.corruption.flatten(0, 1).unsqueeze(1), patch_size=self.patch_size)  # [(G B) N P]
        return self.input_objective(predictions=predictions.float(), targets=targets, corruption=corruption)
