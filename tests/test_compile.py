"""The kernels compile for GPUs that are not here, and no kernel spills registers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssdcore.kernels.rules import EXACT

ROOT = Path(__file__).parents[1]
DEFINED = {
    name
    for file in (ROOT / "kernels").glob("*/triton.py")
    for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "perf/compile_report.py"), "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout, result.stderr
    loaded: list[dict[str, Any]] = json.loads(result.stdout)
    return loaded


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_and_none_spills(rows: list[dict[str, Any]], architecture: str) -> None:
    compiled = [row for row in rows if row["arch"] == architecture]
    assert {row["kernel"] for row in compiled if row["problem"] == "production"} == DEFINED
    assert [row for row in compiled if row["spilled"]] == []


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_instructions_are_counted_in_the_machine_code(rows: list[dict[str, Any]], architecture: str) -> None:
    # If the output of the disassembler changed, nothing would be counted. Every kernel loads and stores, and a
    # reduction needs a barrier.
    for row in rows:
        if row["arch"] == architecture:
            assert row["instructions"] > row["loads"] + row["stores"] + row["barriers"]
            assert row["loads"] > 0 and row["stores"] > 0 and row["registers"] > 0
    assert all(row["barriers"] for row in rows if row["kernel"] == "_reduce_kernel" and row["problem"] == "production")


def test_every_launch_forbids_fused_multiply_adds() -> None:
    # A fused multiply-add rounds differently, and Triton's default for it differs from version to version.
    assert EXACT == {"enable_fp_fusion": False}
    for file in (ROOT / "kernels").glob("*/triton.py"):
        text = file.read_text()
        assert text.count("num_warps=") == text.count("**EXACT") > 0, file
