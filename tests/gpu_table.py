"""What a GPU does with a step, as JSON and Markdown: `make bench-gpu`, or

    python tests/gpu_table.py --out FOLDER            on the GPU, in less than ten minutes, without network or data
    python tests/gpu_table.py --out FOLDER --small    the same in small, on any machine

Everything is measured in one process, in turns where two ways are compared, and the medians are written beside what is wanted of an H200:
images per second of DINO + iBOT (2 views of 224 and 8 of 96 pixels) with ViT-S/16 and ViT-L/16 in bf16; one sequence of all views against
a pass per size, and its attention with a block mask against a call per size; the views' share of a step; the memory of the
prototypes' cross-entropy against that of dense logits, and its fused form against the chunked one; and whether views, masks and groups of
points of a GPU are those of the CPU.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from eager_flex import gradients_on_a_cpu
from torch import Tensor

from glpretrain.bench.alone import Alone
from glpretrain.bench.machine import machine_name, peak_flops, taken_bytes
from glpretrain.cli.benched import DTYPES, OneBatch, moved, on_this_machine, one_batch
from glpretrain.cli.pretraining import training_arguments
from glpretrain.core.batch import Batch
from glpretrain.encoders.documents import PackedAttention
from glpretrain.objectives.distillation import ViewDistillation
from glpretrain.training.fused_cross_entropy import require_fused
from glpretrain.training.prototypes import CrossEntropyForm, PrototypeLogits

LARGE = {"ViT-S/16": ("vit_small_patch16_224", 128, 2000.0), "ViT-L/16": ("vit_large_patch16_224", 32, 255.0)}
RECIPES = ("dino", "ibot", "mae", "mmc", "fsfm", "mugs", "dcglr", "point_mae")  # every kind of view, mask and item
TOLERANCE = 1e-3  # between devices, of normalised views: a hundredth of the step from one byte to the next


class Row(NamedTuple):
    """A number beside what is wanted."""

    name: str
    value: float
    unit: str
    wanted: str  # empty where nothing is
    reached: bool | None  # None where nothing is wanted, or the machine is another one


class Work(NamedTuple):
    """How much is measured."""

    steps: int
    views: int  # pixels of a global view
    local_views: int
    models: dict[str, tuple[str, int, float]]  # by name: timm's name, items of a step, images per second that are wanted
    prototypes: int
    rows: int  # of the cross-entropy, views of an item times items


FULL = Work(steps=10, views=224, local_views=96, models=LARGE, prototypes=65_536, rows=10 * 64)
SMALL = Work(steps=2, views=32, local_views=16, models={"ViT-Ti/16": ("vit_tiny_patch16_224", 2, 0.0)}, prototypes=2048, rows=10 * 4)


def seconds(actions: Sequence[Callable[[], object]], *, device: torch.device, repeats: int) -> list[float]:
    """Medians of actions that take turns, after one untimed turn."""
    times: list[list[float]] = [[] for _ in actions]
    for number in range(repeats + 1):
        for which in range(len(actions)) if number % 2 else reversed(range(len(actions))):
            start = time.perf_counter()
            actions[which]()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if number > 0:
                times[which].append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def step_rows(work: Work, *, precision: str) -> list[Row]:
    """Images per second, packing and the views' share, of iBOT: DINO and masked patches."""
    rows = []
    for model, (name, batch_size, wanted) in work.models.items():
        overrides = {
            "model.init_args.encoder.init_args.name": name,
            "data.source.class_path": "glpretrain.data.Scenes",
            "data.source.init_args.length": batch_size,
            "data.source.init_args.size": 256 * work.views // 224,
            "data.batch_size": batch_size,
            "data.num_workers": 0,
            "trainer.accumulate_grad_batches": 1,
            "trainer.precision": precision,
        }
        if work.views != FULL.views:
            sizes = ({"size": work.views, "scale": [0.25, 1.0], "count": 2}, {"size": work.local_views, "scale": [0.05, 0.25], "count": 8})
            overrides |= {
                "model.init_args.encoder.init_args.img_size": work.views,
                "data.views.init_args.global_views": json.dumps([sizes[0]]),
                "data.views.init_args.local_views": json.dumps([sizes[1]]),
            }
        arguments = on_this_machine(training_arguments("single_gpu/ibot_vits16"), words_of(overrides))
        with one_batch(arguments) as given:
            rows += rows_of_step(given, model=model, wanted=wanted, steps=work.steps)
    return rows


def words_of(overrides: dict[str, object]) -> list[str]:
    """As arguments of the command line."""
    return [word for name, value in overrides.items() for word in (f"--{name}", str(value))]


def rows_of_step(given: OneBatch, *, model: str, wanted: float, steps: int) -> list[Row]:
    """The rows of one encoder."""
    device = given.device
    alone = Alone(given.method.train(), num_items=given.data.batch_size, dtype=DTYPES.get(given.precision))
    make = partial(given.data.make_batch, given.raw, encoder=given.method.encoder)
    batch = make()

    def packed(*, pays: bool, attention: PackedAttention = "grouped") -> None:
        for branch in (given.method.student, given.method.teacher_branch):
            branch.set_packed_attention(attention)
        with patch("glpretrain.encoders.vit.packing_pays", lambda *args, **kwargs: pays), gradients_on_a_cpu():
            alone.step(batch)

    ways = [partial(packed, pays=True), partial(packed, pays=False), partial(packed, pays=True, attention="flex")]
    views, one_sequence, per_size, block_mask = seconds([make, *ways], device=device, repeats=steps)
    memory = [taken_bytes(way, device) for way in ways]
    best = min(one_sequence, per_size)
    rate, share = given.data.batch_size / (best + views), views / (best + views)
    rows = [
        wanted_row(f"{model}: DINO + iBOT, views included", rate, "images/s", least=wanted or None, device=device),
        wanted_row(f"{model}: the views' share of a step", share, "", most=0.1, device=device),
        wanted_row(f"{model}: one sequence, speed against a pass per size", per_size / one_sequence, "x", least=1.3, device=device),
        wanted_row(f"{model}: one sequence, memory against a pass per size", memory[0] / memory[1], "x", most=0.75, device=device),
        wanted_row(f"{model}: a block mask, speed against a call per size", one_sequence / block_mask, "x", least=1.0, device=device),
        wanted_row(f"{model}: a block mask, memory against a call per size", memory[2] / memory[0], "x", most=1.0, device=device),
        Row(f"{model}: memory of a step, beyond weights and optimizer", min(memory) / 1e9, "GB", "", None),
    ]
    return rows


def wanted_row(name: str, value: float, unit: str, *, least: float | None = None, most: float | None = None, device: torch.device) -> Row:
    """A row; what is wanted of a GPU says nothing about a CPU."""
    wanted = "" if least is most is None else f">= {least:g}" if least is not None else f"<= {most:g}"
    fits = (least is None or value >= least) and (most is None or value <= most)
    return Row(name, value, unit, wanted, fits if wanted and device.type == "cuda" else None)


def prototype_rows(work: Work, *, device: torch.device) -> list[Row]:
    """The cross-entropy between assignments, in chunks against with all logits; fused against in chunks, where its kernels run."""
    num_views, dim = 10, 256
    objective = ViewDistillation(num_prototypes=work.prototypes).to(device)
    directions = wave(work.prototypes, dim, device=device).requires_grad_()
    gain = torch.ones(work.prototypes, 1, device=device)
    # Of length one, as heads give them: longer rows would have larger logits, and exponentials with larger rounding.
    student = F.normalize(wave(num_views, work.rows // num_views, dim, device=device), dim=-1).requires_grad_()
    teacher = F.normalize(wave(2, work.rows // num_views, dim, device=device), dim=-1)

    def gradients(form: CrossEntropyForm | Literal["dense"]) -> list[Tensor]:
        logits = [PrototypeLogits(rows, directions, gain) for rows in (student, teacher)]
        given = [one.dense() if form == "dense" else replace(one, cross_entropy=form) for one in logits]
        loss = objective(student_logits=given[0], teacher_logits=given[1].detach(), teacher_temp=0.04)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), [student, directions])]

    name = f"cross-entropy of {work.rows} rows x {work.prototypes} prototypes"
    chunked, plain = (taken_bytes(partial(gradients, form), device) for form in ("chunked", "dense"))
    rows = [wanted_row(f"{name}, memory against dense logits", chunked / plain, "x", most=0.4, device=device)]
    try:
        require_fused(device)
    except ValueError:
        return rows
    fused = taken_bytes(partial(gradients, "fused"), device)
    fused_time, time_in_chunks = seconds([partial(gradients, "fused"), partial(gradients, "chunked")], device=device, repeats=work.steps)
    pairs = zip(gradients("fused"), gradients("chunked"), strict=True)
    gap = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
    return [
        *rows,
        wanted_row(f"{name}, fused, memory against chunks", fused / chunked, "x", most=1.0, device=device),
        wanted_row(f"{name}, fused, speed against chunks", time_in_chunks / fused_time, "x", least=1.0, device=device),
        wanted_row(f"{name}, fused, difference from chunks", gap, "", most=1e-5, device=device),
    ]


def wave(*shape: int, device: torch.device) -> Tensor:
    """Numbers in [-1, 1] without a generator."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), device=device).remainder_(10_007) * 0.37).view(shape)


def device_rows(*, device: torch.device) -> list[Row]:
    """Largest difference between the batch that this device makes and that of the CPU, for several recipes."""
    rows = []
    for recipe in RECIPES:
        overrides = {"data.num_workers": 0, "data.batch_size": 8, "data.source.init_args.length": 8, "trainer.accelerator": "cpu"}
        with one_batch([*on_this_machine(training_arguments(recipe), words_of(overrides))]) as given:
            make = partial(given.data.make_batch, encoder=given.method.encoder)
            here, there = make(given.raw), make(moved(given.raw, device))
            found = difference(here, there)
        rows.append(wanted_row(f"{recipe}: batch of this device against the CPU's", found, "", most=TOLERANCE, device=device))
    return rows


def difference(one: Batch, other: Batch) -> float:
    """Largest difference between the parts of two batches; masks and indices that differ count as 1."""
    worst = 0.0
    assert one.views.keys() == other.views.keys()
    for name, group in one.views.items():
        for part, value in group._asdict().items():
            there = getattr(other.views[name], part)
            assert (value is None) == (there is None), (name, part)
            if value is None:
                continue
            gap = (value.double() - there.cpu().double()).abs().max() if value.numel() else torch.zeros(())
            worst = max(worst, float(gap) if value.is_floating_point() else float(gap > 0))
    return worst


def table(rows: Sequence[Row], *, machine: str, flops: float) -> str:
    """Markdown."""
    said = {True: "yes", False: "**no**", None: ""}
    lines = [f"On {machine}; one large product of matrices reaches {flops / 1e12:.3g} TFLOP/s here.", ""]
    lines += ["| | value | wanted | reached |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.value:.4g} {row.unit} | {row.wanted} | {said[row.reached]} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, and write gpu.json and gpu.md."""
    parser = argparse.ArgumentParser(prog="python tests/gpu_table.py", description="What a GPU does with a step.")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--small", action="store_true", help="small sizes, for any machine")
    given = parser.parse_args(arguments)
    if not given.small and not torch.cuda.is_available():
        parser.error("there is no GPU here; accepted: a machine with one, or --small")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work, precision = (SMALL, "32-true") if given.small else (FULL, "bf16-mixed")
    flops = peak_flops(device, DTYPES.get(precision, torch.float32))
    rows: list[Row] = []
    for name, measure in (
        ("steps", partial(step_rows, work, precision=precision)),
        ("prototypes", partial(prototype_rows, work, device=device)),
        ("devices", partial(device_rows, device=device)),
    ):
        start = time.perf_counter()
        rows += measure()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        given.out.mkdir(parents=True, exist_ok=True)  # after each part, so that a machine that goes takes little with it
        content = {"machine": machine_name(device), "flops": flops, "small": given.small, "rows": [row._asdict() for row in rows]}
        (given.out / "gpu.json").write_text(json.dumps(content, indent=1))
        (given.out / "gpu.md").write_text(table(rows, machine=machine_name(device), flops=flops))
    print((given.out / "gpu.md").read_text())
    return rows


if __name__ == "__main__":
    main()
