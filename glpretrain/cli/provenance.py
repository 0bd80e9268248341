"""Where a run comes from: versions, commit and machine, for results.json and for loggers.

The settings are left out: config.yaml has them.
"""

import json
import platform
import re
import socket
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch

from glpretrain import __version__
from glpretrain.bench.machine import machine_name

_VERSIONS = ("torch", "torchvision", "pytorch-lightning", "timm", "kornia")
_CHECKOUT = Path(__file__).parents[2]
_SECONDS = 10.0  # of a command of git


def origin(device: torch.device) -> dict[str, object]:
    """Versions, commit and machine.

    Args:
        device: device that a run computes on.
    """
    return {"versions": versions(), "commit": commit(), "machine": machine(device)}


def versions() -> dict[str, str]:
    """Of Python, of this package, and of what computes."""
    return {"python": platform.python_version(), "glpretrain": __version__} | {name: version(name) for name in _VERSIONS}


def commit() -> str | None:
    """The commit of this package: of its checkout, with `+changes` where tracked files differ from it, or the one that pip installed.

    None where it was installed from a file.
    """
    if (_CHECKOUT / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):  # no git here, or a checkout of another user
            changed = _git("status", "--porcelain", "--untracked-files=no")
            return _git("rev-parse", "HEAD") + ("+changes" if changed else "")
    with suppress(PackageNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        found = json.loads(distribution("glpretrain").read_text("direct_url.json") or "{}")["vcs_info"]["commit_id"]
        return found if isinstance(found, str) and re.fullmatch("[0-9a-f]{40}", found) else None
    return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(_CHECKOUT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS).stdout.strip()


def device_of(accelerator: object) -> torch.device:
    """What a run computes on, before there is a trainer: the GPU where there is one and `accelerator` is not `cpu`."""
    return torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")


def machine(device: torch.device) -> dict[str, str]:
    """The name of this machine, its system, and its device in words.

    Args:
        device: device that a run computes on.
    """
    return {"host": socket.gethostname(), "system": platform.platform(), "device": machine_name(device)}
