"""What a run says of itself before its first step.

What came of it is left out (`training`).
"""

from pathlib import Path

import pytorch_lightning as pl

from glpretrain import modalities
from glpretrain.cli.init_from import Origin
from glpretrain.data.infobatch import InfoBatch
from glpretrain.data.module import DataModule
from glpretrain.data.orders import Shuffled
from glpretrain.methods.base import Method
from glpretrain.training.sharding import class_name


def summary(method: Method, data: DataModule, trainer: pl.Trainer, *, origin: Origin | None, folder: Path | None) -> str:
    """Method, encoder, items, size of a step, learning rate and run folder, in a few lines.

    Args:
        method: method that is trained.
        data: its items.
        trainer: trainer of the run.
        origin: what its weights start from; None for random weights.
        folder: run folder; None in a process that has none.
    """
    card = method.encoder.card
    size = modalities.get(card.modality).describe_size(card)
    start = "" if origin is None else f"init_from: {origin.name}: {origin.taken}\n"
    accumulated = trainer.accumulate_grad_batches
    together = data.batch_size * trainer.world_size
    in_batches = f" in {accumulated} batches of {together}" if accumulated > 1 else ""
    left_out = len(data.source) % (together * accumulated) if isinstance(data.order, Shuffled) else 0
    rate, changed = method.optimization.describe_rate(together * accumulated), method.changed_by_accumulation(accumulated)
    trained = sum(parameter.numel() for parameter in method.student.parameters() if parameter.requires_grad)
    return (
        f"{class_name(method)}: {card.encoder} {card.arguments.get('name', '')} at {size}, "
        f"{trained / 1e6:.1f} M parameters with heads; {len(data.source)} items of {data.source.name}, "
        f"{together * accumulated} a step{in_batches}{f', {left_out} left out of each epoch' if left_out else ''}\n"
        f"{start}{rate}{changed}{_compared(method, data, max_steps=trainer.max_steps)}run folder: {folder}"
    )


def _compared(method: Method, data: DataModule, *, max_steps: int) -> str:
    """The line that says which terms an order compares items by, and whether it saves steps; empty where it does not compare."""
    if not isinstance(data.order, InfoBatch):
        return ""
    own, joint = method.item_terms, method.joint
    in_batch = [name for name in method.in_batch if name in own]
    said = [f"an item is compared by {', '.join(own)}"]
    said += [f"{', '.join(in_batch)} compare it with its batch"] if in_batch else []
    said += [f"{', '.join(joint)} is one number for a batch, without weights"] if joint else []
    said += [f"max_steps={max_steps}, so no step is saved (give trainer.max_epochs, and trainer.max_steps -1)"] if max_steps > 0 else []
    return f"InfoBatch: {'; '.join(said)}\n"
