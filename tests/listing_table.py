"""What it costs to list millions of images, as a table: `python tests/listing_table.py`.

The folders are simulated, since millions of files are slow to make: `os.scandir` and `os.stat` of a root give entries that exist
nowhere. Each number is measured in a process of its own, and the walk through the simulated folders alone is taken for comparison.
"""

import argparse
import ctypes
import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_READ = 100_000  # paths that a worker asks for
_TIME = 10**18  # nanoseconds, long ago


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


def simulate(root: Path, *, classes: int, per_class: int) -> None:
    """Let `root` seem to hold class folders with images."""
    scandir, stat = os.scandir, os.stat
    status = stat(root)

    @contextmanager
    def entries(path: str | Path = ".") -> Iterator[Iterator[object]]:
        folder = os.path.relpath(path, root)
        if folder.startswith(".."):
            with scandir(path) as found:
                yield found
        elif folder == ".":
            yield (Entry(f"n{number:08d}", True) for number in range(classes))
        else:
            yield (Entry(f"{folder}_{number}.JPEG", False) for number in range(per_class))

    def state(path: str | Path, **options: object) -> os.stat_result:
        if not str(path).startswith(f"{root}/"):
            return stat(path, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return status

    os.scandir, os.stat = entries, state  # pyright: ignore[reportAttributeAccessIssue]


def megabytes(of: str) -> float:
    """Memory of this process: `RssAnon` is its own, `VmHWM` the most so far with files, `Private_Dirty` what it shares with no other."""
    name = "smaps_rollup" if of == "Private_Dirty" else "status"
    line = next(line for line in Path(f"/proc/self/{name}").read_text().splitlines() if line.startswith(f"{of}:"))
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


def child(what: str, root: Path, classes: int, per_class: int) -> dict[str, float]:
    """One measurement, in this process."""
    simulate(root, classes=classes, per_class=per_class)
    if what == "walk":
        start = time.process_time()
        for folder in range(classes):
            with os.scandir(root / f"n{folder:08d}") as entries:
                sum(entry.is_file() for entry in entries)
        return {"cpu": time.process_time() - start}
    from glpretrain.data import ImageFolder, ImageList

    return measured(lambda: ImageList(root.parent / "list.txt") if "list" in what else ImageFolder(root))


def table(*, classes: int, per_class: int) -> dict[str, dict[str, float]]:
    """All measurements of a number of images: the walk alone, the first start and the second one, and the same with a list of them."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (root := Path(folder, "set")).mkdir()
        for one in (root, root.parent):
            os.utime(one, ns=(_TIME, _TIME))
        with Path(folder, "list.txt").open("w") as file:
            file.writelines(f"n{item % classes:08d}/{item}.JPEG n{item % classes:08d}\n" for item in range(classes * per_class))
        time.sleep(4)  # what has just been made is not trusted
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(folder, "cache")), "OMP_NUM_THREADS": "1"}
        for what in ("walk", "first", "second", "first list", "second list"):
            command = [sys.executable, __file__, "--only", what, str(root), str(classes), str(per_class)]
            out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
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
    for millions in given.millions:
        found = table(classes=20_000, per_class=50 * millions)
        walk = found["walk"]["cpu"]
        print(row(f"{millions} M, first start (the walk alone: {walk:.2f} s)", walk, found["first"]))
        print(row(f"{millions} M, from the saved listing", 0.0, found["second"]))
        print(row(f"{millions} M in a text file, first start", 0.0, found["first list"]))
        print(row(f"{millions} M in a text file, from the saved listing", 0.0, found["second list"]))


if __name__ == "__main__":
    main()
