"""Who may import whom, read off the source; and what importing the package costs and needs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THIRD_PARTY = {"torch", "triton", "numpy", "hypothesis", "torchvision", "pycocotools"}

DEVICE_CODE = {"ssdcore.kernels.boxmath", "ssdcore.kernels.head", "ssdcore.kernels.selection"}
# Besides the standard library, what each file of kernels/ and ssdcore/testing/ may import.
ALLOWED = {
    "kernels/__init__.py": {"ssdcore.kernels.functional"},
    "kernels/functional.py": {"torch", "ssdcore.kernels"},  # ops
    "kernels/ops.py": {"torch", "ssdcore.kernels"},  # eager; triton_* on first use
    "kernels/eager.py": {"torch", "numpy"},
    "kernels/boxmath.py": {"triton"},
    "kernels/selection.py": {"triton"},
    # The launchers' part of it knows the layouts.
    "kernels/head.py": {"torch", "triton", "ssdcore.kernels.boxmath", "ssdcore.kernels.eager"},
    "ssdcore/testing/__init__.py": set(),
    "ssdcore/testing/reference.py": {"numpy"},
    "ssdcore/testing/close.py": {"numpy", "torch"},
    "ssdcore/testing/strategies.py": {"numpy", "hypothesis", "ssdcore.testing.reference"},
    "ssdcore/testing/conformance.py": {
        "numpy",
        "hypothesis",
        "torch",
        "ssdcore.testing",
        "ssdcore.testing.close",
    },
}
# `eager` for its constants and the meaning of a score; one launcher may use another's device code.
KERNEL_FILE = {"torch", "triton", "ssdcore.kernels.eager", *DEVICE_CODE}
SHARED_DEVICE_CODE = {
    "kernels/triton_postprocess.py": {"ssdcore.kernels.triton_nms"},
}


def imports(file: Path) -> set[str]:
    """Modules that `file` imports, the standard library left out."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
    tops = {name: name.split(".")[0] for name in found}
    return {top if top in THIRD_PARTY else name for name, top in tops.items() if top not in sys.stdlib_module_names}


def sources(folder: str) -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for file in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("file", sources("kernels") + sources("ssdcore/testing"))
def test_imports_point_one_way(file: str) -> None:
    if file.startswith("kernels/triton_"):
        allowed = KERNEL_FILE | SHARED_DEVICE_CODE.get(file, set())
    else:
        allowed = ALLOWED[file]
    assert imports(ROOT / file) <= allowed


@pytest.mark.parametrize("file", sources("ssdcore") + sources("perf"))
def test_the_detector_sees_public_ops_only(file: str) -> None:
    names = {name for name in imports(ROOT / file) if name.startswith("ssdcore.kernels")}
    if file == "perf/compile_report.py":  # compiles the launchers themselves
        names = {name for name in names if not name.startswith("ssdcore.kernels.triton_")}
    allowed = {"ssdcore.kernels"} | ({"ssdcore.kernels.eager"} if file.startswith("perf") else set())
    assert names <= allowed


def test_a_kernel_file_looks_at_no_environment() -> None:
    for file in sources("kernels"):
        text = (ROOT / file).read_text()
        assert "environ" not in text or file == "kernels/ops.py"
        assert "autotune" not in text


def python(code: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)


def test_importing_ssdcore_is_light(tmp_path: Path) -> None:
    code = "import sys, ssdcore; print(sorted({'torch', 'triton', 'numpy', 'torchvision'} & set(sys.modules)))"
    assert python(code, cwd=tmp_path).stdout.strip() == "[]"


def test_the_ops_need_torch_and_numpy_alone(tmp_path: Path) -> None:
    # As on a machine without Triton and without the extras.
    code = """
import sys
for name in ("triton", "torchvision", "pycocotools", "PIL", "typer", "hypothesis", "matplotlib", "safetensors"):
    sys.modules[name] = None
import torch
from ssdcore.kernels import nms
print(nms(torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]]), torch.tensor([0.1, 0.2]), 0.5).tolist())
"""
    result = python(code, cwd=tmp_path)
    assert result.stdout.strip() == "[1]", result.stderr


def test_kernels_has_one_name_only() -> None:
    # From the root of the repository `kernels` is importable, and would register every op a second time.
    result = python("import kernels", cwd=ROOT)
    assert "import this package as ssdcore.kernels" in result.stderr
