"""What objectives are handed: MMC, DCGLR, local contrast, Hybrid and GPFM against plain loops over views, items and tokens.

There is no official code to follow for these (or, for GPFM, none that runs without slides). The loops take the encoders and heads
from the method and nothing else, and weights by formula keep student and teacher apart.
"""

import math
from itertools import product

import pytest
import torch
from batches import apart, batch_of, method, teacher_of, value_of, values_of, views_of
from golden import noise
from torch import Tensor, nn
from torch.nn import functional

from glpretrain.core.schedule import Schedule
from glpretrain.encoders import Encoder, PointTransformer, ViT
from glpretrain.encoders.attention import attention_inputs
from glpretrain.methods import DCGLR, GPFM, MMC, HybridDistillation, LocalContrast
from glpretrain.objectives.contrastive import NPair
from glpretrain.objectives.distillation import Distillation
from glpretrain.training.memory import states_of
from glpretrain.training.teacher import FrozenTeacher

# Temperatures of teacher and student: 0.2 and 0.3 in the middle of a run.
TEMPS = {"teacher_temp": Schedule(0.1, 0.3, shape="linear"), "student_temp": 0.3}
MOMENTUM = Schedule(0.9, 1.0)
Rows = list[Tensor]


def encoder(*, depth: int = 2) -> Encoder:
    return ViT("vit_tiny_patch16_224", img_size=(16, 24), patch_size=8, embed_dim=12, depth=depth, num_heads=3)


def images(letter: str, count: int, *, items: int = 3) -> Tensor:
    return views_of(letter, count, items=items, size=24)[..., :16, :]  # [V B 3 16 24]


def cross_entropy(student: Tensor, teacher: Tensor, centre: Tensor) -> Tensor:
    """Of two rows of logits, Float[K] each, at the temperatures that all methods here have in the middle of a run."""
    target = ((teacher - centre) / 0.2).exp()
    target = target / target.sum()
    log_share = student / 0.3 - (student / 0.3).exp().sum().log()
    return -(target * log_share).sum()


def info_nce(queries: Tensor, keys: Tensor, *, temp: float) -> Tensor:
    """Which of Float[B D] belongs to each of Float[B D]?"""
    total = torch.zeros(())
    for item, query in enumerate(queries):
        cosines = torch.stack([(query * key).sum() / (query.norm() * key.norm()) for key in keys]) / temp
        total = total - (cosines[item] - cosines.exp().sum().log())
    return 2 * temp * total / len(queries)


def mean_of(values: Rows) -> Tensor:
    return torch.stack(values).mean()


def check_centre(objective: Distillation, before: Tensor, logits: Tensor, *, momentum: float = 0.9) -> None:
    """The centre moves towards the mean of all rows of these logits."""
    torch.testing.assert_close(
        objective.centre, momentum * before + (1 - momentum) * logits.flatten(0, -2).mean(dim=0), rtol=1e-4, atol=1e-5
    )


def advance(model: nn.Module) -> None:
    for state in states_of(model):
        state.advance()


# MMC -----------------------------------------------------------------------------------------------------------------------


def mmc() -> MMC:
    sizes = {"num_prototypes": 7, "hidden_dim": 11, "bottleneck_dim": 5, "num_layers": 2, "contrast_hidden_dim": 11, "contrast_dim": 5}
    decoder = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
    return apart(method(MMC, encoder(), contrast_temp=0.4, max_distance=0.45, momentum=MOMENTUM, **sizes, **decoder, **TEMPS))


def balanced(logits: Tensor, *, temp: float) -> Tensor:
    """Three times in turn: prototypes share all rows alike, and every row sums to one. Float[R K]."""
    shares = (logits / temp).exp()
    for _ in range(3):
        shares = shares / shares.sum(dim=0, keepdim=True)
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares


CROPS = torch.tensor(  # x0 y0 x1 y1, uneven so that no two keys are equally near
    [
        [[0.0, 0.03, 0.81, 0.72], [0.11, 0.2, 0.93, 1.0], [0.0, 0.0, 0.3, 0.3]],
        [[0.23, 0.13, 0.58, 0.52], [0.0, 0.27, 0.61, 0.83], [0.6, 0.6, 1.0, 1.0]],
    ]
)
FLIPPED = torch.tensor([[False, True, False], [True, False, False]])


def centre_of(view: int, item: int, token: int) -> tuple[float, float]:
    """Where a token of a view lies in its item: 2 rows of 3 tokens."""
    x0, y0, x1, y1 = CROPS[view, item].tolist()
    along, down = (token % 3 + 0.5) / 3, (token // 3 + 0.5) / 2
    along = 1 - along if FLIPPED[view, item] else along
    return x0 + (x1 - x0) * along, y0 + (y1 - y0) * down


def nearest_of(place: tuple[float, float], view: int, item: int) -> tuple[int, float]:
    """Which token of a view is nearest to a place of its item, and how far away it is in tokens."""
    x0, y0, x1, y1 = CROPS[view, item].tolist()
    others = [centre_of(view, item, token) for token in range(6)]
    away = [math.hypot((place[0] - x) / ((x1 - x0) / 3), (place[1] - y) / ((y1 - y0) / 2)) for x, y in others]
    nearest = min(range(6), key=away.__getitem__)
    return nearest, away[nearest]


@pytest.mark.parametrize("num_local", [0, 2])
def test_mmc_is_its_five_sums_over_views_items_and_tokens(num_local: int) -> None:
    model, clean = mmc(), images("g", 2)
    local = images("l", num_local) if num_local else None
    mask = noise(2, 3, 6, name="order").argsort(dim=2) < 3
    terms = values_of(model.losses(batch_of(global_views=clean, local_views=local, mask=mask, crops=CROPS, flipped=FLIPPED), 0.5))

    student, teacher = model.student, teacher_of(model)
    keep = torch.stack([torch.stack([(~row).nonzero()[:, 0] for row in of_view]) for of_view in mask])  # [2 3 3]
    seen = [teacher.encoder(view) for view in clean]
    looked = [student.encoder(view, keep=kept) for view, kept in zip(clean, keep, strict=True)]
    keys = [teacher.heads["contrast"](output.cls) for output in seen]
    queries = [student.heads["contrast"](output.cls) for output in looked]
    queries += [student.heads["contrast"](student.encoder(view).cls) for view in (() if local is None else local)]
    pairs = [(v, g) for v in range(2 + num_local) for g in range(2) if v != g]
    contrast = mean_of([info_nce(queries[v], keys[g], temp=0.4) for v, g in pairs])
    torch.testing.assert_close(terms["contrast"], 2 * contrast, rtol=1e-4, atol=1e-5)

    teacher_logits = [teacher.heads["patch"](output.patches).dense() for output in seen]  # [B N K] each
    student_logits = [student.heads["patch"](output.patches).dense() for output in looked]  # [B M K] each
    rows = list(product(range(2), range(3), range(3)))  # view, item, number among the visible tokens
    found = [nearest_of(centre_of(g, b, int(keep[g, b, m])), 1 - g, b) for g, b, m in rows]
    targets = balanced(torch.stack([teacher_logits[1 - g][b, n] for (g, b, _), (n, _) in zip(rows, found, strict=True)]), temp=0.2)
    shares: dict[tuple[int, int], Rows] = {(g, b): [] for g, b in product(range(2), range(3))}
    for (g, b, m), (_, away), target in zip(rows, found, targets, strict=True):
        if away <= 0.45:
            shares[g, b].append(-(target * (student_logits[g][b, m] / 0.3).log_softmax(dim=0)).sum())
    assert not shares[0, 2] and not shares[1, 2] and len({len(losses) for losses in shares.values()}) > 2  # two crops do not meet
    patch = mean_of([mean_of(losses) if losses else torch.zeros(()) for losses in shares.values()])
    torch.testing.assert_close(terms["patch"], patch, rtol=1e-4, atol=1e-5)

    local_keys = [teacher.heads["local"](output.patches) for output in seen]  # [B N D] each, of unit length
    local_queries = [student.heads["local"](output.patches) for output in looked]  # [B M D] each
    contrasts: dict[tuple[int, int], Rows] = {(g, b): [] for g, b in product(range(2), range(3))}
    for (g, b, m), (nearest, away) in zip(rows, found, strict=True):
        if away <= 0.45:
            cosines = torch.stack([(local_queries[g][b, m] * key).sum() for key in local_keys[1 - g][b]]) / 0.4
            contrasts[g, b].append(2 * 0.4 * (cosines.logsumexp(dim=0) - cosines[nearest]))
    contrast_of_patches = mean_of([mean_of(losses) if losses else torch.zeros(()) for losses in contrasts.values()])
    torch.testing.assert_close(terms["local"], contrast_of_patches, rtol=1e-4, atol=1e-5)

    errors: Rows = []
    for g in range(2):
        predicted = model.decoder(looked[g].cls, looked[g].patches, keep=keep[g], grid=(2, 3))  # rows, columns, channels of a patch
        for b, n in product(range(3), range(6)):
            rows_, columns = slice(8 * (n // 3), 8 * (n // 3) + 8), slice(8 * (n % 3), 8 * (n % 3) + 8)
            target = clean[g, b, :, rows_, columns].permute(1, 2, 0).flatten()
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors += [(predicted[b, n] - target).square().mean()] * bool(mask[g, b, n])
    torch.testing.assert_close(terms["inputs"], mean_of(errors), rtol=1e-4, atol=1e-5)

    tokens = torch.cat([output.patches.flatten(0, 1) for output in looked])
    cosines = mean_of([functional.cosine_similarity(tokens[i], tokens[j], dim=0) for i, j in product(range(len(tokens)), repeat=2)])
    torch.testing.assert_close(terms["cosine"], cosines, rtol=1e-4, atol=1e-5)


def test_mmc_matches_the_groups_of_two_clouds_by_their_places() -> None:
    sizes = {"num_prototypes": 7, "hidden_dim": 11, "bottleneck_dim": 5, "contrast_hidden_dim": 11, "contrast_dim": 5}
    points = PointTransformer("point_mae", num_points=20, points_per_token=4, group_size=5, embed_dim=12, depth=1, num_heads=3)
    model = apart(method(MMC, points, max_distance=0.8, decoder_depth=1, decoder_heads=3, momentum=MOMENTUM, **sizes, **TEMPS))
    views, frame = clouds("g", 2, 20), torch.eye(3, 4).repeat(2, 3, 1, 1)
    frame[1, ..., 0, 0], frame[1, ..., 1, 3] = -1.0, 0.3  # mirrored and shifted
    mask = noise(2, 3, 5, name="order").argsort(dim=2) < 2
    batch = batch_of(views, mask=mask)
    batch = batch._replace(views={"global": batch.views["global"]._replace(frame=frame)})
    other, places, valid = model._same_places(batch.views["global"], batch.views["global"].visible_tokens())
    assert other.tolist() == [3, 4, 5, 0, 1, 2]
    centres = [model.encoder.group(view).centres for view in views]  # [B N 3] each
    in_item = [centres[0], centres[1] * torch.tensor([-1.0, 1.0, 1.0]) + torch.tensor([0.0, 0.3, 0.0])]
    position = 0
    for g, b in product(range(2), range(3)):
        keys = in_item[1 - g][b]
        spacing = mean_of([min((key - other).norm() for j, other in enumerate(keys) if i != j) for i, key in enumerate(keys)])
        for n in (~mask[g, b]).nonzero()[:, 0]:
            away = [(in_item[g][b, n] - key).norm() for key in keys]
            nearest = min(range(5), key=away.__getitem__)
            assert int(places.flatten()[position]) == nearest
            assert bool(valid.flatten()[position]) == bool(away[nearest] <= 0.8 * spacing)
            position += 1
    assert position == places.numel() and 0 < valid.sum() < valid.numel()

    groups, output = (
        points.group(views.flatten(0, 1)),
        model.student.encode(views.flatten(0, 1), keep=batch.views["global"].visible_tokens()),
    )
    terms = values_of(model.losses(batch, 0.5))
    errors: Rows = []
    for row, hidden in enumerate(mask.flatten(0, 1)):
        order = [groups.centres[row][~hidden][None], groups.centres[row][hidden][None]]
        predicted = model.decoder(output.patches[row : row + 1], visible=order[0], hidden=order[1])[0]
        for guess, truth in zip(predicted, groups.neighbours[row][hidden], strict=True):
            squares = torch.stack([torch.stack([(p - q).square().sum() for q in truth]) for p in guess])
            errors.append(squares.amin(dim=0).mean() + squares.amin(dim=1).mean())
    torch.testing.assert_close(terms["inputs"], mean_of(errors), rtol=1e-4, atol=1e-5)


# DCGLR ---------------------------------------------------------------------------------------------------------------------


def dcglr(contrast: NPair | None = None) -> DCGLR:
    sizes = {"num_prototypes": 7, "hidden_dim": 11, "bottleneck_dim": 5, "contrast_hidden_dim": 11, "contrast_dim": 5}
    points = PointTransformer("pos_bert_base", num_points=20, points_per_token=4, group_size=5, embed_dim=12, depth=1, num_heads=3)
    return apart(method(DCGLR, points, contrast=contrast, momentum=MOMENTUM, **sizes, **TEMPS)).eval()


def clouds(letter: str, count: int, points: int) -> Tensor:
    return noise(count, 3, points, 3, name=letter)


def test_dcglr_distils_and_contrasts_every_pair_of_a_teacher_view_and_another_student_view() -> None:
    model = dcglr()
    globals_, locals_, coarse = clouds("g", 2, 20), clouds("l", 1, 12), clouds("c", 1, 8)
    terms = values_of(model.losses(batch_of(global_views=globals_, local_views=locals_, coarse_views=(coarse,)), 0.5))
    student, teacher = model.student, teacher_of(model)
    seen = [teacher.encoder(view).cls for view in globals_]
    looked = [student.encoder(view).cls for view in (*globals_, *locals_, *coarse)]
    teacher_logits = torch.stack([teacher.heads["cls"](cls).dense() for cls in seen])
    student_logits = torch.stack([student.heads["cls"](cls).dense() for cls in looked])
    keys, queries = [teacher.heads["contrast"](cls) for cls in seen], [student.heads["contrast"](cls) for cls in looked]
    centre, pairs = model.cls_objective.centre.clone(), [(v, g) for v in range(4) for g in range(2) if v != g]
    cls = mean_of([cross_entropy(student_logits[v, b], teacher_logits[g, b], centre) for v, g in pairs for b in range(3)])
    torch.testing.assert_close(terms["cls"], cls, rtol=1e-4, atol=1e-5)
    contrasts = [info_nce(queries[v], keys[g], temp=0.2) for v, g in pairs]
    assert len({round(value.item(), 3) for value in contrasts}) == len(pairs)  # so that no pair can stand for another
    torch.testing.assert_close(terms["contrast"], mean_of(contrasts), rtol=1e-4, atol=1e-5)
    advance(model)
    check_centre(model.cls_objective, centre, teacher_logits)


def test_dcglr_with_npair_compares_the_teachers_assignments_with_the_students_logits() -> None:
    model = dcglr(NPair(scale=8.0))
    views = clouds("g", 2, 20)
    found = value_of(model.losses(batch_of(global_views=views), 0.5)["contrast"])
    logits = torch.stack([model.student.heads["cls"](model.student.encoder(view).cls).dense() for view in views])
    teacher = torch.stack([teacher_of(model).heads["cls"](teacher_of(model).encoder(view).cls).dense() for view in views])
    assigned = ((teacher - model.cls_objective.centre) / 0.2).softmax(dim=-1)
    expected: Rows = []
    for g, v, b in product(range(2), range(2), range(3)):
        scores = torch.stack([8.0 * (assigned[g, b] * logits[v, j] / 0.1).sum() for j in range(3)])
        expected.append(scores.logsumexp(dim=0) - scores[b])
    torch.testing.assert_close(found, mean_of(expected), rtol=1e-4, atol=1e-5)


# Local contrast ------------------------------------------------------------------------------------------------------------


def test_local_contrast_matches_the_patches_of_two_views_by_place_in_both_directions() -> None:
    model = apart(method(LocalContrast, encoder(), hidden_dim=11, projection_dim=5, temp=0.4, max_distance=0.6))
    views = images("g", 2)
    terms = values_of(model.losses(batch_of(global_views=views, crops=CROPS, flipped=FLIPPED), 0.5))
    outputs = [model.student.encoder(view) for view in views]
    cls = [model.student.heads["cls"](output.cls) for output in outputs]
    directions = ((0, 1), (1, 0))
    torch.testing.assert_close(terms["cls"], mean_of([info_nce(cls[a], cls[b], temp=0.4) for a, b in directions]), rtol=1e-4, atol=1e-5)

    patches = [model.student.heads["patch"](output.patches) for output in outputs]  # [B N D] of unit length
    num_matched, items = [], []
    for (a, b), item in product(directions, range(3)):
        losses: Rows = []
        for token in range(6):
            nearest, away = nearest_of(centre_of(a, item, token), b, item)
            if away <= 0.6:
                cosines = torch.stack([(patches[a][item, token] * key).sum() for key in patches[b][item]]) / 0.4
                losses.append(cosines.logsumexp(dim=0) - cosines[nearest])
        num_matched.append(len(losses))
        items.append(2 * 0.4 * mean_of(losses) if losses else torch.zeros(()))
    assert num_matched[2] == num_matched[5] == 0 and num_matched[0] != num_matched[3]  # two crops of item 2 do not meet
    torch.testing.assert_close(terms["patch"], mean_of(items), rtol=1e-4, atol=1e-5)


# Hybrid distillation -------------------------------------------------------------------------------------------------------


def relations(first: Tensor, second: Tensor, *, heads: int) -> Tensor:
    """Float[B heads N N] of two Float[B h N d]: the channels are dealt anew to `heads` heads, rows sum to one."""
    rows = [value.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for value in (first, second)]  # [B heads N d]
    return (rows[0] @ rows[1].transpose(2, 3) / math.sqrt(rows[0].shape[-1])).softmax(dim=-1)


@pytest.mark.parametrize("half", [False, True])
def test_hybrid_takes_features_from_one_expert_and_relations_from_the_other(half: bool) -> None:
    experts = [encoder(depth=4), encoder(depth=4)]
    for number, expert in enumerate(experts):
        with torch.no_grad():
            for name, parameter in expert.named_parameters():
                parameter.add_(0.3 * noise(*parameter.shape, name=f"{number} {name}"))
    contrastive, masked = (FrozenTeacher(expert) for expert in experts)
    model = apart(method(HybridDistillation, encoder(), contrastive=contrastive, masked=masked, num_relation_heads=2, corner=0.5))
    views = images("g", 2)
    mask = noise(2, 3, 6, name="order").argsort(dim=2) < 3 if half else None
    terms = values_of(model.losses(batch_of(global_views=views, mask=mask), 0.5))
    items, card = views.flatten(0, 1), model.encoder.card
    keep = torch.stack([(~row).nonzero()[:, 0] for row in mask.flatten(0, 1)]) if mask is not None else torch.arange(6).expand(6, -1)

    def kept(values: Tensor) -> Tensor:
        """Float[B ... N d], the tokens that the student sees."""
        return torch.stack([value[..., places, :] for value, places in zip(values, keep, strict=True)])

    with attention_inputs(model.encoder, block=1) as ours:
        output = model.student.encoder(items, keep=None if mask is None else keep)
    with attention_inputs(masked.encoder, block=2) as theirs:
        masked(items, card=card)
    targets = kept(contrastive(items, card=card).patches)
    targets = (targets - targets.mean(dim=-1, keepdim=True)) / (targets.var(dim=-1, keepdim=True, correction=0) + 1e-5).sqrt()
    error = (model.student.heads["feature"](output.patches) - targets).abs()
    torch.testing.assert_close(terms["feature"], torch.where(error < 0.5, error.square(), error - 0.25).mean(), rtol=1e-4, atol=1e-5)

    expert = [kept(value) for value in (theirs[0].queries, theirs[0].keys, theirs[0].values)]
    student = [ours[0].queries, ours[0].keys, ours[0].values]
    expected = torch.zeros(())
    for first, second in ((0, 1), (2, 2)):
        right = relations(expert[first], expert[second], heads=2)
        own = relations(student[first], student[second], heads=2)
        expected = expected + (right * (right / own).log()).sum(dim=-1).mean()
    torch.testing.assert_close(terms["relation"], expected, rtol=1e-4, atol=1e-5)


# GPFM without experts: DINOv2 ----------------------------------------------------------------------------------------------


def test_gpfm_distils_views_and_hidden_patches_each_by_its_own_head_and_centre() -> None:
    sizes = {"num_prototypes": 7, "num_patch_prototypes": 11, "hidden_dim": 11, "bottleneck_dim": 5}
    model = apart(method(GPFM, encoder(), **sizes, **TEMPS, centre_momentum=0.8, momentum=MOMENTUM))
    views, local, mask = images("g", 2), images("l", 1), noise(2, 3, 6, name="hidden") > 0.2
    mask[0, 1] = False
    terms = values_of(model.losses(batch_of(global_views=views, local_views=local, mask=mask), 0.5))
    student, teacher = model.student, teacher_of(model)
    seen = [teacher.encoder(view) for view in views]
    looked = [student.encoder(view, mask=hidden) for view, hidden in zip(views, mask, strict=True)]
    cls = [*(output.cls for output in looked), student.encoder(local[0]).cls]
    teacher_cls = torch.stack([teacher.heads["cls"](output.cls).dense() for output in seen])
    teacher_patches = torch.stack([teacher.heads["patch"](output.patches).dense() for output in seen])
    student_cls = torch.stack([student.heads["cls"](row).dense() for row in cls])
    student_patches = torch.stack([student.heads["patch"](output.patches).dense() for output in looked])
    centres = [objective.centre.clone() for objective in (model.cls_objective, model.patch_objective)]
    pairs = [(v, g) for v in range(3) for g in range(2) if v != g]
    expected = mean_of([cross_entropy(student_cls[v, b], teacher_cls[g, b], centres[0]) for v, g in pairs for b in range(3)])
    torch.testing.assert_close(terms["cls"], expected, rtol=1e-4, atol=1e-5)
    of_items: Rows = []
    for g, b in product(range(2), range(3)):
        hidden = mask[g, b].nonzero()[:, 0].tolist()
        rows = [cross_entropy(student_patches[g, b, n], teacher_patches[g, b, n], centres[1]) for n in hidden]
        of_items.append(mean_of(rows) if rows else torch.zeros(()))
    torch.testing.assert_close(terms["patch"], mean_of(of_items), rtol=1e-4, atol=1e-5)
    spread = torch.zeros(())
    for output in looked:
        rows = functional.normalize(output.cls, dim=-1)
        nearest = [min((rows[i] - rows[j]).norm() for j in range(3) if j != i) for i in range(3)]
        spread = spread - mean_of([distance.log() for distance in nearest])
    torch.testing.assert_close(terms["koleo"], spread, rtol=1e-3, atol=1e-4)
    advance(model)
    check_centre(model.cls_objective, centres[0], teacher_cls, momentum=0.8)
    check_centre(model.patch_objective, centres[1], teacher_patches[mask], momentum=0.8)
