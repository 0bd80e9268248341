"""Images per second and memory of `glpretrain embed` beside a plain loop over timm, as a table: `python tests/embed_table.py`.

The plain loop is what people write by hand: a Dataset of PIL and torchvision transforms (timm's own for the model), a DataLoader with as
many workers, the timm model under no_grad, and numpy.save at the end. Each run is a process of its own, on one thread, in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

_SIDE = (96, 128)  # pixels of an image


def write_images(folder: Path, count: int) -> None:
    """Small JPEG files with something to decode in each, in ten class folders."""
    rows, columns = np.mgrid[: _SIDE[0], : _SIDE[1]]
    for number in range(count):
        path = folder / str(number % 10) / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        waves = [np.sin(rows * (0.05 + 0.001 * (number % 97)) + channel) * np.cos(columns * 0.07 + number) for channel in range(3)]
        noise = np.modf(np.sin(rows * 12.9898 + columns * 78.233 + number) * 43758.5453)[0]
        Image.fromarray((128 + 90 * np.stack(waves, axis=-1) + 25 * noise[..., None]).astype(np.uint8)).save(path, quality=90)


def plain_loop(backbone: Path, images: Path, out: Path, *, workers: int, batch_size: int) -> None:
    """What is written by hand."""
    import timm
    import torch
    from timm.data import create_transform, resolve_model_data_config
    from torch.utils.data import DataLoader, Dataset

    model = timm.create_model(f"local-dir:{backbone}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    paths = sorted(images.rglob("*.jpg"))

    class Files(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(Image.open(paths[index]).convert("RGB"))

    found: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in DataLoader(Files(), batch_size=batch_size, num_workers=workers):
            found.append(model.forward_features(batch)[:, 0])
    np.save(out, torch.cat(found).numpy())


def child(which: str, backbone: Path, images: Path, out: Path, workers: int, batch_size: int) -> None:
    """One run in this process. It prints the seconds after the imports, those of cores, and what it and its workers held at most."""
    import timm
    import torch

    from glpretrain.cli import main as glpretrain
    from glpretrain.use import write_features

    assert timm and write_features
    torch.set_num_threads(1)
    peak, done = [0.0], threading.Event()
    watch = threading.Thread(target=_watch, args=(peak, done))
    watch.start()
    start, used = time.perf_counter(), sum(os.times()[:4])
    if which == "timm":
        plain_loop(backbone, images, out, workers=workers, batch_size=batch_size)
    else:
        options = ["--num_workers", str(workers), "--batch_size", str(batch_size)]
        assert glpretrain(["embed", str(backbone), str(images), "--out", str(out), *options]) == 0
    seconds, used = time.perf_counter() - start, sum(os.times()[:4]) - used
    done.set()
    watch.join()
    print(json.dumps({"seconds": seconds, "cpu": used, "megabytes": peak[0], "shape": np.load(out, mmap_mode="r").shape}))


def _watch(peak: list[float], done: threading.Event) -> None:
    """Keep the largest sum of the own memory of this process and of those that it started."""
    while not done.wait(0.05):
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        peak[0] = max(peak[0], sum(map(_megabytes, ("self", *children))))


def _megabytes(process: str) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1024


def run(which: str, backbone: Path, images: Path, folder: Path, *, workers: int, batch_size: int) -> dict:
    """One run in a process of its own."""
    out = folder / f"{which}-{time.monotonic_ns()}.npy"
    arguments = [str(argument) for argument in (which, backbone, images, out, workers, batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--only", *arguments]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def table(
    folder: Path, *, counts: Sequence[int], repeats: int, workers: int, batch_size: int, side: int
) -> dict[tuple[str, int], list[dict]]:
    """All runs by code and number of images, the two codes in turns."""
    import torch

    from glpretrain.encoders import ViT
    from glpretrain.weights import export

    torch.manual_seed(0)
    backbone = export(ViT("vit_tiny_patch16_224", img_size=side, patch_size=8, embed_dim=96, depth=4, num_heads=3), folder / "backbone")
    found: dict[tuple[str, int], list[dict]] = {}
    for count in counts:
        images = folder / f"images-{count}"
        write_images(images, count)
        for repeat in range(repeats):
            for which in ("glpretrain", "timm") if repeat % 2 == 0 else ("timm", "glpretrain"):
                one = run(which, backbone, images, folder, workers=workers, batch_size=batch_size)
                assert one["shape"][0] == count
                found.setdefault((which, count), []).append(one)
                print(
                    f"{which} {count}: {one['seconds']:.1f} s, {one['cpu']:.1f} s of CPU, {one['megabytes']:.0f} MB",
                    file=sys.stderr,
                    flush=True,
                )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs=6, help="one run, for the processes that this one starts")
    parser.add_argument("--counts", type=int, nargs="+", default=[2500, 10_000], help="numbers of images")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each code")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--side", type=int, default=48, help="pixels that images are brought to")
    given = parser.parse_args()
    if given.only:
        which, backbone, images, out, workers, batch_size = given.only
        child(which, Path(backbone), Path(images), Path(out), int(workers), int(batch_size))
        return
    sizes = {"workers": given.workers, "batch_size": given.batch_size, "side": given.side}
    with tempfile.TemporaryDirectory() as folder:
        found = table(Path(folder), counts=given.counts, repeats=given.repeats, **sizes)
    print("| images | code | images per second, median (lowest to highest) | ms of CPU an image, median | MB at the peak |")
    print("|---|---|---|---|---|")
    for count in given.counts:
        medians: dict[str, list[float]] = {}
        for which in ("glpretrain", "timm"):
            rates = sorted(count / one["seconds"] for one in found[which, count])
            cpu = statistics.median(1000 * one["cpu"] / count for one in found[which, count])
            medians[which] = [statistics.median(rates), 1 / cpu]
            peak = max(one["megabytes"] for one in found[which, count])
            rate = f"{medians[which][0]:.0f} ({rates[0]:.0f} to {rates[-1]:.0f})"
            print(f"| {count} | {which} | {rate} | {cpu:.2f} | {peak:.0f} |")
        seconds, cpu = (own / other for own, other in zip(medians["glpretrain"], medians["timm"], strict=True))
        print(f"| {count} | ratio of the medians | {seconds:.2f} | {cpu:.2f} | |")


if __name__ == "__main__":
    main()
