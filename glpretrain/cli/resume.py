"""The same command again: go on with the run that was interrupted, or start a new one, and say which and why.

Left out: writing checkpoints (`callbacks.checkpoints`), and Lightning's own part of resuming.
"""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from glpretrain.callbacks.checkpoints import is_damaged, newest_whole
from glpretrain.cli.trainer import is_first_process
from glpretrain.cli.trust import read_yaml
from glpretrain.core.files import is_locked, write_whole
from glpretrain.runs import CONFIG, ITEMS, RESULTS, Run, settings_that_count, without_links

AMONG_SEEDS = "GLPRETRAIN_AMONG_SEEDS"  # environment of a run that is one of several seeds: file that its folder is written to
_SHOWN = 3


class Found(NamedTuple):
    """What is in the folder of run folders."""

    folder: Path | None  # of the run that goes on; None for a new one
    checkpoint: Path | None  # None: the run was interrupted before its first checkpoint, or a new one starts
    lines: list[str]  # what to say
    finished: bool = False  # whether the run of the folder has ended; only among seeds


class AlreadyFinishedError(Exception):
    """A run of one of several seeds that was trained before with the same settings and items.

    Args:
        folder: its folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} is finished")
        self.folder = folder


def find(parent: Path, *, config: Mapping, items: Mapping[str, object], force: bool, among_seeds: bool = False) -> Found:
    """The run that the same command goes on with.

    Args:
        parent: folder of the runs of a recipe.
        config: configuration of the run that starts.
        items: what identifies its items.
        force: whether a run goes on although its settings differ.
        among_seeds: whether runs with other settings, such as those of other seeds, are passed over, and a finished one counts too.
    """
    lines: list[str] = []
    folders = sorted((path for path in parent.glob("[0-9]*") if path.is_dir() and (path / CONFIG).is_file()), reverse=True)
    for folder in folders:
        has_ended = (folder / RESULTS).is_file()
        if among_seeds:
            differ = _all_differences(folder, config=config, items=items)
            if any(one.startswith("seed_everything ") for one in differ) or (differ and (has_ended or not force)):
                continue
            if has_ended:
                line = f"resume: {folder} is finished and has the same settings; it is not trained again (--resume never trains it)"
                return Found(folder, None, [*lines, line], finished=True)
        if has_ended:
            break
        if is_locked(folder):
            lines.append(f"resume: {folder} is being trained by another process; a new run starts")
            break
        differ = _all_differences(folder, config=config, items=items)
        if differ and not force:
            more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
            lines.append(
                f"resume: {folder} was interrupted, but {'; '.join(differ[:_SHOWN])}{more}; a new run starts (--resume force goes on)"
            )
            break
        checkpoint, damaged = newest_whole(folder / "checkpoints")
        lines += [f"resume: {line}" for line in damaged]
        if checkpoint is None:
            lines.append(f"resume: {folder} was interrupted before its first checkpoint; a new run starts")
            break
        lines.append(f"resume: {folder} goes on after step {checkpoint.step}, from {checkpoint.path.name}")
        return Found(folder, checkpoint.path, lines)
    return Found(None, None, lines)


def checkpoint_of(path: str | None) -> str | None:
    """The whole checkpoint of a `ckpt_path`, with every link in its path followed: `latest` moves while the run goes on.

    Raises:
        ValueError: it is another file, or is damaged.
    """
    if path is None:
        return None
    path = without_links(path)
    if not Path(path).is_file():
        raise ValueError(f"ckpt_path: {path} is not a file; accepted: a checkpoint (.ckpt) of the same method")
    if not zipfile.is_zipfile(path):  # what torch.save writes, with its contents at the end
        raise ValueError(f"ckpt_path: {path} is no checkpoint or is cut short; accepted: a checkpoint (.ckpt) of the same method")
    if is_damaged(Path(path)):
        raise ValueError(f"ckpt_path: the bytes of {path} are not those that were written; give another checkpoint of its folder")
    return path


def _all_differences(folder: Path, *, config: Mapping, items: Mapping[str, object]) -> list[str]:
    """What differs between a run and the one that starts."""
    return [*_differences(_read(folder / CONFIG), config), *_differences(_items(folder), items, _named="items.")]


def _differences(before: Mapping, now: Mapping, *, _named: str = "") -> Iterator[str]:
    """What differs between two configurations, each as `name was A, is B`."""
    old, new = settings_that_count(before), settings_that_count(now)
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name):
            yield f"{_named}{name} was {old.get(name, 'not set')}, is {new.get(name, 'not set')}"


def told(folder: Path) -> Run:
    """The run of a folder, which the process that trains several seeds is told of where there is one."""
    if (answer := os.environ.get(AMONG_SEEDS)) is not None and is_first_process():
        write_whole(Path(answer), str(folder).encode())
    return Run(folder)


def _read(path: Path) -> Mapping:
    return read_yaml(path)


def _items(folder: Path) -> Mapping:
    path = folder / ITEMS
    return json.loads(path.read_text()) if path.is_file() else {}
