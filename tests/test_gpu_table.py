"""The measurements of a GPU in small on a CPU, so that the script keeps up with the package."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_table
import pytest
import torch

_FUSED = """
import json, torch, gpu_table
work = gpu_table.SMALL._replace(prototypes=40, rows=10)
print(json.dumps([row._asdict() for row in gpu_table.prototype_rows(work, device=torch.device("cpu"))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this machine")
def test_the_fused_cross_entropy_is_measured_where_its_kernels_run() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FUSED],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {row["name"].rpartition("prototypes, ")[2]: row["value"] for row in json.loads(done.stdout)}
    assert list(found)[1:] == ["fused, memory against chunks", "fused, speed against chunks", "fused, difference from chunks"]
    assert all(value > 0 for name, value in found.items() if "difference" not in name)
    assert found["fused, difference from chunks"] < 1e-5


@pytest.mark.slow
def test_everything_is_measured_and_written(tmp_path: Path) -> None:
    rows = gpu_table.main(["--out", str(tmp_path), "--small"])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["small"] and [row["name"] for row in written["rows"]] == [row.name for row in rows]
    found = {row.name: row for row in rows}
    assert len(found) == len(rows) == 7 * len(gpu_table.SMALL.models) + (4 if torch.cuda.is_available() else 1) + len(gpu_table.RECIPES)
    assert all(row.value > 0 for row in rows if "CPU's" not in row.name and "difference" not in row.name)
    if not torch.cuda.is_available():
        assert all(row.value == 0 for row in rows if "CPU's" in row.name)
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"| {row.name} |" in text for row in rows)


def test_what_is_wanted_is_asked_of_a_gpu_only() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert gpu_table.wanted_row("speed", 1.2, "x", least=1.3, device=cpu).reached is None
    assert gpu_table.wanted_row("speed", 1.2, "x", least=1.3, device=gpu).reached is False
    assert gpu_table.wanted_row("memory", 0.7, "x", most=0.75, device=gpu).reached is True
    assert gpu_table.wanted_row("time", 0.7, "s", device=gpu)[3:] == ("", None)


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_table.main(["--out", str(tmp_path)])
    assert "there is no GPU here; accepted: a machine with one, or --small" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
