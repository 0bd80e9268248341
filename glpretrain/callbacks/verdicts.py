"""From the numbers of a run's health to verdicts: what is wrong, in words, and which setting to change.

Left out: where the numbers come from and when (`health`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

_ROWS = 1024  # patches that the rank is taken of
_COLLAPSED = 5e-4  # share of the energy of features; 0.006 is the least that a healthy quick start had in a report


class Verdict(NamedTuple):
    """What is wrong, and what to change."""

    step: int
    name: str
    text: str


def judge(numbers: Mapping[str, float], stuck: set[str]) -> dict[str, str]:
    """What is wrong, by name: one sentence that says what is seen, and which setting to change.

    Args:
        numbers: numbers of a report, by the names of `TrainingHealth`.
        stuck: names of what has the same values as at the report before: `teacher`, or a state of an objective.
    """
    found: dict[str, str] = {}
    update = numbers["update"]
    if update < 1e-9:
        found["still"] = "no weight moves; raise optimization.lr, or shorten its warmup"
    elif update > 0.3 or numbers["growth"] > 10.0 or (update > 0.01 and numbers["growth"] > 1.5):  # quick starts reach 0.006 and 1.08
        what = (
            f"one step changes the weights by {100 * update:.2g} % of their norm, which is {numbers['growth']:.2g} times that of the start"
        )
        found["wild"] = f"{what}; lower optimization.lr"
    if numbers["gradient"] == 0.0:
        found["no gradient"] = "no gradient reaches any weight; raise the weights of the terms (weights)"
    elif update >= 1e-9 and (numbers.get("encoder_gradient", 1.0) == 0.0 or numbers.get("encoder_update", 1.0) < 1e-9):
        what = "the encoder does not learn, although its heads do"
        found["still encoder"] = f"{what}; let its parameters require gradients, and raise optimization.layer_decay where it is below 1"
    if update >= 1e-9 and numbers.get("distance", 1.0) < 1e-7:
        found["twin"] = "the teacher equals the student; raise momentum (0.99 to 0.999 for most runs)"
    elif update >= 1e-9 and "teacher" in stuck and not 0.0 < numbers["pull"] < 1e-5:  # a weak pull is lost in rounding
        found["stuck teacher"] = "the teacher does not move; lower momentum below 1"
    for name in sorted(stuck - {"teacher"}):
        if update >= 1e-9:
            found[f"stuck {name}"] = f"{name} does not move; lower its momentum below 1"
    for term in sorted({name.partition("/")[0] for name in numbers if name.endswith("/excess")}):
        is_distillation = f"{term}/sharpness" in numbers
        if is_distillation and numbers[f"{term}/sharpness"] < 0.01:
            found[f"uniform {term}"] = f"the teacher's targets of {term} are uniform, so they say nothing; lower teacher_temp"
        elif is_distillation and numbers[f"{term}/perplexity"] < 1.5:
            what = f"the teacher gives every row of {term} the same prototype"
            found[f"one prototype {term}"] = f"{what}; lower centre_momentum or optimization.lr"
        # A contrast of few items behind a batch norm starts above guessing.
        most, knob = (2.0, "student_temp") if is_distillation else (20.0, "its temperature")
        if (excess := numbers[f"{term}/excess"]) > most:
            what = f"the loss {term} is {excess:.1f} above that of guessing"
            found[f"excess {term}"] = f"{what}; raise {knob} (0.1 for most runs), or lower optimization.lr"
    for part in ("cls", "patches"):
        if numbers.get(f"spread_{part}", 1.0) < _COLLAPSED:
            found[f"collapse {part}"] = f"all {part} features are the same; lower optimization.lr, raise momentum, or lower teacher_temp"
    return found


def features_health(cls: Tensor, patches: Tensor) -> dict[str, Tensor]:
    """Rank, spread and decay of the features of a batch.

    Args:
        cls: Float[B D].
        patches: Float[B N D], of these items or some of them; without any, nothing is said of them.

    Returns:
        Float[] each; see `TrainingHealth`.
    """
    rows = patches.flatten(0, 1)
    rows = rows[:: max(1, len(rows) // _ROWS)]
    found: dict[str, Tensor] = {}
    for name, values in (("cls", cls), *([("patches", rows)] if len(rows) else [])):
        centred = values - values.mean(dim=0)
        singular = torch.linalg.svdvals(centred)
        shares = singular / singular.sum().clamp_min(1e-30)
        found[f"rank_{name}"] = torch.special.entr(shares).sum().exp()
        found[f"spread_{name}"] = centred.square().sum() / values.square().sum().clamp_min(1e-30)
    if patches.shape[1] > 1:
        unit = nn.functional.normalize(patches[:16], dim=-1)
        mean = unit.mean(dim=1).square().sum(dim=-1).mean()  # mean cosine of two patches of one item
        found["patch_decay"] = (unit[:, 1:] * unit[:, :-1]).sum(dim=-1).mean() - mean
        found["cls_cosine"] = (nn.functional.normalize(cls[: len(unit)], dim=-1).unsqueeze(1) * unit).sum(dim=-1).mean()
    return found


def similarity_drift(patches: Tensor, before: Tensor) -> Tensor:
    """Float[]: mean over pairs of different patches of an item of the change of their cosine.

    Args:
        patches: Float[B N D].
        before: Float[B N D], patches of the same items by an earlier backbone.
    """
    now, then = (nn.functional.normalize(tokens, dim=-1) for tokens in (patches, before))
    change = (now @ now.transpose(1, 2) - then @ then.transpose(1, 2)).abs()
    num_tokens = change.shape[1]
    return (change.sum(dim=(1, 2)) - change.diagonal(dim1=1, dim2=2).sum(dim=1)).mean() / (num_tokens * (num_tokens - 1))


def usage(sums: Tensor) -> dict[str, Tensor]:
    """Perplexity and percent used.

    Args:
        sums: Float[2 K], over rows: assignments, first choices.

    Returns:
        Float[] each, NaN without rows.
    """
    mean = sums[0] / sums[0].sum()
    return {"perplexity": torch.special.entr(mean).sum().exp(), "used": 100 * (sums[1] > 0).float().mean()}
