"""`trainer.strategy: fsdp2`: Lightning's `ModelParallelStrategy` with one axis of processes, which divide all parameters (FSDP2).

Left out: what is gathered as one (`training.sharding`), and files of shards (`core.shards`, `callbacks.checkpoints`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from glpretrain.callbacks.checkpoints import write_sharded
from glpretrain.core.shards import Parts, divided, files_of, is_head
from glpretrain.training.sharding import set_gradients_travel

NAME = "fsdp2"


class FullySharded(ModelParallelStrategy):
    """Divides parameters, gradients and optimizer states among all processes; the losses are those of one process.

    A checkpoint is a head and one file of parts per process, see `core.shards`. Other numbers of processes can go on from it, and so they
    can from a checkpoint that is not sharded.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over the states that `load_checkpoint` has divided."""
        return True

    def setup_environment(self) -> None:
        """Let the processes meet; before a fit, without a module, no more than that."""
        if self.lightning_module is None:
            self._setup_distributed()
        else:
            super().setup_environment()

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1  # Lightning's own is one axis over a node's GPUs

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around all micro-batches of a step but the last one: gradients add up in every process, whole, and do not travel."""
        assert self.model is not None
        set_gradients_travel(self.model, False)
        try:
            yield
        finally:
            set_gradients_travel(self.model, True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The parts of this process, where ModelParallelStrategy may gather them."""
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The parts of this process."""
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None) -> None:
        """Write head and parts; all processes have to call it.

        Raises:
            ValueError: a process could not write its part.
        """
        path = Path(self.broadcast(str(filepath)))
        if not write_sharded(checkpoint, path, step=self.lightning_module.global_step if self.lightning_module is not None else 0):
            raise ValueError(f"checkpoint: {path} was not written; is there room on the disk?")
        self.barrier("checkpoint")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint, sharded or not, whose tensors are divided as those of this run are; the whole is in no process.

        Raises:
            ValueError: a file of parts is missing.
        """
        assert self.model is not None
        path = Path(self.broadcast(str(checkpoint_path)))
        checkpoint = _read(path)
        parts = Parts([_read(file) for file in files_of(checkpoint, path=path)]) if is_head(checkpoint) else None
        own = self.model.state_dict()
        weights: dict[str, Tensor] = checkpoint["state_dict"]
        for name in weights.keys() & own.keys():
            weights[name] = _divided(weights[name], own[name], parts, "state_dict", name)
        for number, optimizer in enumerate(self.optimizers):
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for place, values in checkpoint["optimizer_states"][number]["state"].items():
                for name, value in values.items():
                    if isinstance(value, Tensor) and place < len(held) and value.shape == held[place].shape:
                        values[name] = _divided(value, held[place], parts, "optimizer_states", number, "state", place, name)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what `load_checkpoint` gave."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load what `load_checkpoint` gave."""
        Strategy.load_optimizer_state_dict(self, checkpoint)


def _read(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _divided(value: Tensor, own: Tensor, parts: Parts | None, *place: str | int) -> Tensor:
    """A tensor of a checkpoint, divided as `own` is; one of another shape stays as it is, to be refused by name."""
    if value.shape != own.shape:
        return value
    if value.is_meta:
        assert parts is not None, place
        return divided(parts, own, at=place)
    return divided(value, own)
