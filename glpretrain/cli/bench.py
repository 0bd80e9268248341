"""What the views of a recipe cost on this machine, as a table.

Left out: the measurement itself (`glpretrain.data.views.bench`).
"""

import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from glpretrain.data.views import MultiCrop
from glpretrain.data.views.bench import bench_views
from glpretrain.runs import find_recipe


def views(recipe: str, *, batch_size: int | None = None) -> None:
    """Time the recipe's views on the GPU where there is one and print the table.

    Args:
        recipe: name or path.
        batch_size: items; the recipe's when left out.
    """
    data = yaml.safe_load(find_recipe(recipe).read_text())["data"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--views", type=MultiCrop)
    multicrop: MultiCrop = parser.instantiate(parser.parse_object({"views": data["views"]})).views
    batch_size = data["batch_size"] if batch_size is None else batch_size
    image_size = data.get("item_size") or multicrop.default_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    costs = bench_views(batch_size=batch_size, image_size=image_size, multicrop=multicrop, device=device)
    num_views = sum(count for count, _ in multicrop.groups(3).values())
    table = Table(title=f"{recipe}: {batch_size} items of {image_size} px, {num_views} views each, on {device}", title_justify="left")
    for column in ("operation", "ms", "share", "torchvision, image by image, ms"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for cost in costs:
        table.add_row(cost.operation, f"{cost.milliseconds:.1f}", f"{cost.share:.0%}", f"{cost.torchvision_milliseconds:.1f}")
    Console().print(table)
