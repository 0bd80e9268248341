"""`glpretrain replay`: compute a refused step again, and say where the numbers stopped being finite.

Left out: the bundle's making (`callbacks.replay`).
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glpretrain.callbacks.replay import BUNDLE_FORMAT
from glpretrain.cli.parsing import parse_values
from glpretrain.cli.trust import Parser, mapping_of
from glpretrain.core.batch import Batch, ViewGroup
from glpretrain.methods.base import Method
from glpretrain.training.optim import TrunkRelease, gradient_norms
from glpretrain.training.warm_start import Trunk

_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Replayed(NamedTuple):
    """A step that was computed again."""

    terms: list[dict[str, float]]  # of every micro-batch
    same: bool  # whether all terms have the bits of the run
    where: str  # where the numbers stopped being finite


def replay(bundle: Path) -> int:
    """Compute a refused step again, and say in which module the numbers stop being finite.

    A run that refuses a step, because a loss or a gradient was not finite, writes what the step was made of to refused/ in its folder.

    Args:
        bundle: file that the run wrote
    """
    content = _read(bundle)
    config = mapping_of(content["config"], f"{bundle}: its config.yaml")
    parser = Parser(exit_on_error=False)
    parser.add_argument("--model", type=Method, required=True)
    try:
        parsed = parse_values(parser, {"model": config.get("model")})
    except ValueError as error:
        raise ValueError(f"{bundle}: {error}") from error
    method = parser.instantiate(parsed)["model"]
    result = replayed(method, content)
    print(f"in the run: {content['reason']}")
    for number, terms in enumerate(result.terms):
        shown = ", ".join(f"{name} = {value:.6g}" for name, value in terms.items())
        print(f"again, micro-batch {number + 1} of {len(result.terms)}: {shown}")
    if content["processes"] > 1:
        print(f"this is the part of one of {content['processes']} processes; terms over the whole batch differ from those of the run")
    else:
        print("bit for bit the terms of the run" if result.same else "NOT the terms of the run: another machine, precision or version?")
    print(result.where)
    return 0


def replayed(method: Method, content: Mapping) -> Replayed:
    """Compute the step of a bundle again.

    Args:
        method: a method of the run's configuration, which gets the state of the bundle.
        content: what the bundle holds.
    """
    if any(name.startswith("trunk.") for name in content["state"]):
        method.trunk = Trunk(TrunkRelease())
    # What an order of items remembers of their losses is part of no step.
    method.load_state_dict({name: value for name, value in content["state"].items() if not name.startswith("item_losses.")})
    device = content["batches"][0]["index"].device
    method.to(device).train()
    if method.trunk is not None:
        method.student.set_trunk_learns(math.isfinite(method.trunk.released))
    torch.set_rng_state(content["random_state"].cpu())
    dtype = _DTYPES.get(content["precision"])
    found: list[str] = []
    terms: list[dict[str, float]] = []
    same = True
    for part, logged in zip(content["batches"], content["terms"], strict=True):
        batch = Batch(part["index"], {name: ViewGroup(**group) for name, group in part["views"].items()}, part["weight"])
        with _watched(method, found), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            computed = method.averaged(method(batch, content["progress"]), batch)
            total = method.total(computed, content["progress"])
            (total * content["loss_scale"]).backward()
        values = {name: value.detach().float() for name, value in computed.items()}
        terms.append({name: float(value) for name, value in values.items()})
        same &= all(_bits(value) == _bits(logged[name].float()) for name, value in values.items())
        if not found and not all(math.isfinite(value) for value in terms[-1].values()):
            found.append("in the method: every module gave finite numbers, and a term is not")
    bad = [name for name, norm in gradient_norms(method).items() if not math.isfinite(norm)]
    if not found and bad:
        found.append(f"in the gradient of {bad[-1]}: every module handed on finite gradients")
    return Replayed(terms, same, found[0] if found else "every number is finite")


@contextmanager
def _watched(method: nn.Module, found: list[str]) -> Iterator[None]:
    """Note the first modules that make numbers that are not finite out of finite ones, forward and backward."""
    handles = []
    for name, module in method.named_modules():
        if name and not any(module.children()):
            handles.append(module.register_forward_hook(partial(_forward, name, found), with_kwargs=True))
            handles.append(module.register_full_backward_hook(partial(_backward, name, found)))
    for name, parameter in method.named_parameters():
        if not torch.isfinite(parameter).all():
            found.append(f"in the weights: {name} was not finite before the step")
    try:
        with warnings.catch_warnings():  # torch says which hooks see a gradient that belongs to nothing
            warnings.filterwarnings("ignore", message=".*Full backward hook is firing.*")
            yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(name: str, found: list[str], module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    if not found and not _finite(output):
        given = "out of numbers that were not finite: the batch holds them" if not _finite([args, kwargs]) else "out of finite ones"
        found.append(f"forward in {name} ({type(module).__name__}), {given}")


def _backward(name: str, found: list[str], module: nn.Module, inputs: object, outputs: object) -> None:
    if not found and not _finite(inputs):
        given = "that came into it not finite: look at what is behind it" if not _finite(outputs) else "that came into it finite"
        found.append(f"backward in {name} ({type(module).__name__}), from gradients {given}")


def _bits(value: Tensor) -> int:
    """A number that is equal for equal bits, as NaN is not."""
    return int(value.cpu().view(torch.int32))


def _finite(value: object) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(_finite(one) for one in value.values())
    return not isinstance(value, list | tuple) or all(_finite(one) for one in value)


def _read(path: Path) -> Mapping:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's reader makes of a damaged file
        raise ValueError(
            f"replay: {path} cannot be read ({type(error).__name__}); accepted: a bundle from a run's folder refused/"
        ) from error
    if not isinstance(content, dict) or content.get("format") != BUNDLE_FORMAT:
        raise ValueError(f"replay: {path} is no bundle of this version; accepted: a file from a run's folder refused/")
    return content
