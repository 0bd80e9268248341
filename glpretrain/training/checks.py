"""Refuses a run without an end, and a checkpoint from another method, with other experts, or another start."""

from torch import nn

from glpretrain.training.teacher import FrozenTeacher
from glpretrain.training.warm_start import Trunk


def require_end(*, steps: int, epochs: int | None) -> None:
    """Refuse a run without an end, which its schedules need to know; the trainer's -1, or None for epochs, stands for no end.

    Raises:
        ValueError: there are neither steps nor epochs.
    """
    if steps <= 0 and (epochs or 0) <= 0:
        raise ValueError("trainer: give max_steps or max_epochs; the schedules need to know where the run ends")


def identity(method: nn.Module) -> dict[str, object]:
    """What a checkpoint records of its run: the method, and the fingerprints of its experts, whose weights it leaves out."""
    experts = {name: module.fingerprint for name, module in method.named_modules() if isinstance(module, FrozenTeacher)}
    return {"method": type(method).__name__, "experts": experts}


def require_same_run(method: nn.Module, checkpoint: dict) -> None:
    """Refuse a checkpoint that this run cannot continue, before its keys are compared one by one.

    Raises:
        ValueError: says how the checkpoint's run differs.
    """
    own = identity(method)
    if checkpoint.get("method") != own["method"]:
        raise ValueError(f"checkpoint: it was written by {checkpoint.get('method')}, this run is {own['method']}; give the same method")
    written, present = checkpoint.get("experts", {}), own["experts"]
    assert isinstance(written, dict) and isinstance(present, dict)
    for name in sorted(written.keys() | present.keys()):
        before, now = (found.get(name, "none")[:12] for found in (written, present))
        if before != now:
            raise ValueError(f"checkpoint: its {name} has the weights {before}, this run's {now}; give the same experts")
    from_weights = any(name.startswith("trunk.") for name in checkpoint["state_dict"])
    if from_weights is not any(isinstance(module, Trunk) for module in method.children()):
        how = "with" if from_weights else "without"
        raise ValueError(f"checkpoint: it was written {how} init_from; resume it {how} init_from")
