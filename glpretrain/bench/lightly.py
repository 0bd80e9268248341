"""A step of DINO with the building blocks of lightly beside ours: what `glpretrain bench --against lightly` runs.

The package is imported as it is installed. Its loss, head and moving average are used in the lines of its own example
(examples/pytorch/dino.py, lightly 1.6.0), with the ViT of timm at hand, AdamW, and the gradient clipping of its benchmark
(benchmarks/imagenet/vitb16/dino.py).
"""

import copy
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from glpretrain.encoders import ViT
from glpretrain.methods import DINO
from glpretrain.methods.base import Method


def require_lightly() -> None:
    """Check that lightly is installed.

    Raises:
        ValueError: it is not.
    """
    if find_spec("lightly") is None:
        raise ValueError("bench: --against lightly needs the package lightly, which is not installed; install it (pip install lightly)")


class Lightly:
    """Student, teacher, loss and optimizer of lightly's example, of the same sizes as ours.

    Args:
        method: ours, a DINO method with a ViT, on its device.
        dtype: type of autocast.

    Raises:
        ValueError: lightly is not installed, or the method or its encoder is of another kind.
    """

    def __init__(self, method: Method, *, dtype: torch.dtype | None) -> None:
        require_lightly()
        encoder = method.encoder
        if not isinstance(method, DINO) or not isinstance(encoder, ViT):
            raise ValueError(f"bench: lightly beside {type(method).__name__} of {type(encoder).__name__}; accepted: DINO of ViT")
        modules, utils = import_module("lightly.models.modules"), import_module("lightly.models.utils")
        projection, prototypes = method.student.heads["cls"].children()
        layers = [layer for layer in projection.modules() if isinstance(layer, nn.Linear)]
        num_prototypes = len(prototypes.get_parameter("directions"))
        sizes = (encoder.embed_dim, layers[0].out_features, layers[-1].out_features, num_prototypes)
        norm = not prototypes.get_parameter("gain").requires_grad
        # Student and teacher. A head of torch's older weight norm cannot be copied.
        self._heads = [modules.DINOProjectionHead(*sizes, freeze_last_layer=1, norm_last_layer=norm) for _ in range(2)]
        self._heads[1].load_state_dict(self._heads[0].state_dict())
        self._backbones = [copy.deepcopy(encoder.model) for _ in range(2)]
        self._loss = import_module("lightly.loss").DINOLoss(output_dim=num_prototypes, warmup_teacher_temp_epochs=0)
        device = next(method.parameters()).device
        for part in (*self._heads, self._loss):
            part.to(device)
        for part in (self._backbones[1], self._heads[1]):
            utils.deactivate_requires_grad(part)
        self._move = utils.update_momentum
        self._dtype = dtype
        self._parameters = [*self._backbones[0].parameters(), *self._heads[0].parameters()]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-6)

    def step(self, images: Sequence[Tensor], masks: Sequence[Tensor] | None) -> None:
        """The lines of its example, view by view: Float[B C H W] each; masks are not used."""
        for student, teacher in (self._backbones, self._heads):
            self._move(student, teacher, m=0.996)
        with torch.autocast(images[0].device.type, dtype=self._dtype, enabled=self._dtype is not None):
            with torch.no_grad():
                teacher_output = [self._forward(view, teacher=True) for view in images[:2]]
            student_output = [self._forward(view, teacher=False) for view in images]
            loss = self._loss(teacher_output, student_output, epoch=1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 3.0)
        self._heads[0].cancel_last_layer_gradients(current_epoch=1)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def parameters(self) -> list[nn.Parameter]:
        """Those of the student."""
        return self._parameters

    def _forward(self, view: Tensor, *, teacher: bool) -> Tensor:
        tokens = self._backbones[teacher].forward_features(view)
        return self._heads[teacher](tokens[:, 0])
