"""Mugs' losses, queues, memories and the hallucinated positives against the official code."""

import pytest
import torch
import torch.nn.functional as F
from golden import load, noise, official_weights
from torch import Tensor

from glpretrain.objectives.contrastive import QueueInfoNCE
from glpretrain.objectives.distillation import ViewDistillation
from glpretrain.training.heads import Hallucinator
from glpretrain.training.memory import FeatureQueue

LOSS, MEMORY, HALLUCINATOR = load("mugs_loss")["settings"], load("mugs_memory")["settings"], load("hallucinator")["settings"]


def unit(values: Tensor) -> Tensor:
    return F.normalize(values.double(), dim=-1).float()


def worst(pairs: list[tuple[Tensor | float, list | float]]) -> float:
    """Largest difference relative to the value, or to a tenth of its tensor's largest where the value is smaller."""
    found = 0.0
    for actual, expected in pairs:
        actual, expected = torch.as_tensor(actual, dtype=torch.float64).flatten(), torch.tensor(expected, dtype=torch.float64).flatten()
        scale = expected.abs().clamp(min=0.1 * expected.abs().max().item())
        found = max(found, ((actual - expected).abs() / scale.clamp(min=1e-12)).max().item())
    return found


@pytest.mark.parametrize("number", range(len(LOSS)))
def test_losses_gradients_queue_and_centre_follow_the_official_code(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    setting = LOSS[number]
    G, V, B, D, K, P = (setting[axis] for axis in "GVBDKP")
    contrast = QueueInfoNCE(dim=D, queue_size=K)
    contrast.queue.rows.copy_(unit(noise(K, D, name=f"queue{number}")))
    group = ViewDistillation(num_prototypes=P)
    pairs = []
    for i, step in enumerate(setting["steps"]):
        queries = unit(noise(V, B, D, name=f"queries{number}.{i}")).requires_grad_()
        keys = unit(noise(G, B, D, name=f"keys{number}.{i}"))
        loss = contrast(queries=queries, keys=keys).mean()
        student = (2 * noise(V, B, P, name=f"student{number}.{i}")).requires_grad_()
        teacher = noise(G, B, P, name=f"teacher{number}.{i}")
        group_loss = group(student_logits=student, teacher_logits=teacher, teacher_temp=step["teacher_temp"], balanced=True).mean()
        (loss + group_loss).backward()
        contrast.update(keys=keys)
        group.update(teacher_logits=teacher)
        contrast.advance(), group.advance()
        pairs += [(loss.detach(), step["contrast"]), (group_loss.detach(), step["group"])]
        if step["contrast_gradient"] is not None:
            pairs += [(queries.grad, step["contrast_gradient"]), (student.grad, step["group_gradient"])]
        assert contrast.queue.place == step["pointer"]
    pairs += [(contrast.queue.rows, setting["queue_after"]), (group.centre, setting["centre_after"])]
    with capsys.disabled():
        print(f"\nMugs losses, V={V} B={B} D={D} queue {K}, {P} prototypes: largest relative difference {worst(pairs):.1e}")
    assert worst(pairs) <= 1e-5


@pytest.mark.parametrize("number", range(len(MEMORY)))
def test_memory_with_the_official_pointer_holds_the_official_rows(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    setting = MEMORY[number]
    K, B, D = setting["K"], setting["B"], setting["D"]
    memory = FeatureQueue(K, D, advance_twice=True)
    memory.rows.copy_(noise(K, D, name=f"memory{number}"))
    pairs = []
    for i, step in enumerate(setting["steps"]):
        flags = None if step["flags"] is None else torch.tensor(step["flags"])
        memory.update(noise(1, B, D, name=f"rows{number}.{i}"), chosen=flags)
        memory.advance()
        assert memory.place == step["pointer"], i
        pairs.append((memory.neighbours(noise(B, D, name=f"search{number}.{i}"), count=3), step["neighbours"]))
    pairs.append((memory.rows, setting["rows_after"]))
    with capsys.disabled():
        print(f"\nMugs memory of {K} rows, {B} a write: largest relative difference {worst(pairs):.1e}")
    assert worst(pairs) <= 1e-6  # copies of float32 numbers


@pytest.mark.parametrize("number", range(len(HALLUCINATOR)))
def test_hallucinated_queries_give_the_official_loss_and_gradients(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    setting = HALLUCINATOR[number]
    B, D, K = setting["B"], setting["D"], setting["K"]
    head = Hallucinator(D)
    names = {name: name.replace("MLP.", "mlp.") for name in setting["shapes"]}
    head.load_state_dict({names[name]: value for name, value in official_weights(setting["shapes"]).items()})
    queries = unit(noise(B, D, name=f"queries{number}")).requires_grad_()
    keys = unit(noise(B, D, name=f"keys{number}"))
    objective = QueueInfoNCE(dim=D, queue_size=K)
    objective.queue.rows.copy_(unit(noise(K, D, name=f"queue{number}")))
    output = head(queries, keys, strengths=torch.full((B,), setting["ratio"]))
    own = F.normalize(queries, dim=-1)  # as MoCo does once more, behind the generator
    views = torch.stack([torch.zeros_like(own), own])  # one key view, and one query view that is not the key's own
    more = torch.stack([torch.zeros_like(own), F.normalize(output, dim=-1)]).unsqueeze(0)
    loss = objective(queries=views, keys=keys.unsqueeze(0), hallucinated=more).mean()
    loss.backward()
    layers = {"fc1": 0, "fc2": 2, "fc3": 4}
    pairs = [(output.detach(), setting["output"]), (loss.detach(), setting["loss"]), (queries.grad, setting["query_gradient"])]
    for name, gradient in setting["weight_gradients"].items():
        layer, kind = name.split(".")
        pairs.append((dict(head.mlp[layers[layer]].named_parameters())[kind].grad, gradient))
    with capsys.disabled():
        print(f"\nHallucinator, B={B} D={D}: largest relative difference {worst(pairs):.1e}")
    assert len(pairs) > 3 and worst(pairs) <= 1e-5
