"""The kernels compile for GPUs that are not here, without spilling registers: all that a CPU can say of GPU code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    output = tmp_path_factory.mktemp("compile") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "perf/compile_report.py"), "--json", str(output)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert output.exists(), result.stderr
    loaded: list[dict[str, object]] = json.loads(output.read_text())
    return loaded


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_no_kernel_spills(rows: list[dict[str, object]], architecture: str) -> None:
    compiled = [row for row in rows if row["arch"] == architecture]
    assert len(compiled) > 20
    assert [row for row in compiled if row["spilled"]] == []


def test_every_kernel_is_compiled(rows: list[dict[str, object]]) -> None:
    defined = set()
    for file in (ROOT / "kernels").glob("triton_*.py"):
        defined |= set(re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE))
    assert {row["kernel"] for row in rows} == defined


def test_every_launch_keeps_ieee_order() -> None:
    # Fused multiply-adds would round differently, and Triton's default for them differs from version to version.
    for file in (ROOT / "kernels").glob("triton_*.py"):
        text = file.read_text()
        assert text.count("num_warps=") == text.count("enable_fp_fusion=False"), file.name
