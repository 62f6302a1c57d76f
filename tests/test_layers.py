"""Which file may import which, read off the source; and what importing the package costs and needs."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THIRD_PARTY = {"torch", "triton", "numpy", "hypothesis", "torchvision", "pycocotools"}
SUBJECTS = ("boxes", "matching", "multibox", "nms", "postprocess")

# Shared host code of kernels/, lowest layer first: a file may import those before it.
SHARED = ("rules", "checks", "sorting", "levels", "registry")
DEVICE = {f"ssdcore.kernels.device.{name}" for name in ("arithmetic", "boxmath", "constant", "head", "selection")}
# An op that is built from another op uses the eager code of that op, never its kernels.
EAGER_USES = {
    "multibox": {"ssdcore.kernels.boxes.eager"},
    "nms": {"ssdcore.kernels.nms.overlaps"},
    "postprocess": {"ssdcore.kernels.boxes.eager", "ssdcore.kernels.nms.eager"},
}
TESTING = {
    "__init__": set(),
    "reference": {"numpy"},
    "close": {"numpy", "torch"},
    "strategies": {"numpy", "hypothesis", "ssdcore.testing.reference"},
    "conformance": {
        "numpy",
        "hypothesis",
        "torch",
        "ssdcore.testing.close",
        "ssdcore.testing.reference",
        "ssdcore.testing.strategies",
    },
}


def shared(*names: str) -> set[str]:
    return {f"ssdcore.kernels.{name}" for name in names}


def allowed_imports(file: str) -> set[str]:
    """What a file of kernels/ or ssdcore/testing/ may import besides the standard library."""
    folder, _, name = file.removesuffix(".py").rpartition("/")
    subject = folder.removeprefix("kernels/")
    if folder == "ssdcore/testing":
        return TESTING[name]
    if file == "kernels/__init__.py":
        return shared(*(f"{subject}.op" for subject in SUBJECTS))
    if folder == "kernels":
        return {"torch", "numpy", *shared(*SHARED[: SHARED.index(name)])}
    if name == "__init__":
        return set()
    if subject == "device":
        return {"torch", "triton", *DEVICE, *shared("rules", "levels")}
    if name == "eager":
        return {"torch", "numpy", *shared("rules", "sorting", "levels"), *EAGER_USES.get(subject, set())}
    if file == "kernels/nms/overlaps.py":
        return {"numpy", *shared("sorting")}
    if name == "triton":
        return {"torch", "triton", *DEVICE, *shared("rules", "levels")}
    assert name == "op" and subject in SUBJECTS, f"{file} has no place in the layout"
    return {"torch", *shared(*SHARED, f"{subject}.eager", f"{subject}.triton")}


def imported_modules(file: Path) -> set[str]:
    """Modules that `file` imports, the standard library left out."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            # `from package import module` imports the module.
            found |= {
                f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module for alias in node.names
            }
    tops = {name: name.split(".")[0] for name in found}
    return {top if top in THIRD_PARTY else name for name, top in tops.items() if top not in sys.stdlib_module_names}


def is_module(name: str) -> bool:
    """Whether `name` is a file of this project."""
    folder = name.replace("ssdcore.kernels.", "kernels.", 1).replace(".", "/")
    return (ROOT / f"{folder}.py").is_file()


def sources(folder: str) -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", sources("kernels") + sources("ssdcore/testing"))
def test_imports_point_downwards(file: str) -> None:
    assert imported_modules(ROOT / file) <= allowed_imports(file)


def test_kernels_are_imported_on_first_use() -> None:
    for subject in SUBJECTS:
        for node in ast.parse((ROOT / f"kernels/{subject}/op.py").read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "triton" not in ast.unparse(node)


@pytest.mark.parametrize("file", sources("ssdcore"))
def test_the_detector_uses_public_ops_only(file: str) -> None:
    assert {name for name in imported_modules(ROOT / file) if name.startswith("ssdcore.kernels")} <= {"ssdcore.kernels"}


@pytest.mark.parametrize("file", sources("perf"))
def test_the_benchmark_uses_public_ops(file: str) -> None:
    allowed = {
        "perf/ssdperf/eager.py": shared(*(f"{subject}.eager" for subject in SUBJECTS)),
        "perf/ssdperf/launches.py": shared(*(f"{subject}.triton" for subject in SUBJECTS)),  # for the compile report
    }
    names = {name for name in imported_modules(ROOT / file) if name.startswith("ssdcore.kernels")}
    assert names <= {"ssdcore.kernels", *allowed.get(file, set())}


def test_one_file_of_kernels_reads_the_environment() -> None:
    for file in sources("kernels"):
        text = (ROOT / file).read_text()
        assert not re.search("environ|getenv", text) or file == "kernels/registry.py"
        assert "autotune" not in text


def python(code: str, *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=inherited | environment)


def test_importing_ssdcore_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, ssdcore; print(sorted({'torch', 'triton', 'numpy', 'torchvision'} & set(sys.modules)))"
    assert python(code, cwd=tmp_path).stdout.strip() == "[]"


# As on a machine without Triton and without the extras.
WITHOUT_EXTRAS = """
import sys
for name in ("triton", "torchvision", "pycocotools", "PIL", "typer", "hypothesis", "matplotlib", "safetensors"):
    sys.modules[name] = None
import torch
from ssdcore.kernels import nms
print(nms(torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]]), torch.tensor([0.1, 0.2]), 0.5).tolist())
"""


def test_the_ops_need_torch_and_numpy_alone(tmp_path: Path) -> None:
    result = python(WITHOUT_EXTRAS, cwd=tmp_path)
    assert result.stdout.strip() == "[1]", result.stderr


def test_without_triton_a_kernel_says_what_is_missing(tmp_path: Path) -> None:
    result = python(WITHOUT_EXTRAS, cwd=tmp_path, TRITON_INTERPRET="1")
    assert "RuntimeError: ssdcore::nms needs Triton to run on this device" in result.stderr


def test_kernels_has_one_name_only() -> None:
    # From the root of the repository `kernels` can be imported, and would register every op a second time.
    result = python("import kernels", cwd=ROOT)
    assert "import this package as ssdcore.kernels" in result.stderr
