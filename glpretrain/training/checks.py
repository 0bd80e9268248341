"""Refuses a run without an end, settings for another device, and a checkpoint from another method, with other experts, or another start."""

import json

import torch
from torch import nn

from glpretrain.core.shards import is_head
from glpretrain.encoders.base import Encoder
from glpretrain.training.fused_cross_entropy import require_fused
from glpretrain.training.optim import Optimization
from glpretrain.training.sharding import class_name, is_sharded
from glpretrain.training.teacher import FrozenTeacher
from glpretrain.training.warm_start import Trunk


def require_end(*, steps: int, epochs: int | None) -> None:
    """Refuse a run without an end, which its schedules need to know; the trainer's -1, or None for epochs, stands for no end.

    Raises:
        ValueError: there are neither steps nor epochs.
    """
    if steps <= 0 and (epochs or 0) <= 0:
        raise ValueError("trainer: give max_steps or max_epochs; the schedules need to know where the run ends")


def require_device(optimization: Optimization, device: torch.device) -> None:
    """Refuse settings that this device cannot run.

    Raises:
        ValueError: a setting needs a GPU or a package that is not there, or cannot be compiled with the blocks.
    """
    if optimization.cross_entropy == "fused":
        require_fused(device)
    if optimization.packed_attention == "flex":
        given = "optimization: packed_attention='flex' given, but"
        if device.type != "cuda":
            raise ValueError(f"{given} this run is on {device.type}; it needs a CUDA GPU; leave it out")
        if optimization.compile:
            raise ValueError(f"{given} compile=True compiles whole blocks, which nobody has tried with it; leave one of them out")


def require_weights(optimization: Optimization, *, trained: bool, needed_by: str | None) -> None:
    """Refuse random weights where they mean nothing, and settings of trained ones where there are none, with a ValueError.

    Args:
        optimization: settings of the run.
        trained: whether the run starts from a trained backbone.
        needed_by: name of a method that needs one, or None.
    """
    if needed_by is not None and not trained:
        raise ValueError(f"{needed_by}: the run starts from random weights; it needs a trained backbone: give init_from")
    if optimization.trunk is not None and not trained:
        raise ValueError("optimization.trunk would be ignored: the run starts from random weights; leave it out, or give init_from")


def identity(method: nn.Module) -> dict[str, object]:
    """What a checkpoint records of its run: the method, and the fingerprints of its experts, whose weights it leaves out."""
    experts = {name: module.fingerprint for name, module in method.named_modules() if isinstance(module, FrozenTeacher)}
    return {"method": class_name(method), "experts": experts}


def require_same_run(method: nn.Module, checkpoint: dict) -> None:
    """Refuse a checkpoint that this run cannot continue, before its keys are compared one by one.

    Raises:
        ValueError: says how the checkpoint's run differs.
    """
    own = identity(method)
    if checkpoint.get("method") != own["method"]:
        raise ValueError(f"checkpoint: it was written by {checkpoint.get('method')}, this run is {own['method']}; give the same method")
    if is_head(checkpoint) and not is_sharded(method):
        raise ValueError("checkpoint: it is sharded; go on with trainer.strategy=fsdp2, on any number of processes")
    written, present = checkpoint.get("experts", {}), own["experts"]
    assert isinstance(written, dict) and isinstance(present, dict)
    for name in sorted(written.keys() | present.keys()):
        before, now = (found.get(name, "none")[:12] for found in (written, present))
        if before != now:
            raise ValueError(f"checkpoint: its {name} has the weights {before}, this run's {now}; give the same experts")
    remembers = "item_losses.last" in checkpoint["state_dict"]
    if remembers is not ("item_losses.last" in method.state_dict()):
        how = "with" if remembers else "without"
        raise ValueError(f"checkpoint: it was written {how} a data.order that looks at losses; resume it with the same data.order")
    require_same_shapes(method, checkpoint)
    from_weights = any(name.startswith("trunk.") for name in checkpoint["state_dict"])
    if from_weights is not any(isinstance(module, Trunk) for module in method.children()):
        how = "with" if from_weights else "without"
        raise ValueError(f"checkpoint: it was written {how} init_from; resume it {how} init_from")


def require_same_shapes(method: nn.Module, checkpoint: dict) -> None:
    """Refuse a checkpoint of another encoder or of other heads.

    Raises:
        ValueError: names an argument of the encoder that differs, or else the first tensor that does.
    """
    written, own = ({name: tuple(one.shape) for name, one in held.items()} for held in (checkpoint["state_dict"], method.state_dict()))
    differ = [name for name in {**own, **written} if written.get(name) != own.get(name) and not name.startswith("trunk.")]
    if not differ:
        return
    card = next((module.card for module in method.modules() if isinstance(module, Encoder)), None)
    before, now = checkpoint.get("encoder_card", {}).get("arguments", {}), {} if card is None else card.to_json()["arguments"]
    for name in sorted(before.keys() & now.keys()) if any(".encoder." in name for name in differ) else ():
        if json.dumps(before[name]) != json.dumps(now[name]):  # JSON knows lists only
            raise ValueError(f"checkpoint: its encoder has {name} = {before[name]}, this run's {now[name]}; give the same encoder")
    shapes = [" x ".join(map(str, held[differ[0]])) or "one number" if differ[0] in held else "not there" for held in (written, own)]
    raise ValueError(
        f"checkpoint: {differ[0]} is {shapes[0]} in it and {shapes[1]} in this run ({len(differ)} tensors differ);"
        " give the settings of the model that it was written with"
    )


def begin_step_again(checkpoint: dict, *, num_accumulated: int) -> None:
    """Take the micro-batches of a step that is not complete out of the count of a checkpoint: its gradients are not in there."""
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    begun = batches["current"]["processed"] % num_accumulated
    for part in ("total", "current") if begun else ():
        batches[part] |= dict.fromkeys(batches[part], batches[part]["processed"] - begun)
