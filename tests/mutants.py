"""Mutation testing: a developer's tool that asks whether the tests notice wrong wiring.

    python tests/mutants.py                  every mutant of mutants.toml
    python tests/mutants.py --only dino      those with "dino" in their name

A mutant is one small change of the package that makes it wrong: the teacher's momentum points the other way, a loss gets the wrong
view. `mutants.toml` lists them: a name, a file of the package, a text that occurs there exactly once, and the text that replaces it.
Its table `[tests]` says which tests ought to notice a change of a file, the quickest first; a mutant may name others in `tests`.

Each mutant is tried in a process of its own, forked from this one after the large libraries were imported. The process copies the
package into a temporary folder, replaces the text there, puts the folder first on the path (also of processes that a test starts),
and runs the tests until the first one fails. A mutant is killed when a test fails, and survives when all pass; one that cannot even
be imported proves nothing and is reported as broken, which makes this script fail. Before the mutants, all their tests must pass on
the unchanged package.

Left out: finding mutants by machine. A mutant of which nobody can say why it is wrong teaches nothing when it survives.
"""

import argparse
import compileall
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "glpretrain"
_SECONDS = 900  # after which a mutant that makes a test wait for ever counts as killed
_ITEMS = "test_the_terms_of_an_item_are_its_own"
_CONTRACT = (
    _ITEMS,
    "test_terms_gradients_and_overfitting",
    "test_two_micro_batches_are_one_step",
    "test_export_gives_the_features_of_the_trained_backbone",
    "test_resume_goes_on_with_the_same_losses",
)
_SEVERAL = {"contract": _CONTRACT, "items": (_ITEMS,)}
_VERDICTS = {0: "survived", 1: "killed"}  # by the exit status of pytest


class Mutant(NamedTuple):
    """One change that some test ought to notice."""

    name: str
    file: str  # below the package
    old: str  # occurs in the file exactly once
    new: str
    tests: tuple[str, ...]  # arguments of pytest, relative to the root of the repository


def load_mutants() -> list[Mutant]:
    """Those of mutants.toml."""
    listed = tomllib.loads((Path(__file__).parent / "mutants.toml").read_text())
    tests: dict[str, list[str]] = listed["tests"]
    return [
        Mutant(entry["name"], entry["file"], entry["old"], entry["new"], _spelt_out(entry.get("tests") or tests[entry["file"]]))
        for entry in listed["mutant"]
    ]


def _spelt_out(tests: Sequence[str]) -> tuple[str, ...]:
    """With the contract's tests of a recipe in place of `contract:NAME`, and one of them in place of `items:NAME`."""
    arguments: list[str] = []
    for test in tests:
        several, _, recipe = test.partition(":")
        names = _SEVERAL.get(several, ())
        arguments += [f"tests/methods/test_contract.py::{name}[{recipe}]" for name in names] or [test]
    return tuple(dict.fromkeys(arguments))


def try_in_a_fork(mutant: Mutant | None, tests: Sequence[str], *, seconds: int = _SECONDS) -> tuple[str, str]:
    """Run tests on the package with one change, or with none.

    Returns:
        The verdict, and the last line that pytest wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = os.fork()
        if process == 0:
            _run_and_exit(mutant, tests, folder=Path(folder), log=log)
        end, status = time.monotonic() + seconds, None
        try:
            while status is None and time.monotonic() < end:
                time.sleep(0.05)
                finished, waited = os.waitpid(process, os.WNOHANG)
                status = os.waitstatus_to_exitcode(waited) if finished else None
        finally:
            if status is None:  # too slow, or this script was interrupted
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
        if status is None:
            return "killed", f"ran for more than {seconds} seconds"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return _VERDICTS.get(status, "broken"), (failed or lines or [""])[-1]


def _run_and_exit(mutant: Mutant | None, tests: Sequence[str], *, folder: Path, log: Path) -> None:
    """The child's part; it never returns."""
    status = 3
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        shutil.copytree(PACKAGE, folder / "glpretrain")
        (folder / "recipes").symlink_to(ROOT / "recipes")
        if mutant is not None:
            path = folder / "glpretrain" / mutant.file
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        sys.path.insert(0, str(folder))
        # Also before the working folder, where `python -m` would look first.
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
        os.chdir(ROOT)
        import glpretrain  # the copy

        assert glpretrain.__file__ == str(folder / "glpretrain" / "__init__.py"), glpretrain.__file__
        import pytest

        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants that were asked for, and print what became of each."""
    parser = argparse.ArgumentParser(prog="python tests/mutants.py")
    parser.add_argument("--only", metavar="NAME", default="", help="mutants with this in their name")
    given = parser.parse_args(arguments)
    chosen = [mutant for mutant in load_mutants() if given.only in mutant.name]
    if not chosen:
        print(f"no mutant has {given.only!r} in its name")
        return 2
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    _import_libraries()
    compileall.compile_dir(PACKAGE, quiet=1)  # once, and not again in every child; tests are compiled by the first child
    sys.dont_write_bytecode = False
    gc.freeze()  # or every child looks through all that the libraries hold
    verdict, last = try_in_a_fork(None, [*dict.fromkeys(test for mutant in chosen for test in mutant.tests)], seconds=10 * _SECONDS)
    print(f"without a change: {last}", flush=True)
    if verdict != "survived":
        return 1
    found: Counter[str] = Counter()
    for mutant in chosen:
        start = time.monotonic()
        verdict, last = try_in_a_fork(mutant, mutant.tests)
        found[verdict] += 1
        print(f"{verdict:8}  {time.monotonic() - start:5.1f} s  {mutant.file}: {mutant.name}  [{last}]", flush=True)
    print(f"{found['killed']} of {len(chosen)} killed ({100 * found['killed'] / len(chosen):.0f} %), {found['broken']} broken")
    return 1 if found["broken"] else 0


def _import_libraries() -> None:
    """Once for all children; nothing of ours, which each child imports from its own copy."""
    import hypothesis  # noqa: F401
    import jsonargparse  # noqa: F401
    import kornia  # noqa: F401
    import pytest  # noqa: F401
    import pytorch_lightning.cli  # noqa: F401
    import skimage.color
    import skimage.morphology  # noqa: F401
    import sklearn.cluster
    import sklearn.linear_model
    import sklearn.pipeline
    import sklearn.svm  # noqa: F401
    import timm  # noqa: F401
    import torch
    import wandb  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
