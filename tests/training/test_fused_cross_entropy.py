"""The fused cross-entropy equals the chunked one, and is refused where it cannot run.

Its kernels run in Triton's interpreter, in a process of its own (fused_in_interpreter.py); on a machine with a GPU, compiled on that.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import fused_in_interpreter as cases
import pytest
import torch

from glpretrain.encoders import ViT
from glpretrain.training import fused_cross_entropy
from glpretrain.training.branch import Branch
from glpretrain.training.checks import require_device
from glpretrain.training.heads import PixelHead
from glpretrain.training.optim import Optimization
from glpretrain.training.prototypes import Prototypes

QUICK = ("views, several blocks in a part",)
HALF = {"half inputs": 2**-8, "half products, bfloat16": 0.01, "half products, float16": 0.001}  # bounds on the gradients
OTHERS = ("not finite", "no rows", "memory")
FULL = [name for name in cases.CASES if name not in (*QUICK, *HALF, *OTHERS)]
GPU = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this machine")


@pytest.fixture(scope="module")
def results() -> Callable[[Sequence[str]], dict[str, list]]:
    """Results of several cases, by name."""

    @cache
    def run(names: tuple[str, ...]) -> dict[str, list]:
        command = [sys.executable, "-W", "ignore", cases.__file__, "--device", "cuda" if GPU else "cpu", *names]
        environment = os.environ | ({} if GPU else {"TRITON_INTERPRET": "1"})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def assert_small(found: list[float], *, loss: float = 1e-5, gradients: float = 1e-5) -> None:
    assert len(found) >= 2 and found[0] <= loss, found
    assert all(one <= gradients for one in found[1:]), found


@needs_triton
@pytest.mark.parametrize("name", QUICK)
def test_values_and_gradients_are_those_of_the_chunked_form(name: str, results: Callable) -> None:
    assert_small(results(QUICK)[name])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_values_and_gradients_are_those_of_the_chunked_form_in_every_case(name: str, results: Callable) -> None:
    assert_small(results(())[name])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_half_precision_costs_gradients_its_rounding_and_the_loss_nothing(name: str, results: Callable) -> None:
    found = results(())[name]
    assert_small(found, gradients=HALF[name])
    assert max(found[1:]) > 1e-5, "nothing was rounded"


@needs_triton
@pytest.mark.slow
def test_a_row_that_is_not_finite_gives_a_loss_that_is_not_finite(results: Callable) -> None:
    assert results(())["not finite"] == [True, False, True]


@needs_triton
@pytest.mark.slow
def test_no_row_gives_a_loss_and_a_gradient_of_zero(results: Callable) -> None:
    assert results(())["no rows"] == [0.0] * (cases.B + 1)


@needs_triton
@pytest.mark.slow
def test_logits_are_nowhere(results: Callable) -> None:
    largest, logits = results(())["memory"]
    assert largest < logits / 4


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "low"), [("_attend", "float32"), ("_gather", "bfloat16")])
def test_the_kernels_compile_for_a_gpu_and_fit_into_its_fast_memory(kernel: str, low: str) -> None:
    """Without a GPU: to machine code of compute capability 9.0, with the 99 kB that all capabilities from 8.0 on have."""
    script = f"""
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from glpretrain.training import prototype_kernels as kernels
block, width = kernels._blocks(256)
fixed = dict(SHIFTED=True, BLOCK=block, BLOCK_WIDTH=width, LOW=tl.{low}, FULL=kernels._FULL, INTERPRETED=False)
if {kernel!r} == "_gather":
    fixed["SUBTRACT"] = True
pointers = ("rows", "directions", "scale", "shift", "values", "factor", "totals", "means", "given", "gathered")
function = kernels.{kernel}
signature = {{name: "constexpr" if name in fixed else "*fp32" if name in pointers else "i32" for name in function.arg_names}}
source = triton.compiler.ASTSource(function, signature, fixed)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_stages=kernels._STAGES)).metadata.shared)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= 99 * 1024


@pytest.mark.parametrize("triton", [True, False])
def test_what_the_kernels_lack_is_one_line(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = importlib.util.find_spec("torch") if triton else None
    monkeypatch.setattr(fused_cross_entropy.importlib.util, "find_spec", lambda name: found)
    reason = "this run is on cpu; it needs a CUDA GPU" if triton else "the package triton is not installed"
    with pytest.raises(ValueError, match=f"^optimization: cross_entropy='fused' given, but {reason}[^\n]*; leave it out[^\n]*$"):
        require_device(Optimization(cross_entropy="fused"), torch.device("cpu"))
    require_device(Optimization(), torch.device("cpu"))
    if triton:
        require_device(Optimization(cross_entropy="fused"), torch.device("cuda"))


def test_a_loss_that_asks_for_kernels_is_never_computed_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    head = Prototypes(4, num_prototypes=7)
    branch = Branch(ViT("vit_tiny_patch16_224", img_size=16, depth=1), {"cls": torch.nn.Sequential(torch.nn.Identity(), head)})
    branch.set_cross_entropy("fused")
    logits = head(torch.ones(2, 3, 4))
    assert logits.cross_entropy == "fused" and logits.flatten(0, 1).detach().cross_entropy == "fused"
    with pytest.raises(ValueError, match="cross_entropy='fused' given"):
        cases.ViewDistillation(num_prototypes=7)(student_logits=logits, teacher_logits=logits, teacher_temp=0.04)
    branch.set_cross_entropy("chunked")
    assert head(torch.ones(2, 3, 4)).cross_entropy == "chunked"


@pytest.mark.parametrize(
    ("head", "words"),
    [(PixelHead(192, patch_dim=3), "have no prototypes"), (Prototypes(513, num_prototypes=2), "are 513 wide")],
)
def test_heads_that_would_not_use_the_kernels_are_refused(head: torch.nn.Module, words: str) -> None:
    branch = Branch(ViT("vit_tiny_patch16_224", img_size=16, depth=1), {"head": head})
    with pytest.raises(ValueError, match=f"cross_entropy='fused' given, but the heads {words}; it needs prototypes of at most 512 numbers"):
        branch.set_cross_entropy("fused")
    branch.set_cross_entropy("chunked")


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="optimization: cross_entropy='fast' given; accepted: chunked, fused"):
        Optimization(cross_entropy="fast")  # type: ignore[arg-type]


def test_the_script_is_the_one_of_this_folder() -> None:
    assert Path(cases.__file__).parent == Path(__file__).parent and not set(QUICK) & set(FULL) and len(FULL) > 5
