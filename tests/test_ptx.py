"""The kernels as compiled for an H100: an executor of PTX on the CPU runs them, if one lies in ../shared/tools/ptx_cpu.

It compares them with eager code, and finds what the interpreter hides: missing barriers and masks, accesses out of
bounds or to memory that nobody wrote, programs that wait for each other forever.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
EXECUTOR = ROOT.parent / "shared/tools/ptx_cpu/check.py"
TIMEOUT = 600  # seconds: the slowest case takes 30 where nothing else runs


class Case(NamedTuple):
    ops: list[str]  # as the executor calls them
    problems: str  # part of the problems' names
    order: str  # "lockstep": thousands of threads at once; "programs", "warps": these take turns, at random
    kernels: set[str]  # what has to be launched


# Few problems, in which every kernel of the project is launched.
CASES = [
    Case(
        ["iou", "codec", "match"],
        "torch.bfloat16",
        "lockstep",
        {
            "_box_iou_kernel",
            "_encode_boxes_kernel",
            "_decode_boxes_kernel",
            "_decode_boxes_backward_kernel",
            "_match_kernel",
            "_claim_kernel",
        },
    ),
    Case(
        ["loss", "post"],
        "C=21 torch.bfloat16",
        "programs",
        {
            "_row_loss_kernel",
            "_mine_kernel",
            "_reduce_kernel",
            "_backward_kernel",
            "_row_kernel",
            "_gather_kernel",
            "_class_kernel",
            "_rest_kernel",
        },
    ),
    Case(["nms"], "chain N=300", "warps", {"_settle_kernel", "_collect_kernel"}),  # blocks of a chain wait for others
]


def test_the_cases_cover_every_kernel() -> None:
    files = (ROOT / "kernels").glob("*/triton.py")
    defined = {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    assert defined == set().union(*(case.kernels for case in CASES))


@pytest.mark.skipif(not EXECUTOR.exists(), reason="needs an executor of PTX in ../shared/tools/ptx_cpu")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.ops))
def test_compiled_kernels_give_the_results_of_eager_code(case: Case, tmp_path: Path) -> None:
    # A package of this tree's files, wherever the installed ssdcore comes from.
    package = tmp_path / "ssdcore"
    package.mkdir()
    for file in [*(ROOT / "ssdcore").iterdir(), ROOT / "kernels"]:
        (package / file.name).symlink_to(file)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), environment.get("PYTHONPATH")]))
    command = [sys.executable, str(EXECUTOR), "--ops", *case.ops, "--only", case.problems, "--order", case.order]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stdout + result.stderr
    *_, summary = result.stdout.splitlines()
    assert case.kernels <= set(re.findall(r"\w+_kernel", summary)), summary
