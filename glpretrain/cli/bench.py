"""`glpretrain bench`: what the views of a recipe cost on this machine, as a table.

The measurement itself is left out (`glpretrain.data.views.bench`).
"""

from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from glpretrain.cli.parsing import parse
from glpretrain.cli.trust import Parser, read_part
from glpretrain.data.views import MultiCrop
from glpretrain.data.views.bench import bench_views
from glpretrain.runs import find_recipe


def bench(what: Literal["views"], *, recipe: str = "mmc", batch_size: int | None = None, width: int = 500, height: int = 375) -> None:
    """Time the operations that make views.

    What a worker does is timed on one core, the rest on the GPU where there is one.

    Args:
        what: what is timed
        recipe: name or path of the recipe whose views are timed
        batch_size: number of items; that of the recipe when left out
        width: width of the pictures
        height: height of the pictures
    """
    data = read_part(find_recipe(recipe), "data")
    parser = Parser(exit_on_error=False)
    parser.add_argument("--views", type=MultiCrop, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    given = {name: data[name] for name in ("views", "batch_size")}
    made = parser.instantiate(parse(parser, [], values=given))
    multicrop: MultiCrop = made.views
    count: int = made.batch_size if batch_size is None else batch_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    costs = bench_views(batch_size=count, image_size=(height, width), multicrop=multicrop, device=device)
    num_views = sum(number for number, _ in multicrop.groups(3).values())
    title = f"{recipe}: {count} items of {width}x{height} px, {num_views} views each, on {device}"
    table = Table("operation", title=title, title_justify="left")
    for column in ("ms", "share", "torchvision, image by image, ms"):
        table.add_column(column, justify="right")
    for cost in costs:
        table.add_row(cost.operation, f"{cost.milliseconds:.1f}", f"{cost.share:.0%}", f"{cost.torchvision_milliseconds:.1f}")
    Console().print(table)
