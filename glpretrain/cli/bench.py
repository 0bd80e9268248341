"""`glpretrain bench`: what the steps of a recipe cost on this machine, as tables, JSON and a picture.

The measurements themselves are left out (`benched`, and the package `bench`).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from glpretrain.bench.figures import parts_figure
from glpretrain.bench.lightly import require_lightly
from glpretrain.bench.machine import machine_name
from glpretrain.bench.official import OFFICIAL, require_code
from glpretrain.bench.plan import ROWS
from glpretrain.bench.summary import Costs
from glpretrain.cli.benched import Beside, compared, measured_costs, on_this_machine, require_not_own
from glpretrain.cli.parsing import parse
from glpretrain.cli.planned import Planned, planned
from glpretrain.cli.pretraining import training_arguments
from glpretrain.cli.scaled import Number, scaled_costs
from glpretrain.cli.trainer import is_first_process
from glpretrain.cli.trust import Parser, read_part, take_imports
from glpretrain.core.files import part_file, write_json
from glpretrain.core.node import usable_cores
from glpretrain.data.views import MultiCrop
from glpretrain.data.views.bench import ViewBench
from glpretrain.runs import find_recipe


def bench(
    recipe: str,
    *,
    data: str | None = None,
    steps: int = 20,
    json: Path | None = None,
    picture: Path | None = None,
    scaling: Number | None = None,
    against: tuple[str, ...] | None = None,
    plan: bool = False,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    views: bool = False,
    width: int = 500,
    height: int = 375,
    overrides: Sequence[str] = (),
) -> None:
    """Measure what a step of a recipe costs on this machine, part by part.

    Trains a few steps, the first ones untimed, without checkpoints, evaluation or wandb, and leaves no run folder. Any other argument
    overrides the recipe, as in
      glpretrain bench mmc --data.batch_size 64 --data.num_workers 2
    Unless it is overridden, one process runs on the GPU where there is one. Where there is none, times are those of the CPU.

    Args:
        recipe: a name below recipes/ (mmc, paper/...) or the path of a yaml file
        data: folder of images, of faces with region maps, of tiles or of clouds, tar shards, or a file of clouds, instead of the
            recipe's source
        steps: number of steps that are measured
        json: file that the numbers are written to
        picture: file of a picture of the parts, such as parts.png
        scaling: measure several values of this number, fewer and more than the recipe's; with files, 10,000 to 10 million images that are
            listed and do not exist, and one photograph that is decoded for each
        against: instead, time the step beside the same one by other code, in turns: lightly (the package), official-dino PATH or
            official-ibot PATH, where PATH is a clone of facebookresearch/dino or bytedance/ibot. THE CODE AT PATH IS EXECUTED with your
            rights: give only what you would run yourself
        plan: instead, say how much memory a process takes at its peak, without training or data; any recipe is planned on any machine
        gpus: number of GPUs that --plan is for; the recipe's when left out
        gpu_memory: gigabytes of a GPU, for which --plan says how many items fit
        views: instead, time what makes the views of an item, beside torchvision and kornia, with one thread and with all cores
        width: width of the pictures of --views
        height: height of the pictures of --views
        overrides: further arguments of `glpretrain fit`
    """
    overrides = take_imports(overrides)
    require_not_own(overrides)
    if views:
        _refuse_beside("views", data=data, picture=picture, scaling=scaling, against=against)
        _views(recipe, overrides, width=width, height=height, json=json)
        return
    if plan:
        _refuse_beside("plan", picture=picture, scaling=scaling, against=against)
        found = planned([*training_arguments(recipe, data=data), *overrides], gpus=gpus, gpu_memory=gpu_memory)
        _show_plan(found, gpu_memory=gpu_memory)
        if json is not None:
            write_json(json, found.to_json())
        return
    if gpus is not None or gpu_memory is not None:
        raise ValueError("bench: --gpus and --gpu_memory would be ignored without --plan; leave them out, or add it")
    arguments = on_this_machine(training_arguments(recipe, data=data), overrides)
    if against is not None:
        _refuse_beside("against", picture=picture, scaling=scaling)
        name, code = _other(against)
        beside = compared(arguments, name=name, code=code, steps=steps)
        _show_beside(beside)
        if json is not None:
            write_json(json, beside.to_json())
        return
    costs = {recipe: measured_costs(arguments, steps=steps)} if scaling is None else scaled_costs(arguments, number=scaling, steps=steps)
    if not is_first_process():
        return
    if scaling is None:
        _show(costs[recipe])
    else:
        _show_scaled(costs)
    if json is not None:
        values = {name: one.to_json() for name, one in costs.items()}
        write_json(json, values[recipe] if scaling is None else values)
    if picture is not None:
        _draw(picture, costs)


def _refuse_beside(option: str, **others: object) -> None:
    """Refuse options that another one would make useless."""
    if given := [name for name, value in others.items() if value is not None]:
        raise ValueError(f"bench: --{given[0]} would be ignored beside --{option}; leave it out")


def _other(against: Sequence[str]) -> tuple[str, Path | None]:
    """Whose step `--against` names, and the clone of official code."""
    if list(against) == ["lightly"]:
        require_lightly()
        return "lightly", None
    if len(against) != 2:
        raise ValueError(f"bench: --against {' '.join(against)}; accepted: lightly, {' PATH, '.join(OFFICIAL)} PATH, where PATH is a clone")
    require_code(against[0], Path(against[1]))
    return against[0], Path(against[1])


def _show(costs: Costs) -> None:
    console = Console(soft_wrap=True)
    console.print(f"{costs.recipe}: {costs.items} items a step, {costs.precision}, on {costs.machine}")
    table = Table("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for part in costs.parts:
        table.add_row(part.name, f"{part.milliseconds:.1f}", f"{part.share:.0%}")
    table.add_section()
    table.add_row("a step", f"{costs.step_milliseconds:.1f}", "")
    console.print(table)
    console.print(f"{costs.items_per_second:,.1f} items per second; peak memory {_gigabytes(costs.peak_bytes)} ({costs.peak_of})")
    console.print(
        f"{costs.flops / 1e9:,.1f} GFLOP a step: {costs.flops / costs.step_milliseconds / 1e6:,.1f} GFLOP/s,"
        f" {costs.flops_share:.0%} of the {costs.machine_flops / 1e9:,.0f} GFLOP/s that one large product of matrices reaches here"
    )
    console.print(costs.starvation)
    console.print(costs.preparation)


def _show_scaled(costs: dict[str, Costs]) -> None:
    first = next(iter(costs.values()))
    console = Console(soft_wrap=True)
    console.print(f"{first.recipe}: {first.precision}, on {first.machine}; milliseconds of a step")
    table = Table("part")
    for name in costs:
        table.add_column(name, justify="right")
    parts = [{part.name: part.milliseconds for part in one.parts} for one in costs.values()]
    for row in dict.fromkeys(name for found in parts for name in found):
        table.add_row(row, *(f"{found.get(row, 0.0):.1f}" for found in parts))
    table.add_section()
    table.add_row("a step", *(f"{one.step_milliseconds:.1f}" for one in costs.values()))
    table.add_row("items per second", *(f"{one.items_per_second:.1f}" for one in costs.values()))
    table.add_row("peak memory", *(_gigabytes(one.peak_bytes) for one in costs.values()))
    table.add_row("a worker decodes a batch", *(f"{one.read_milliseconds:.1f}" for one in costs.values()))
    table.add_row("and cuts views", *(f"{one.cut_milliseconds:.1f}" for one in costs.values()))
    table.add_row("s to the first batch", *(f"{one.start_seconds:.1f}" for one in costs.values()))
    console.print(table)


def _show_beside(beside: Beside) -> None:
    console = Console(soft_wrap=True)
    console.print(f"{beside.recipe}: {beside.items} items a step, {beside.precision}, on {beside.machine}")
    table = Table("the same step")
    for column in ("ms (median)", "items per second", "GB taken"):
        table.add_column(column, justify="right")
    found = beside.compared
    rows = {"ours": (found.milliseconds, found.taken_bytes), beside.other: (found.official_milliseconds, found.official_taken_bytes)}
    for name, (milliseconds, taken) in rows.items():
        table.add_row(name, f"{milliseconds:.1f}", f"{1e3 * beside.items / milliseconds:.1f}", f"{taken / 1e9:.3f}")
    console.print(table)
    memory = found.taken_bytes / found.official_taken_bytes
    console.print(f"ours is {found.speed:.2f} times as fast and takes {memory:.2f} of the memory (beyond weights and optimizer)")


def _show_plan(found: Planned, *, gpu_memory: float | None) -> None:
    console = Console(soft_wrap=True)
    joint = found.batch_size * found.num_processes * found.num_accumulated
    console.print(
        f"{found.recipe}: {found.batch_size} items a process, {found.precision}; {joint} items a step on {found.num_processes} GPU"
        f"{'s' if found.num_processes > 1 else ''}{f', accumulated {found.num_accumulated} times' if found.num_accumulated > 1 else ''}"
    )
    table = Table("GB of a process at its peak")
    for name in found.plans:
        table.add_column(name, justify="right")
    for row in ROWS:
        if any(plan.rows[row] for plan in found.plans.values()):
            table.add_row(row, *(f"{plan.rows[row] / 1e9:.2f}" for plan in found.plans.values()))
    if found.buckets:
        table.add_row("buckets of DistributedDataParallel", *[f"{found.buckets / 1e9:.2f}"] * len(found.plans))
    table.add_section()
    table.add_row("together", *(f"{(plan.total + found.buckets) / 1e9:.2f}" for plan in found.plans.values()))
    console.print(table)
    for note in found.notes:
        console.print(note)
    if gpu_memory is not None:
        fits = "fits" if found.total <= 1e9 * gpu_memory else "does not fit"
        console.print(f"{fits} into {gpu_memory:g} GB, in which {found.fitting} items a process fit")
    console.print("not counted: CUDA itself, scratch memory of kernels, what the allocator leaves unused")


def _draw(path: Path, costs: dict[str, Costs]) -> None:
    first = next(iter(costs.values()))
    title = f"{first.recipe}, {first.precision}, {first.machine}"
    starts = {name: one.start_seconds for name, one in costs.items()} if len(costs) > 1 else None
    figure = parts_figure({name: one.parts for name, one in costs.items()}, title=title, starts=starts)
    with part_file(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix(".") or "png", dpi=150)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _views(recipe: str, overrides: Sequence[str], *, width: int, height: int, json: Path | None) -> None:
    """The tables of what makes views: ours and others', with one thread and with all cores, and our operations on the device."""
    data = read_part(find_recipe(recipe), "data")
    parser = Parser(exit_on_error=False)
    parser.add_argument("--data.views", type=MultiCrop, required=True)
    parser.add_argument("--data.batch_size", type=int, required=True)
    given = {name: data[name] for name in ("views", "batch_size")}
    made = parser.instantiate(parse(parser, overrides, values={"data": given})).data
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = ViewBench(made.views, batch_size=made.batch_size, image_size=(height, width), device=device)
    before, costs = torch.get_num_threads(), {}
    for threads in sorted({1, usable_cores()}):
        torch.set_num_threads(threads)
        costs[threads] = bench.ways()
    operations = bench.operations()
    torch.set_num_threads(before)
    console = Console(soft_wrap=True)
    num_views = sum(number for number, _ in made.views.groups(3).values())
    console.print(f"{recipe}: {made.batch_size} items of {width}x{height} px, {num_views} views each, on {device} ({machine_name(device)})")
    ours = {threads: next(one.milliseconds for one in rows if one.name == "ours") for threads, rows in costs.items()}
    table = Table("ms for the views of an item")
    for threads in costs:
        table.add_column(f"{threads} thread{'s' if threads > 1 else ''}", justify="right")
        table.add_column("times ours", justify="right")
    for row in zip(*costs.values(), strict=True):
        cells = [(f"{one.milliseconds:.2f}", f"{one.milliseconds / ours[threads]:.2f}") for threads, one in zip(costs, row, strict=True)]
        table.add_row(row[0].name, *(cell for pair in cells for cell in pair))
    console.print(table)
    table = Table(f"on the device with one operation, {max(costs)} thread{'s' if max(costs) > 1 else ''}")
    table.add_column("ms of an item", justify="right")
    for one in operations:
        table.add_row(one.name, f"{one.milliseconds:.3f}")
    console.print(table)
    if json is not None:
        ways = {str(threads): {one.name: one.milliseconds for one in rows} for threads, rows in costs.items()}
        write_json(json, {"threads": ways, "operations": {one.name: one.milliseconds for one in operations}})
