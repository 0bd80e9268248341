"""Fully sharded training (FSDP2): every process holds a part of each parameter, gradient and optimizer state, and gathers one block at a
time. Student, teacher and frozen experts are divided; centres, queues and statistics of batch norms are the same in every process.

Left out: the strategy that asks for it (`callbacks.sharded`), and tensors and files of parts (`core.shards`).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from glpretrain.core.distributed import rank
from glpretrain.core.shards import is_divided, whole
from glpretrain.encoders.base import Encoder, build
from glpretrain.training.teacher import FrozenTeacher


def shard(method: nn.Module, mesh: DeviceMesh) -> None:
    """Divide all parameters of a method among the processes of a mesh, and move it to their devices.

    What is gathered as one: every block of an encoder, an expert without its blocks, and the rest of the method, which stays gathered
    from the start of a forward pass to the end of the gradients, because logits of prototypes are computed late. The weights are those of
    the first process.

    Args:
        method: module whose forward pass computes the losses.
        mesh: the processes, along one axis.
    """
    encoders = [module for module in method.modules() if isinstance(module, Encoder)]
    experts = [module.encoder for module in method.modules() if isinstance(module, FrozenTeacher)]
    units: dict[nn.Module, None] = dict.fromkeys(block for encoder in encoders for block in encoder.blocks())
    for unit in (*units, *experts, method):
        _take_from_first(unit, mesh)
        fully_shard(unit, mesh=mesh)


def _take_from_first(unit: nn.Module, mesh: DeviceMesh) -> None:
    """Give the parameters of a unit the numbers of the first process, as DistributedDataParallel does."""
    for parameter in unit.parameters():
        if not is_divided([parameter]):
            parameter.data = parameter.data.to(mesh.device_type)
            dist.broadcast(parameter.data, src=0)


def is_sharded(module: nn.Module) -> bool:
    """Whether the parameters of a module are divided among processes."""
    return is_divided(list(module.parameters()))


def set_gradients_travel(method: nn.Module, travel: bool) -> None:
    """Whether the next backward pass reduces the gradients over the processes, or lets them add up for a later one."""
    assert isinstance(method, FSDPModule)
    method.set_requires_gradient_sync(travel)


def class_name(module: nn.Module) -> str:
    """Name of the class of a module, which `fully_shard` replaces by a subclass."""
    return next(kind.__name__ for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def whole_encoder(encoder: Encoder) -> Encoder:
    """The encoder itself, or, where it is sharded, a copy with whole weights in the first process, on its device and in its mode. All
    processes have to ask for it; those that are not the first get one that has shapes and no numbers.
    """
    if not is_sharded(encoder):
        return encoder
    is_first, state = rank() == 0, dict[str, Tensor]()
    for name, tensor in encoder.state_dict().items():
        gathered = whole(tensor)
        if is_first:
            state[name] = gathered
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if is_first else "meta"):  # fresh weights are drawn, and thrown away
        copied = build(encoder.card)
        copied.add_pretraining(dict(encoder.named_parameters()))
    if is_first:
        copied.load_state_dict(state)
        copied.to(device)
    return copied.train(encoder.training).requires_grad_(False)
