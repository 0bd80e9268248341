"""What it costs to list millions of images, and to begin and resume a run on them, as tables: `python tests/listing_table.py`.

The folders are simulated, since millions of files are slow to make: `os.scandir` and `os.stat` of a root give entries that exist
nowhere, and one real picture is decoded in place of each. Each number is measured in a process of its own, and the walk through the
simulated folders alone is taken for comparison.
"""

import argparse
import ctypes
import errno
import gc
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

_READ = 100_000  # paths that a worker asks for
_TIME = 10**18  # nanoseconds, long ago
_BATCH = 64
_MEASUREMENTS = ("walk", "first", "second", "first list", "second list", "begin", "resume")


class Entry(NamedTuple):
    """What is asked of an `os.DirEntry`."""

    name: str
    is_folder: bool

    def is_file(self) -> bool:
        return not self.is_folder

    def is_dir(self) -> bool:
        return self.is_folder

    def is_symlink(self) -> bool:
        return False


_SIMULATED = re.compile(r"n\d{8}")  # name of a class folder


def simulate(root: Path, *, classes: int, per_class: int) -> None:
    """Let `root` seem to hold class folders with images."""
    scandir, stat = os.scandir, os.stat
    status = stat(root)

    @contextmanager
    def simulated(folder: str) -> Iterator[Iterator[Entry]]:
        if folder == ".":
            yield (Entry(f"n{number:08d}", True) for number in range(classes))
        else:
            yield (Entry(f"{folder}_{number}.JPEG", False) for number in range(per_class))

    def entries(path: str | Path | int = ".") -> AbstractContextManager[Iterator[object]]:
        folder = ".." if isinstance(path, int) else os.path.relpath(path, root)
        return scandir(path) if folder.startswith("..") else simulated(folder)

    def state(path: str | Path, **options: object) -> os.stat_result:
        if not str(path).startswith(f"{root}/"):
            return stat(path, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if not _SIMULATED.fullmatch(os.path.relpath(path, root).partition("/")[0]):
            raise FileNotFoundError(errno.ENOENT, "there is none", str(path))
        return status

    os.scandir, os.stat = entries, state  # pyright: ignore[reportAttributeAccessIssue]


def megabytes(of: str, process: int | None = None) -> float:
    """Memory of a process: `RssAnon` is its own, `VmHWM` the most so far with files, `Private_Dirty` what it shares with no other."""
    name = "smaps_rollup" if of == "Private_Dirty" else "status"
    line = next(line for line in Path(f"/proc/{process or 'self'}/{name}").read_text().splitlines() if line.startswith(f"{of}:"))
    return int(line.split()[1]) / 1024


def settled() -> float:
    """Own memory once everything that was freed is given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return megabytes("RssAnon")


def in_worker(source: object) -> float:
    """Memory that a forked worker takes for itself when it reads paths that are spread over the source."""
    read, write = os.pipe()
    if not (worker := os.fork()):
        before = megabytes("Private_Dirty")
        paths = source.paths  # pyright: ignore[reportAttributeAccessIssue]
        for index in range(0, len(paths), max(1, len(paths) // _READ)):
            paths[index]
        os.write(write, json.dumps(megabytes("Private_Dirty") - before).encode())
        os._exit(0)
    os.waitpid(worker, 0)
    return json.loads(os.read(read, 100))


def measured(make: Callable[[], object]) -> dict[str, float]:
    """Time and memory of a source."""
    before, resident = settled(), megabytes("VmRSS")
    start = time.process_time()
    source = make()
    found = {"cpu": time.process_time() - start}
    found["peak"] = megabytes("VmHWM") - resident
    found["own"] = settled() - before
    found["items"] = len(source)  # pyright: ignore[reportArgumentType]
    found["classes"] = len(source.classes)  # pyright: ignore[reportAttributeAccessIssue]
    found["worker"] = in_worker(source)
    found["sent"] = len(pickle.dumps(source)) / 2**20
    start = time.process_time()
    source.fingerprint()  # pyright: ignore[reportAttributeAccessIssue]
    found["fingerprint"] = time.process_time() - start
    return found


def until_first_batch(root: Path, *, resume: bool) -> dict[str, float]:
    """A run on the images: how long it takes to its first batch, and what its processes hold then.

    Args:
        root: folder of the images.
        resume: whether the run goes on in the middle of its third epoch.
    """
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.loops.training_epoch_loop import (
        _TrainingEpochLoop,  # what torch imports when it is first used is no cost of ours
    )

    from glpretrain.core.batch import PARTS, Batch, Uses
    from glpretrain.data import ImageFolder
    from glpretrain.data.module import DataModule
    from glpretrain.data.sources.images import folders
    from glpretrain.data.views import MultiCrop, ViewSpec
    from glpretrain.encoders import ViT

    assert _TrainingEpochLoop
    decode, picture, checkpoint = folders.decode, root.parent / "picture.jpg", root.parent / "middle.ckpt"
    folders.decode = lambda path, **options: decode(picture, **options)
    found: dict[str, float] = {}

    class Counts(pl.LightningModule):
        """As much of a method as the data needs."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = ViT("vit_tiny_patch16_224", img_size=32, depth=1, licence="none", source="none")
            self.uses = {"global": Uses(takes=PARTS)}

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            if not found:
                found.update(seconds=time.process_time() - start, item=batch.index[0].item(), batch=batch_idx)
                workers = multiprocessing.active_children()
                found.update(worker=max(megabytes("Private_Dirty", worker.pid) for worker in workers), num_workers=len(workers))
                found.update(peak=megabytes("VmHWM") - resident, own=settled() - before)
            return sum(parameter.sum() * 0.0 for parameter in self.parameters())  # pyright: ignore[reportReturnType]  a tensor

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_batch_end(self, *args: object) -> None:
            if not resume:
                self.trainer.save_checkpoint(checkpoint)

    def fit(steps: int) -> None:
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        data = DataModule(ImageFolder(root), views, batch_size=_BATCH, num_workers=2)
        trainer = pl.Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=root.parent, **options)  # pyright: ignore
        trainer.fit(Counts(), datamodule=data, ckpt_path=checkpoint if resume else None, weights_only=False)

    views = MultiCrop([ViewSpec(size=32, scale=(0.3, 1.0), count=2)])
    per_epoch = len(ImageFolder(root)) // _BATCH if resume else 0
    if resume:
        state = torch.load(checkpoint, weights_only=False)
        _move(state, epoch=2, done=per_epoch // 2, per_epoch=per_epoch)
        torch.save(state, checkpoint)
    before, resident, start = settled(), megabytes("VmRSS"), time.process_time()
    fit(2 * per_epoch + per_epoch // 2 + 1 if resume else 1)
    return found


def _move(state: dict, *, epoch: int, done: int, per_epoch: int) -> None:
    """Let a checkpoint from the first step be one from the middle of an epoch."""
    state["DataModule"].update(epoch=epoch, batches_done=done)
    state["epoch"], state["global_step"] = epoch, epoch * per_epoch + done
    loop = state["loops"]["fit_loop"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress in (loop["epoch_loop.batch_progress"], steps["step"], steps["zero_grad"]):
        for name, count in (("current", done), ("total", epoch * per_epoch + done)):
            progress[name] = dict.fromkeys(progress[name], count)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = epoch * per_epoch + done
    counts = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    loop["epoch_progress"] = {"total": counts, "current": counts}


def child(what: str, root: Path, classes: int, per_class: int) -> dict[str, float]:
    """One measurement, in this process."""
    simulate(root, classes=classes, per_class=per_class)
    if what in ("begin", "resume"):
        return until_first_batch(root, resume=what == "resume")
    if what == "walk":
        start = time.process_time()
        for folder in range(classes):
            with os.scandir(root / f"n{folder:08d}") as entries:
                sum(entry.is_file() for entry in entries)
        return {"cpu": time.process_time() - start}
    from glpretrain.data import ImageFolder, ImageList

    return measured(lambda: ImageList(root.parent / "list.txt") if "list" in what else ImageFolder(root))


def table(*, classes: int, per_class: int, measurements: Sequence[str] = _MEASUREMENTS) -> dict[str, dict[str, float]]:
    """All measurements of a number of images: the walk alone, the first start and the second one, the same with a list of them, and a run
    that begins and one that is resumed."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (root := Path(folder, "set")).mkdir()
        for one in (root, root.parent):
            os.utime(one, ns=(_TIME, _TIME))
        with Path(folder, "list.txt").open("w") as file:
            file.writelines(f"n{item % classes:08d}/{item}.JPEG n{item % classes:08d}\n" for item in range(classes * per_class))
        time.sleep(4)  # what has just been made is not trusted
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(folder, "cache")), "OMP_NUM_THREADS": "1"}
        Image.new("RGB", (500, 375)).save(Path(folder, "picture.jpg"))
        for what in measurements:
            command = [sys.executable, __file__, "--only", what, str(root), str(classes), str(per_class)]
            out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[what] = json.loads(out.splitlines()[-1])
    return found


def row(name: str, walk: float, one: dict[str, float]) -> str:
    """A row of the table in Markdown."""
    bytes_each = one["own"] * 2**20 / one["items"]
    numbers = (f"{one['cpu'] - walk:.2f}", f"{one['peak']:.0f}", f"{bytes_each:.1f}", f"{one['worker']:.0f}", f"{one['sent']:.2f}")
    return f"| {name} | {' | '.join(numbers)} | {one['fingerprint']:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs=4, help="one measurement, for the processes that this one starts")
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 10], help="numbers of images")
    given = parser.parse_args()
    if given.only:
        what, root, classes, per_class = given.only
        print(json.dumps(child(what, Path(root), int(classes), int(per_class))))
        return
    costs = ("s of CPU beyond the walk", "MB more at the peak", "bytes an image", "MB of a worker", "MB sent to it", "s to fingerprint")
    columns = ("images", *costs)
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    runs = {"20,000": table(classes=20_000, per_class=1, measurements=("begin", "resume"))}
    for millions in given.millions:
        found = runs[f"{millions} M"] = table(classes=20_000, per_class=50 * millions)
        walk = found["walk"]["cpu"]
        print(row(f"{millions} M, first start (the walk alone: {walk:.2f} s)", walk, found["first"]))
        print(row(f"{millions} M, from the saved listing", 0.0, found["second"]))
        print(row(f"{millions} M in a text file, first start", 0.0, found["first list"]))
        print(row(f"{millions} M in a text file, from the saved listing", 0.0, found["second list"]))
    costs = ("s of CPU to the first batch", "s to resume in the third epoch", "MB more at the peak", "MB kept", "MB of a worker")
    print(f"\n| {' | '.join(('images', *costs))} |")
    print("|---" * (1 + len(costs)) + "|")
    for name, found in runs.items():
        begun, resumed = found["begin"], found["resume"]
        memory = (f"{max(begun[of], resumed[of]):.0f}" for of in ("peak", "own", "worker"))
        print(f"| {name} | {begun['seconds']:.1f} | {resumed['seconds']:.1f} | {' | '.join(memory)} |")


if __name__ == "__main__":
    main()
