"""What it costs to evaluate a hundred thousand items, as a table: `python tests/evaluation_table.py`.

Items are simulated, since so many pictures are slow to make, and the encoder is tiny, so that the time and the memory are those of the
evaluation itself. Each number is measured in a process of its own. What is kept of decoded items and of features is bounded by constants
of 1 GiB each; here by 16 MiB, so that everything else shows.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

KEPT_BYTES = 1 << 24  # of decoded items and of features
SIDE, PATCH, DIM = 32, 4, 48
_POOL, _CLASSES, _SCORED = 251, 10, 2000  # pictures that items repeat, classes, items that are scored of those where every one is a search


class Settings(NamedTuple):
    """One measurement."""

    evaluator: str
    num_items: int

    @property
    def feature_bytes(self) -> int:
        """What `cls` or one patch of every item takes, with its label and its index."""
        return self.num_items * (4 * DIM + 16)


def megabytes(of: str) -> float:
    """Memory of this process: `VmRSS` is what it has now, `VmHWM` the most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{of}:"))
    return int(line.split()[1]) / 1024


def evaluators() -> dict[str, tuple[object, dict[str, int]]]:
    """Each evaluator with the roles of its sources, and how many of the items these have; 0 stands for all."""
    from glpretrain import evaluate

    searched, learned, masks = {"train": 0, "test": _SCORED}, {"train": 0, "test": 0}, {"masked_train": 0, "masked": 0}
    features = evaluate.Features(batch_size=256)
    return {
        "KNN": (evaluate.KNN(features=features), searched),
        "Retrieval": (evaluate.Retrieval(features=features), searched),
        "LinearProbe": (evaluate.LinearProbe(inverse_l2=(0.1,), max_iter=20, features=features), learned),
        "LinearSweep": (evaluate.LinearSweep(num_blocks=(1, 2), num_steps=50, features=features), learned),
        "FewShot": (evaluate.FewShot(shots=(5,), num_draws=2, features=features), learned),
        "Health": (evaluate.Health(features=features), {"test": 0}),
        "LinearSegmentation": (evaluate.LinearSegmentation(num_steps=50, features=features), masks),
        "InContextSegmentation": (evaluate.InContextSegmentation(features=features), {"masked_train": 0, "masked": _SCORED}),
        "ClusterSegmentation": (evaluate.ClusterSegmentation(num_starts=1, features=features), {"masked": 0}),
        "PromptSegmentation": (evaluate.PromptSegmentation(max_prompts=4, features=features), {"masked": 0}),
        "AttentionSegmentation": (evaluate.AttentionSegmentation(features=features), {"masked": 0}),
        "ObjectDiscovery": (evaluate.ObjectDiscovery(k_patches=10, features=features), {"masked": 0}),
    }


def child(settings: Settings) -> dict[str, float]:
    """One measurement, in this process."""
    import torch

    from glpretrain.data.sources.base import Item, Source
    from glpretrain.encoders import ViT
    from glpretrain.evaluate import FeatureCache, items

    class Simulated(Source):
        """Few pictures in many items, each with its number in its first pixels."""

        name, classes, has_masks = "simulated", [f"c{number}" for number in range(_CLASSES)], True
        mask_classes = ("ground", "object", "other")

        def __init__(self, length: int) -> None:
            self.length = length
            ramp = torch.arange(_POOL)[:, None] * 7919 + torch.arange(3 * SIDE * SIDE)
            self.pictures = (ramp * 2654435761 % 4294967296 >> 24).to(torch.uint8).reshape(_POOL, 3, SIDE, SIDE)
            self.masks = torch.zeros(_POOL, SIDE, SIDE, dtype=torch.long)
            for number in range(_POOL):
                self.masks[number, number % 9 : number % 9 + 16, 4:20] = 1
                self.masks[number, 20:, 16 + number % 7 :] = 2

        def __len__(self) -> int:
            return self.length

        def __getitem__(self, index: int) -> Item:
            values, masks = self.pictures[index % _POOL].clone(), self.masks[index % _POOL]
            values[:, 0, :4] = torch.tensor([index >> shift & 255 for shift in (0, 8, 16, 24)], dtype=torch.uint8)
            return Item(values, index * 31 % 257 % _CLASSES, masks.clone(), None, masks.clone())

    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = ViT("vit_tiny_patch16_224", img_size=SIDE, patch_size=PATCH, embed_dim=DIM, depth=2, num_heads=2)
    items._CACHE_BYTES = KEPT_BYTES
    evaluator, roles = evaluators()[settings.evaluator]

    def run(count: int) -> float:
        cache = FeatureCache(encoder, memory_bytes=KEPT_BYTES)
        sources = {role: Simulated(min(scored or count, count)) for role, scored in roles.items()}
        start = time.perf_counter()
        evaluator.run(encoder, sources, cache)  # pyright: ignore[reportAttributeAccessIssue]
        return time.perf_counter() - start

    run(300)  # what is imported late and kept once
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    seconds = run(settings.num_items)
    return {"seconds": seconds, "peak": megabytes("VmHWM") - before}


def measured(settings: Settings, *, package: Path) -> dict[str, float]:
    """One measurement of a package, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--only", settings.evaluator, str(settings.num_items)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{settings}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    here = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs=2, help="one measurement, for the processes that this one starts")
    parser.add_argument("--items", type=int, nargs="+", default=[25_000, 100_000], help="numbers of items")
    parser.add_argument("--evaluators", nargs="+", help="their classes; all when left out")
    parser.add_argument("--before", type=Path, help="folder of an older checkout to compare with")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(child(Settings(given.only[0], int(given.only[1])))))
        return
    packages = [*([given.before] if given.before else []), here]
    columns = [f"{what} {when}" for when in ("before", "now")[-len(packages) :] for what in ("s", "MB at the peak")]
    print(f"| evaluator | items | one row each, MB | {' | '.join(columns)} |")
    print("|---" * (3 + len(columns)) + "|")
    for name in given.evaluators or evaluators():
        for count in given.items:
            settings = Settings(name, count)
            numbers = [measured(settings, package=package) for package in packages]
            cells = [f"{one['seconds']:.1f} | {one['peak']:.0f}" for one in numbers]
            print(f"| {name} | {count:,} | {settings.feature_bytes / 2**20:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
