"""Every objective computes in float32, whatever the precision of its inputs and the autocast around it."""

import pytest
import torch
from golden import noise
from torch import Tensor
from torch.nn import functional

from glpretrain import objectives
from glpretrain.objectives import Objective

G, V, B, N, K, D = 2, 3, 7, 6, 11, 8
MANY = 8192  # items; products over so many overflow in float16
_ATTENTION = ("queries", "keys", "values")
NAMES = sorted(set(objectives.__all__) - {"Objective"})


def example(name: str, items: int = B) -> tuple[Objective, dict[str, Tensor], dict[str, object]]:
    """An objective, its tensors of real numbers that come out of networks, and its other arguments."""

    def real(*shape: int, of: str, scale: float = 1.0) -> Tensor:
        return scale * noise(*shape, name=of)

    def unit(*shape: int, of: str) -> Tensor:
        return functional.normalize(noise(*shape, name=of), dim=-1)

    pair = {"predictions": real(items, N, D, of="p"), "targets": real(items, N, D, of="t")}
    sets = {"predictions": real(items, N, 3, of="p"), "targets": real(items, N + 1, 3, of="t")}
    logits = {"student_logits": real(V, items, K, of="s"), "teacher_logits": real(G, items, K, of="t")}
    mask = noise(items, N, name="mask") > 0.2
    hidden = int(mask.sum())
    attention = {f"{who}_{what}": real(items, 2, N, 4, of=who + what, scale=3.0) for who in ("student", "expert") for what in _ATTENTION}
    examples: dict[str, tuple[Objective, dict[str, Tensor], dict[str, object]]] = {
        "ChamferL1": (objectives.ChamferL1(), sets, {}),
        "ChamferL2": (objectives.ChamferL2(), sets, {}),
        "CorruptedPixels": (
            objectives.CorruptedPixels(),
            {"predictions": real(items, 3, 2, N, of="p"), "targets": real(items, 3, 2, N, of="t")},
            {"corruption": mask.unsqueeze(1).repeat(1, 2, 1)},
        ),
        "CosineDistance": (objectives.CosineDistance(), {name: value[:, 0] for name, value in pair.items()}, {}),
        "FeatureDistance": (objectives.FeatureDistance(), pair, {"grid": (2, 3), "target_grid": (3, 2)}),
        "GramDistance": (
            objectives.GramDistance(),
            {"tokens": real(items, N, D, of="t"), "targets": real(items, N, D, of="g")},
            {},
        ),
        "InfoNCE": (objectives.InfoNCE(), {name: real(items, D, of=name) for name in ("queries", "keys", "hallucinated")}, {}),
        "KoLeo": (objectives.KoLeo(), {"features": real(items, D, of="f")}, {}),
        "MeanCosine": (objectives.MeanCosine(), {"tokens": real(items, N, D, of="t")}, {}),
        # One teacher view and two crops: the products of all items with all items take memory.
        "NPair": (objectives.NPair(), {"assignments": real(1, items, K, of="a").softmax(-1), "logits": real(2, items, K, of="l")}, {}),
        "NegativeCosine": (objectives.NegativeCosine(), {"queries": real(items, D, of="q"), "keys": real(items, D, of="k")}, {}),
        "PatchDistillation": (
            objectives.PatchDistillation(num_prototypes=K),
            {"student_logits": real(hidden, K, of="s"), "teacher_logits": real(hidden, K, of="t")},
            {"mask": mask.unsqueeze(0), "teacher_temp": 0.04},
        ),
        "PatchInfoNCE": (
            objectives.PatchInfoNCE(),
            {"queries": real(items, N, D, of="q"), "keys": real(items, N, D, of="k")},
            {"nearest": torch.arange(N).flip(0).expand(items, -1), "valid": torch.arange(N).expand(items, -1) != 2},
        ),
        "PatchPixels": (objectives.PatchPixels(), pair, {"mask": mask}),
        "QueueInfoNCE": (
            objectives.QueueInfoNCE(dim=D, queue_size=13),
            {"queries": unit(V, items, D, of="q"), "keys": unit(G, items, D, of="k"), "hallucinated": unit(G, V, items, D, of="h")},
            {},
        ),
        "TokenDistillation": (
            objectives.TokenDistillation(num_prototypes=K, sinkhorn_iterations=3),
            {"student_logits": real(items * N, K, of="s"), "teacher_logits": real(items * N, K, of="t")},
            {"valid": mask.unsqueeze(0), "teacher_temp": 0.04},
        ),
        "TokenRelations": (objectives.TokenRelations(num_heads=2), attention, {}),
        "ViewDistillation": (objectives.ViewDistillation(num_prototypes=K), logits, {"teacher_temp": 0.04}),
        "WhitenedFeatures": (objectives.WhitenedFeatures(), pair, {}),
    }
    return examples[name]


def computed(objective: Objective, tensors: dict[str, Tensor], others: dict[str, object], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The loss and the gradients of all tensors that get one; `dtype` is that of the autocast around the loss, as Lightning has it."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = objective(**tensors, **others)
    gradients = torch.autograd.grad(loss.mean(), list(tensors.values()), allow_unused=True)
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_half_precision_inputs_change_neither_loss_nor_gradient(name: str, dtype: torch.dtype) -> None:
    objective, tensors, others = example(name)
    leaves = {key: value.to(dtype).float().requires_grad_() for key, value in tensors.items()}  # what half precision can hold
    halves = {key: value.detach().to(dtype).requires_grad_() for key, value in leaves.items()}
    expected = computed(objective, leaves, others)
    found, of_halves = (computed(objective, given, others, dtype) for given in (leaves, halves))
    assert found[0].dtype == of_halves[0].dtype == torch.float32 and len(found) > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    for one, other in zip(of_halves, [expected[0], *(value.to(dtype) for value in expected[1:])], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_items_are_finite_in_float16(name: str) -> None:
    objective, tensors, others = example(name, items=MANY)
    leaves = {key: value.half().requires_grad_() for key, value in tensors.items()}
    assert all(value.isfinite().all() for value in computed(objective, leaves, others, torch.float16))
