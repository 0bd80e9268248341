"""The command line: one verb per thing that a person wants done. A mistake costs one line and a non-zero exit.

Left out: what the verbs do. Each imports its own part when it is called, so that `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

_TRACEBACK = "GLPRETRAIN_TRACEBACK"
_PUBLISHED = "a published checkpoint (DINO, iBOT, Mugs, MAE, FSFM, DINOv2, DINOv3, MoCo v3, MSN, timm, Hugging Face)"
# jsonargparse tries every member of a union and then repeats the whole value; the reason stands between.
_PARSER_NOISE = ("Does not validate against any", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other mistake: argparse would print the usage as well."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser(verb: str, description: str, epilog: str | None = None) -> _Parser:
    return _Parser(
        prog=f"glpretrain {verb}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _pretrain(arguments: Sequence[str]) -> None:
    """train a recipe by name, evaluate before and after, export"""
    parser = _parser(
        "pretrain",
        "Train a recipe. Everything lands in runs/<recipe>/<time>/; runs/<recipe>/latest points at it.",
        "Any other argument overrides the recipe, as in\n"
        "  glpretrain pretrain mmc --trainer.max_steps 100 --model.init_args.lr.base 1e-3\n"
        "`glpretrain fit --help` lists what there is.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a name below recipes/ (mmc, paper/...) or the path of a yaml file")
    parser.add_argument("--data", metavar="DIR", help="train on this folder of images, tiles or tar shards instead of the recipe's data")
    parser.add_argument("--masks", metavar="DIR", help="score segmentation on this folder: images/ beside masks/")
    parser.add_argument("--init_from", metavar="PATH", help="go on from this backbone instead of random weights")
    known, overrides = parser.parse_known_args(arguments)
    from glpretrain.cli.training import pretrain

    pretrain(known.recipe, data=known.data, masks=known.masks, init_from=known.init_from, overrides=overrides)


def _fit(arguments: Sequence[str]) -> None:
    """train from --config FILE and any number of overrides (LightningCLI)"""
    from glpretrain.cli.training import train

    train(arguments)


def _evaluate(arguments: Sequence[str]) -> None:
    """score a backbone: what its cls and its patches know, with intervals"""
    parser = _parser(
        "evaluate",
        "Score a backbone, print the headline scores and append one JSON line per score to a file.",
        "  glpretrain evaluate runs/mmc/latest/backbone                               the scores that a run reports\n"
        "  glpretrain evaluate runs/mmc/latest/backbone --config eval/images          every evaluator, on embedded data\n"
        "  glpretrain evaluate BACKBONE --config eval/images --data photos/ --masks annotated/ --videos davis/\n"
        "With --config, anything in it can be overridden: --evaluators.knn.init_args.k [5] --sources.test.init_args.length 300",
    )
    parser.add_argument("backbone", metavar="BACKBONE", help=f"folder written by a run or by `glpretrain export`, or {_PUBLISHED}")
    parser.add_argument("--config", metavar="FILE", help="sources and evaluators: a name below recipes/ (eval/images) or a yaml file")
    parser.add_argument("--recipe", help="without --config: whose data it is scored on (that of the run it lies in, else mmc)")
    parser.add_argument("--data", metavar="DIR", help="class folders, divided into train/ and val/ or not, instead of train and test")
    parser.add_argument("--masks", metavar="DIR", help="images/ beside masks/, or such in train/ and val/, instead of the masked sources")
    parser.add_argument("--videos", metavar="DIR", help="with --config: JPEGImages/ beside Annotations/, as DAVIS, or a folder per video")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("results.jsonl"), help="appended to (%(default)s)")
    parser.add_argument("--pictures", metavar="DIR", type=Path, help="where pictures go (<FILE without ending>_pictures)")
    parser.add_argument("--no_pictures", action="store_true", help="draw none")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="where features are kept (~/.cache/glpretrain/features)")
    parser.add_argument("--no_cache", action="store_true", help="keep features in memory only")
    known, rest = parser.parse_known_args(arguments)
    from glpretrain.cli.scoring import score, values_by_name
    from glpretrain.evaluate.cache import default_folder

    pictures = None if known.no_pictures else known.pictures or known.out.with_name(f"{known.out.stem}_pictures")
    cache = None if known.no_cache else known.cache or default_folder()
    if rest and known.config is None:
        raise ValueError(f"{' '.join(rest)}: accepted with --config only (see glpretrain evaluate --help)")
    folders = {"data": known.data, "masks": known.masks, "videos": known.videos}
    options = {"recipe": known.recipe, "overrides": values_by_name(rest), **folders}
    lines = score(known.backbone, config=known.config, out=known.out, pictures=pictures, cache=cache, **options)
    print(f"{len(lines)} scores appended to {known.out}" + ("" if pictures is None else f", pictures in {pictures}/"))


def _export(arguments: Sequence[str]) -> None:
    """write a backbone to a folder: timm, Hugging Face, torch.export or ONNX"""
    parser = _parser(
        "export",
        "Write an encoder to a new folder, with its card (mean, std, licence) beside it, and say how far the written one is\n"
        "from the encoder on a check batch.",
        "formats:\n"
        "  folder       model.safetensors and config.json: load_backbone and timm's local-dir: open it\n"
        "  timm         the same as folder\n"
        "  huggingface  config.json, model.safetensors, preprocessor_config.json: transformers.AutoModel opens it; ViTs only\n"
        "  torch        encoder.pt2: torch.export.load opens it, without this package and without timm\n"
        "  onnx         encoder.onnx: input images, outputs cls and patches (pip install 'glpretrain[onnx]')\n"
        "torch and onnx take any number of images, normalised with the card's mean and std, of one size (--img_size) or of --any_size.",
    )
    parser.add_argument("backbone", metavar="BACKBONE", help=f"checkpoints/last.ckpt of a run, an exported folder, or {_PUBLISHED}")
    parser.add_argument("out", metavar="OUT", help="a new or empty folder")
    formats = ("folder", "timm", "huggingface", "torch", "onnx")
    parser.add_argument("--format", choices=formats, default="folder", help="%(default)s when left out")
    parser.add_argument("--img_size", type=int, nargs="+", metavar="N", help="pixels, or height and width, that it is made for (its own)")
    parser.add_argument("--any_size", action="store_true", help="torch and onnx: let height and width vary (not every model can)")
    parser.add_argument("--licence", help="of the weights")
    parser.add_argument("--which", choices=["teacher", "student"], default="teacher", help="side, where there are two (%(default)s)")
    parser.add_argument("--read_as", metavar="FORMAT", help="of a published file, where its contents do not tell (dino, mae, timm, ...)")
    parser.add_argument("--num_heads", type=int, help="attention heads, for a published file of an unpublished width")
    known = parser.parse_args(arguments)
    from glpretrain.weights import export_as, load_backbone

    size = known.img_size[0] if known.img_size and len(known.img_size) == 1 else known.img_size
    options = {"format": known.format, "img_size": size, "any_size": known.any_size, "licence": known.licence}
    encoder = load_backbone(known.backbone, which=known.which, format=known.read_as, num_heads=known.num_heads)
    print(export_as(encoder, known.out, **options))


def _inspect(arguments: Sequence[str]) -> None:
    """write a page to look into backbones: attention, patch PCA, click a patch to prompt"""
    parser = _parser(
        "inspect",
        "Write one page, complete in itself, that shows pictures as backbones see them: attention of every head and block, the PCA of\n"
        "the patches, and what resembles the patch that you click, with a threshold to move.",
        "Before and after training, side by side:\n"
        "  glpretrain inspect runs/mmc/latest/backbone photo.jpg --untrained\n"
        "  glpretrain inspect mmc=runs/mmc/latest/backbone a.jpg b.jpg --compare mae=runs/mae/latest/backbone --size 192",
    )
    parser.add_argument("backbone", metavar="BACKBONE", help=f"folder of a run or export, or {_PUBLISHED}; NAME=PATH names it")
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="stretched to what the backbone was trained on")
    parser.add_argument("--compare", metavar="BACKBONE", action="append", default=[], help="another one beside it (may be repeated)")
    parser.add_argument("--untrained", action="store_true", help="also the first backbone's architecture with fresh weights")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="a new file (%(default)s)")
    parser.add_argument("--size", metavar="PIXELS", help="side of the square, or HEIGHTxWIDTH, to look at (each backbone's own)")
    parser.add_argument("--threshold", type=float, default=0.5, help="cosine that the page opens with (%(default)s)")
    parser.add_argument("--layers", default="all", help="blocks whose attention is kept: all, last, or numbers as 0,5,11 (%(default)s)")
    known = parser.parse_intermixed_args(arguments)
    from glpretrain.cli.inspection import inspect

    path = inspect(
        [known.backbone, *known.compare],
        known.images,
        out=known.out,
        with_untrained=known.untrained,
        size=known.size,
        threshold=known.threshold,
        layers=known.layers,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, open it in a browser")


def _bench(arguments: Sequence[str]) -> None:
    """time the operations that make views"""
    parser = _parser("bench", "Time each operation that makes views, on this machine.")
    parser.add_argument("what", choices=["views"])
    parser.add_argument("--recipe", default="mmc", help="whose views (%(default)s)")
    parser.add_argument("--batch_size", type=int, help="items (the recipe's)")
    known = parser.parse_args(arguments)
    from glpretrain.cli.bench import views

    views(known.recipe, batch_size=known.batch_size)


def _tiles(arguments: Sequence[str]) -> None:
    """cut whole-slide images into tissue tiles, in tar shards to train on"""
    parser = _parser(
        "tiles",
        "Cut the tissue of whole-slide images into tiles of one size and one resolution, packed in tar shards with an index.",
        "  glpretrain tiles slides/ --out tiles/ --workers 8                             224 px at 0.5 microns per pixel (20x)\n"
        "  glpretrain tiles a.svs b.ndpi --out tiles/ --size 256 --mpp 1.0 --overlap 32\n"
        "  glpretrain pretrain dino --data tiles/\n"
        "Look at DIR/overviews/: each slide with its tissue outlined and its tiles drawn. The same command goes on where a run was\n"
        "stopped; a slide that is damaged is reported and left out. Slides of slides/<class>/ keep their class.\n"
        "Reads what OpenSlide reads (pip install 'glpretrain[slides]') and other TIFF, tiled or in strips, 8-bit RGB.",
    )
    parser.add_argument("slides", metavar="SLIDE", nargs="+", help="a file, or a folder that is searched for slides")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder, or one of an earlier run with the same settings")
    parser.add_argument("--size", metavar="PIXELS", type=int, default=224, help="side of a tile (%(default)s)")
    parser.add_argument("--mpp", type=float, default=0.5, help="microns per pixel of a tile: 0.5 is about 20x (%(default)s)")
    parser.add_argument("--overlap", metavar="PIXELS", type=int, default=0, help="that neighbouring tiles share (%(default)s)")
    parser.add_argument("--min_tissue", metavar="SHARE", type=float, default=0.5, help="least share of tissue in a tile (%(default)s)")
    parser.add_argument("--format", choices=["jpg", "png"], default="jpg", help="of the tiles (%(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 100 (%(default)s)")
    parser.add_argument("--per_shard", metavar="TILES", type=int, default=2048, help="in one tar file at most (%(default)s)")
    parser.add_argument("--mpp_of_slide", metavar="MPP", type=float, help="microns per pixel of slides that do not say (0.25 at 40x)")
    parser.add_argument("--workers", metavar="N", type=int, help="processes (as many as there are cores, at most 8)")
    known = parser.parse_args(arguments)
    from glpretrain.cli.tiles import tiles
    from glpretrain.prepare.slides import Settings

    settings = Settings(**{name: value for name, value in vars(known).items() if name in Settings._fields})
    tiles(known.slides, out=known.out, settings=settings, workers=known.workers)


def _faces(arguments: Sequence[str]) -> None:
    """make a folder of faces with region maps of pictures: detect, crop, resize, parse"""
    parser = _parser(
        "faces",
        "Detect the face in every picture of a folder, crop it with a margin, resize it, and write it to OUT/images with a map of its\n"
        "regions in OUT/regions: what glpretrain.data.Faces reads. An interrupted run goes on where it stopped; a picture that cannot be\n"
        "used is skipped with a line.",
        "parsers (where the maps come from):\n"
        "  template  ellipses at the places of an upright frontal face; needs nothing\n"
        "  maps      label maps that you have, in --maps, with the same relative paths; --table says whose labels they are\n"
        "  facer     the package FACER, the official choice (pip install pyfacer; it fetches its own weights)\n"
        "detectors: cascade (scikit-image's LBP cascade, frontal faces, nothing to fetch), none (pictures that are faces already)",
    )
    parser.add_argument("folder", metavar="FOLDER", help="pictures, flat or nested; relative paths, and so classes, are kept")
    parser.add_argument("--out", metavar="DIR", required=True, help="new, or of an earlier run with the same settings")
    parser.add_argument("--parser", choices=["template", "maps", "facer"], default="template", help="%(default)s when left out")
    parser.add_argument("--maps", metavar="DIR", help="label maps (.png or .npy) for --parser maps")
    parser.add_argument("--table", choices=["lapa", "celebamask", "bisenet", "fasseg"], help="labels of these maps (lapa)")
    parser.add_argument("--detector", choices=["cascade", "none"], default="cascade", help="%(default)s when left out")
    parser.add_argument("--size", type=int, default=224, help="side of a face in pixels (%(default)s)")
    parser.add_argument("--margin", type=float, default=1.3, help="side of the crop over that of the face (%(default)s)")
    parser.add_argument("--workers", type=int, help="processes (one per core, at most 8)")
    known = parser.parse_args(arguments)
    from glpretrain.cli.faces import faces

    counts = faces(**vars(known))
    total = counts["written"] + counts["there"]
    print(f"{total} faces in {known.out} ({counts['there']} were there before), {counts['skipped']} skipped (see {known.out}/skipped.txt)")


_VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "pretrain": _pretrain,
    "fit": _fit,
    "evaluate": _evaluate,
    "export": _export,
    "inspect": _inspect,
    "tiles": _tiles,
    "bench": _bench,
    "faces": _faces,
}


def _help() -> str:
    from glpretrain.runs import recipe_names

    names = recipe_names()
    evaluations = [name for name in names if name.startswith("eval/")]
    verbs = "\n".join(f"  {name:<9} {verb.__doc__}" for name, verb in _VERBS.items())
    return (
        f"usage: glpretrain VERB ...\n\nSelf-supervised pretraining with global and local objectives.\n\n{verbs}\n\n"
        f"recipes: {', '.join(name for name in names if name not in evaluations)}\n"
        f"evaluations: {', '.join(evaluations)}\n"
        "`glpretrain VERB --help` says more; "
        f"{_TRACEBACK}=1 shows where an error came from.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        arguments: `sys.argv[1:]` when left out.

    Returns:
        Exit status: 0, 2 after a mistake that one line on stderr has named, 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0
    try:
        if arguments[0] not in _VERBS:
            raise ValueError(f"there is no verb {arguments[0]!r}; accepted: {', '.join(_VERBS)}")
        _VERBS[arguments[0]](arguments[1:])
    except (ValueError, OSError, ImportError, argparse.ArgumentError) as error:  # an optional reader that is not installed is the third
        if os.environ.get(_TRACEBACK):
            raise
        print(f"glpretrain: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("glpretrain: stopped", file=sys.stderr)
        return 130
    return 0


def one_line(error: Exception) -> str:
    """What went wrong, without what a worker process or the parser of a recipe wraps around it."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") or line.startswith("Original Traceback") for line in lines):
        lines = lines[-1:]  # a DataLoader's worker sends its whole traceback as the message
    kept = [line for line in lines if not line.startswith(_PARSER_NOISE)]
    return " ".join(kept) or type(error).__name__
