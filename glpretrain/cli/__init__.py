"""The command line: one verb per thing that a person wants done. A mistake costs one line and a non-zero exit.

What the verbs do is left out. Each is a typed function that is imported when it is called, so that `--help` answers at once.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from glpretrain import __version__

__all__ = ["VERBS", "main"]

_TRACEBACK = "GLPRETRAIN_TRACEBACK"
_COMPLETION = "--print_shtab"


class Verb(NamedTuple):
    """What a verb does."""

    function: str  # import path
    purpose: str  # first line of the docstring of the function


VERBS = {
    "pretrain": Verb("glpretrain.cli.pretraining.pretrain", "Train a recipe by name, evaluate before and after, export."),
    "fit": Verb("glpretrain.cli.training.train", "Train from --config FILE and any number of overrides (LightningCLI)."),
    "evaluate": Verb("glpretrain.cli.scoring.evaluate", "Score a backbone: what its cls and its patches know, with intervals."),
    "finetune": Verb(
        "glpretrain.cli.finetune.finetune", "Fine-tune a backbone on labelled items or on images with masks, and score the model."
    ),
    "predict": Verb("glpretrain.cli.predict.predict", "Predict the classes of new files, or of their pixels, with a fine-tuned model."),
    "export": Verb("glpretrain.cli.backbones.export", "Write a backbone to a folder: timm, Hugging Face, torch.export or ONNX."),
    "push": Verb("glpretrain.cli.push.push", "Upload a backbone to huggingface.co with a model card: data, scores, licence, use."),
    "inspect": Verb("glpretrain.cli.backbones.inspect", "Write a page to look into backbones: attention, patch PCA, prompts by click."),
    "report": Verb(
        "glpretrain.cli.reporting.report",
        "Write the report of a run: curves, scores, a map of your items, their neighbours before and after.",
    ),
    "embed": Verb("glpretrain.cli.embedding.embed", "Write the features of your items to a file: .parquet, .npy or .csv."),
    "neighbours": Verb("glpretrain.cli.embedding.neighbours", "Name the items that resemble a picture most, with their cosines."),
    "compare": Verb(
        "glpretrain.cli.comparing.compare",
        "Compare runs: means and spread over seeds, paired tests, curves, cost against score.",
    ),
    "recipes": Verb("glpretrain.cli.recipe_list.recipes", "List recipes: name, kind of data, cost, and what each is for."),
    "runs": Verb(
        "glpretrain.cli.run_list.runs", "List runs: recipe, data, seed, steps, state, and scores before and after; the newest first."
    ),
    "cache": Verb("glpretrain.cli.cache.cache", "Show the features that evaluations keep on disk, or remove them."),
    "tiles": Verb("glpretrain.cli.tiles.tiles", "Cut whole-slide images into tissue tiles, in tar shards to train on."),
    "replay": Verb("glpretrain.cli.replay.replay", "Compute a refused step again, and say in which module the numbers stop being finite."),
    "bench": Verb("glpretrain.cli.bench.bench", "Measure what a step of a recipe costs on this machine, part by part."),
    "faces": Verb("glpretrain.cli.faces.faces", "Make a folder of faces with region maps of pictures: detect, crop, resize, parse."),
}


def _help() -> str:
    from glpretrain.runs import recipe_names

    names = recipe_names()
    evaluations = [name for name in names if name.startswith("eval/")]
    tasks = [name for name in names if name.startswith("finetune/")]
    verbs = "\n".join(f"  {name:<10} {verb.purpose}" for name, verb in VERBS.items())
    return (
        f"usage: glpretrain VERB ...\n\nSelf-supervised pretraining with global and local objectives.\n\n{verbs}\n\n"
        f"recipes: {', '.join(name for name in names if name not in [*evaluations, *tasks])}\n"
        f"fine-tuning: {', '.join(tasks)}\n"
        f"evaluations: {', '.join(evaluations)}\n"
        "`glpretrain VERB --help` says more, `glpretrain pretrain RECIPE --help` what a recipe sets, `glpretrain --version` the version.\n"
        "--import MODULE, in any verb, lets recipes and backbones name the classes of a module of yours.\n"
        f"`glpretrain {_COMPLETION}=bash` prints a script that completes verbs and options (also zsh, fish, tcsh).\n"
        f"{_TRACEBACK}=1 shows where an error came from.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        arguments: `sys.argv[1:]` when left out.

    Returns:
        Exit status: 0; 1 where an evaluator was refused and its scores are missing; 2 after a mistake that one line on stderr has named;
        75 after a signal, where the same command goes on with the run; 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if arguments[0] == "--version":
        print(f"glpretrain {__version__}")
        return 0
    try:
        return _run(arguments[0], arguments[1:])
    except (ValueError, OSError, ImportError, argparse.ArgumentError) as error:  # an optional reader that is not installed is the third
        if os.environ.get(_TRACEBACK):
            raise
        print(f"glpretrain: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("glpretrain: stopped", file=sys.stderr)
        return 130
    except Exception as error:  # the traceback is shown; all that is added is what to do with it
        if (status := getattr(error, "exit_status", None)) is not None:  # a run that a signal ended; its class is not imported here
            print(f"glpretrain: {one_line(error)}", file=sys.stderr)
            return status
        if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error):  # torch's, or Python's
            print(f"glpretrain: error: out of memory ({one_line(error)}); give a smaller batch or smaller items", file=sys.stderr)
            return 2
        error.add_note(_report())
        raise


def _report() -> str:
    return (
        f"glpretrain {__version__}, Python {sys.version.split()[0]}: this is a fault of glpretrain, not of your command. Please report it"
        " where you have glpretrain from, with the command and all lines from `Traceback` on."
    )


def _run(verb: str, arguments: Sequence[str]) -> int:
    from glpretrain.cli.parsing import REST, completion, meant, parse_verb
    from glpretrain.cli.trust import take_imports
    from glpretrain.core.imports import imported

    option, _, shell = verb.partition("=")
    if option == _COMPLETION:
        print(completion({name: imported(one.function) for name, one in VERBS.items()}, shell=shell or "".join(arguments[:1])))
        return 0
    if verb not in VERBS:
        raise ValueError(f"there is no verb {verb!r}{meant(verb, VERBS)}")
    function = imported(VERBS[verb].function)
    if verb == "pretrain" and {"-h", "--help"} & {*arguments} and not (named := take_imports(arguments))[0].startswith("-"):
        from glpretrain.cli.recipe_help import recipe_help

        print(recipe_help(named[0], verb=function), end="")
        return 0
    if verb == "fit":
        result = function(arguments)
    else:  # a verb with arguments that it hands on imports the modules itself
        own = arguments if REST in inspect.signature(function).parameters else take_imports(arguments)
        result = function(**parse_verb(function, own, verb=verb))
    return result if isinstance(result, int) else 0


def one_line(error: BaseException) -> str:
    """What went wrong, without what a worker process or the parser of a recipe wraps around it."""
    if str(error).startswith("Does not validate against any") and error.__cause__ is not None:
        return one_line(error.__cause__)  # the parser repeats the whole value around the reason
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") or line.startswith("Original Traceback") for line in lines):
        lines = lines[-1:]  # a DataLoader's worker sends its whole traceback as the message
    return " ".join(lines) or type(error).__name__
