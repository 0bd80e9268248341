"""The wheel of this checkout, installed into a folder of its own, and commands that run with it and without the checkout."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
_OPTIONS = ["--no-deps", "--no-index", "--quiet"]


def built(folder: Path) -> Path:
    """The wheel of the files that git knows."""
    command = [*_PIP, "wheel", *_OPTIONS, "--no-build-isolation", "--wheel-dir", str(folder), str(_copy(folder))]
    subprocess.run(command, check=True, timeout=600)
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(wheel: Path, folder: Path) -> Path:
    """`folder` with what the wheel installs."""
    subprocess.run([*_PIP, "install", *_OPTIONS, "--target", str(folder), str(wheel)], check=True, timeout=600)
    return folder


def said(command: list[str], *, site: Path, folder: Path) -> str:
    """What a command of Python prints that runs in `folder` with the package in `site`."""
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "120", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}: {done.stderr[-4000:]}"
    return done.stdout


def _copy(folder: Path) -> Path:
    """The files of this checkout that git knows, since building writes beside them."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        source, target = REPOSITORY / name, folder / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    return folder / "checkout"
