"""The same command again: go on with the run that was interrupted, or start a new one, and say which and why.

Left out: writing checkpoints (`callbacks.checkpoints`), and Lightning's own part of resuming.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from glpretrain.callbacks.checkpoints import is_damaged, newest_whole
from glpretrain.cli.trust import read_yaml
from glpretrain.core.files import is_locked
from glpretrain.runs import without_links

RESULTS, CONFIG, ITEMS = "results.json", "config.yaml", "items.json"
# What may differ between two starts of one run: where it is written, what is shown, and how items reach the device.
_FREE = (
    *("config", "ckpt_path", "resume", "runs", "trainer.logger", "trainer.enable_progress_bar", "trainer.log_every_n_steps"),
    *("trainer.enable_model_summary", "trainer.profiler", "data.num_workers", "data.cache", "data.max_unreadable"),
)
_SHOWN = 3


class Found(NamedTuple):
    """What is in the folder of run folders."""

    folder: Path | None  # of the run that goes on; None for a new one
    checkpoint: Path | None  # None: the run was interrupted before its first checkpoint, or a new one starts
    lines: list[str]  # what to say


def find(parent: Path, *, config: Mapping, items: Mapping[str, object], force: bool) -> Found:
    """The run that the same command goes on with.

    Args:
        parent: folder of the runs of a recipe.
        config: configuration of the run that starts.
        items: what identifies its items.
        force: whether a run goes on although its settings differ.
    """
    lines: list[str] = []
    folders = sorted((path for path in parent.glob("[0-9]*") if path.is_dir() and (path / CONFIG).is_file()), reverse=True)
    for folder in folders:
        if (folder / RESULTS).is_file():  # a run that ended
            break
        if is_locked(folder):
            lines.append(f"resume: {folder} is being trained by another process; a new run starts")
            break
        differ = [*_differences(_read(folder / CONFIG), config), *_differences(_items(folder), items, _named="items.")]
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


def _differences(before: Mapping, now: Mapping, *, _named: str = "") -> Iterator[str]:
    """What differs between two configurations, each as `name was A, is B`."""
    old, new = dict(_flat(before)), dict(_flat(now))
    for name in [*old, *(name for name in new if name not in old)]:
        if not any(name == free or name.startswith(f"{free}.") for free in _FREE) and old.get(name) != new.get(name):
            yield f"{_named}{name} was {old.get(name, 'not set')}, is {new.get(name, 'not set')}"


def _flat(values: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list) and values:
        for place, value in enumerate(values):
            yield from _flat(value, f"{name}[{place}]")
    else:
        yield name, values


def _read(path: Path) -> Mapping:
    return read_yaml(path)


def _items(folder: Path) -> Mapping:
    path = folder / ITEMS
    return json.loads(path.read_text()) if path.is_file() else {}
