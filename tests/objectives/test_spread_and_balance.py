"""KoLeo, Sinkhorn-Knopp, and distances to experts: what must hold whatever the numbers, in one process and in two."""

import math
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from golden import assert_matches, load, noise, wave

from glpretrain.core.patches import resize_tokens
from glpretrain.objectives import regularization
from glpretrain.objectives.distillation import PatchDistillation, ViewDistillation, sinkhorn_knopp
from glpretrain.objectives.experts import CosineDistance, FeatureDistance, TokenRelations, WhitenedFeatures
from glpretrain.objectives.regularization import KoLeo, MeanCosine

B, N, D, K = 7, 6, 12, 5
KOLEO = load("dinov3_koleo")

# KoLeo ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [[0, 1, 0, 3], [0, 0, 0, 0], [0, 0, 1, 1]], ids=["one pair", "all", "two pairs"])
def test_koleo_is_finite_with_duplicates_in_any_precision(dtype: torch.dtype, rows: list[int]) -> None:
    features = wave(4, 64)[rows].to(dtype).requires_grad_()
    loss = KoLeo()(features=features)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert features.grad.dtype == dtype and torch.isfinite(features.grad).all()


def test_koleo_of_nearly_equal_half_precision_rows_is_finite() -> None:
    """A pair that differs in one small number only: the steepest that half precision can be near its duplicates."""
    features = wave(1, 64).half().repeat(2, 1)
    features[1, 0] += 2**-12
    features.requires_grad_()
    (0.1 * KoLeo()(features=features)).backward()
    assert torch.isfinite(features.grad).all()


def test_koleo_does_not_pull_duplicates_apart_but_others() -> None:
    features = wave(5, D)
    features[3] = features[1]
    features.requires_grad_()
    KoLeo()(features=features).backward()
    alone = features.detach()[[1, 3]].requires_grad_()
    KoLeo()(features=alone).backward()
    assert (alone.grad == 0).all() and (features.grad[[0, 2, 4]].abs().sum(dim=1) > 0).all()


def test_koleo_depends_on_neither_order_nor_length_and_falls_as_rows_spread() -> None:
    features, order = wave(B, D), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    loss = KoLeo()(features=features)
    torch.testing.assert_close(KoLeo()(features=features[order]), loss)
    torch.testing.assert_close(KoLeo()(features=3.0 * features), loss)
    assert KoLeo()(features=torch.eye(D)[:B]) < loss
    # Rows of an orthonormal basis are sqrt(2) apart.
    torch.testing.assert_close(KoLeo()(features=torch.eye(D)[:B]), torch.tensor(-0.5 * math.log(2.0)))


def test_koleo_of_one_item_is_refused() -> None:
    with pytest.raises(ValueError, match="one item has no neighbour"):
        KoLeo()(features=wave(1, D))


def test_koleo_among_the_items_of_one_process_asks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rows of another process gathered, the nearest would be one of them."""
    features = wave(B, D)
    alone = KoLeo()(features=features)
    monkeypatch.setattr(regularization, "gather_with_grad", lambda rows: torch.cat([rows + 1e-3, rows]))
    monkeypatch.setattr(regularization, "rank", lambda: 1)
    assert torch.equal(KoLeo(among="process")(features=features), alone)
    assert KoLeo()(features=features) > alone + 1.0
    with pytest.raises(ValueError, match="koleo_among='gpu' given; accepted: joint, process, or the number"):
        KoLeo(among="gpu")


@pytest.mark.parametrize("case", KOLEO["cases"], ids=lambda case: f"groups of {case['group']}")
def test_koleo_in_groups_is_dinov3s_in_four_processes(monkeypatch: pytest.MonkeyPatch, case: dict) -> None:
    """The rows of all processes are gathered with gradient; which ones a process has is said by its rank."""
    features = noise(8, 6, name="koleo").requires_grad_()
    joined = torch.nn.functional.normalize(features, eps=1e-8, dim=-1)
    monkeypatch.setattr(regularization, "gather_with_grad", lambda rows: joined)
    losses = []
    for rank in range(4):
        monkeypatch.setattr(regularization, "rank", lambda rank=rank: rank)
        losses.append(KoLeo(among=case["group"])(features=features[2 * rank : 2 * rank + 2]))
    torch.stack(losses).sum().backward()
    assert_matches(torch.stack(losses).detach(), case["losses"])
    assert_matches(features.grad, case["gradient"])


def test_koleo_in_groups_that_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="koleo_among=4 given; accepted: joint, process, or a divisor of the 6 items of a step"):
        KoLeo(among=4)(features=wave(6, D))
    assert torch.equal(KoLeo(among=6)(features=wave(6, D)), KoLeo()(features=wave(6, D)))
    for wrong in (1, 0, True):
        with pytest.raises(ValueError, match=f"koleo_among={wrong} given; accepted: joint, process, or the number of items"):
            KoLeo(among=wrong)


# Sinkhorn-Knopp -------------------------------------------------------------------------------------------------------------


def test_the_mean_cosine_is_one_for_equal_tokens_and_zero_where_they_cancel() -> None:
    token = wave(1, 1, D)
    assert MeanCosine()(tokens=token.expand(2, 3, D)).item() == pytest.approx(1.0)
    assert MeanCosine()(tokens=torch.cat([token, -2.0 * token])).item() == pytest.approx(0.0, abs=1e-12)
    tokens = wave(B, N, D).requires_grad_()
    loss = MeanCosine()(tokens=tokens)
    loss.backward()
    assert 0.0 < loss.item() < 1.0 and MeanCosine()(tokens=tokens - 0.1 * tokens.grad).item() < loss.item()


def test_assignments_share_the_prototypes_evenly() -> None:
    shares = sinkhorn_knopp(wave(35, K), temp=0.5, num_iterations=60)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(35))
    torch.testing.assert_close(shares.sum(dim=0), torch.full((K,), 35 / K), rtol=1e-3, atol=0.0)


def test_logits_that_overflow_the_official_exponential_stay_finite() -> None:
    """Gains of 5 at a temperature of 0.04 span 250 nats: more than float32's exponential holds on either side."""
    logits = 5.0 * wave(B, K)
    logits[0] -= 5.0  # a row far below all others
    shares = sinkhorn_knopp(logits, temp=0.04, num_iterations=3)
    assert torch.isfinite(shares).all()
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(B))


def test_views_share_one_balance_and_keep_their_places() -> None:
    logits = wave(2, B, K)
    joined = sinkhorn_knopp(logits.flatten(0, 1), temp=0.1, num_iterations=3)
    assert torch.equal(sinkhorn_knopp(logits, temp=0.1, num_iterations=3), joined.unflatten(0, (2, B)))


def test_balancing_leaves_no_state_and_no_masked_token_is_no_loss() -> None:
    objective = PatchDistillation(num_prototypes=K, sinkhorn_iterations=3)
    assert not objective.state_dict()
    nothing = torch.zeros(0, K, requires_grad=True)
    loss = objective(student_logits=nothing, teacher_logits=nothing, mask=torch.zeros(2, 3, N, dtype=torch.bool), teacher_temp=0.04).mean()
    assert loss.item() == 0.0
    with pytest.raises(ValueError, match="sinkhorn_iterations: at least 1, or null for a centre, not 0"):
        ViewDistillation(num_prototypes=K, sinkhorn_iterations=0)


# Experts --------------------------------------------------------------------------------------------------------------------


def test_distances_to_an_expert_are_zero_for_equal_features_and_teach_the_student_only() -> None:
    targets = wave(B, N, D).requires_grad_()
    same = targets.detach().clone().requires_grad_()
    loss = FeatureDistance()(predictions=same, targets=targets, grid=(2, 3), target_grid=(2, 3)).mean()
    loss = loss + CosineDistance()(predictions=same[:, 0], targets=targets[:, 0]).mean()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    whitened = torch.nn.functional.layer_norm(targets.detach(), (D,)).requires_grad_()
    assert (WhitenedFeatures()(predictions=whitened, targets=targets) == 0.0).all()
    (loss + FeatureDistance()(predictions=same * 2, targets=targets, grid=(2, 3), target_grid=(2, 3)).mean()).backward()
    assert targets.grad is None and same.grad.abs().sum() > 0


def test_a_flat_map_stays_flat_on_any_grid() -> None:
    flat = wave(B, 1, D).expand(-1, N, -1)
    torch.testing.assert_close(resize_tokens(flat, grid=(2, 3), new_grid=(5, 4)), wave(B, 1, D).expand(-1, 20, -1))


def test_a_map_that_is_turned_is_resized_turned() -> None:
    """Rows and columns are not exchanged: on grids that are no squares a mistake would not even fit."""
    tokens = wave(B, N, D)
    turned = tokens.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)
    expected = resize_tokens(tokens, grid=(2, 3), new_grid=(4, 5)).unflatten(1, (4, 5)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(resize_tokens(turned, grid=(3, 2), new_grid=(5, 4)), expected)


def test_relations_do_not_depend_on_a_rotation_of_channels_within_a_head() -> None:
    """What is compared is how tokens look at one another: turning queries and keys together changes nothing."""
    objective = TokenRelations(num_heads=2)
    parts = {name: wave(B, 2, N, 3, phase=phase) for phase, name in enumerate(("queries", "keys", "values"))}
    rotation, _ = torch.linalg.qr(wave(3, 3, phase=0.3))
    student = {f"student_{name}": value @ rotation for name, value in parts.items()}
    expert = {f"expert_{name}": value for name, value in parts.items()}
    assert objective(**student, **expert).tolist() == pytest.approx([0.0] * B, abs=1e-6)
    moved = expert | {"expert_values": 2.0 * expert["expert_values"]}
    assert (objective(**student, **moved) > 1e-3).all()


def test_relations_take_other_heads_and_widths_and_name_what_does_not_divide() -> None:
    objective = TokenRelations(num_heads=4)
    student = {f"student_{name}": wave(B, 3, N, 8, phase=i) for i, name in enumerate(("queries", "keys", "values"))}
    expert = {f"expert_{name}": wave(B, 2, N, 16, phase=i) for i, name in enumerate(("queries", "keys", "values"))}
    assert torch.isfinite(objective(**student, **expert)).all()
    with pytest.raises(ValueError, match="num_heads=5 does not divide the 24 channels"):
        TokenRelations(num_heads=5)(**student, **expert)


# Two processes --------------------------------------------------------------------------------------------------------------


def _both(rows: int, part: slice) -> dict[str, torch.Tensor]:
    """KoLeo with its gradient, and the assignments of this part of the rows."""
    features = wave(rows, D)[part].requires_grad_()
    loss = KoLeo()(features=features)
    loss.backward()
    groups = KoLeo(among=2)(features=features).detach()
    shares = sinkhorn_knopp(wave(7, K), temp=0.1, num_iterations=3)
    return {"loss": loss.detach(), "gradient": features.grad, "groups": groups, "shares": shares}


def _worker(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    half = slice(4 * rank, 4 * rank + 4)
    result = _both(8, half)
    # Masked tokens are never shared out evenly: here one process has five rows and the other two, then one has none.
    for name, cut in (("uneven", 5), ("none", 7)):
        rows = wave(7, K)[:cut] if rank == 0 else wave(7, K)[cut:]
        result[name] = sinkhorn_knopp(rows, temp=0.1, num_iterations=3)
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_spread_and_balance_as_one_with_the_joined_batch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(tmp_path, port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    one = _both(8, slice(None))
    for name in ("loss", "groups"):
        torch.testing.assert_close((first[name] + second[name]) / 2, one[name])
    torch.testing.assert_close(torch.cat([first["gradient"], second["gradient"]]) / 2, one["gradient"])
    for name in ("uneven", "none"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), one["shares"])
