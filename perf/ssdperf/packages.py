"""Which packages are not installed, and which tests need them. Looks without importing anything."""

import ast
import functools
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ssdperf.environment import ROOT

DISTRIBUTIONS = {"PIL": "Pillow"}  # names on PyPI that differ from the name of the module
OPTIONAL = {"conch"}  # imported only where it is installed
REEXPORTED = {"torch.utils.tensorboard": "tensorboard"}  # modules that import another package
# Where the sources of modules lie, the longest prefix first. Tests import helpers by their bare names.
SOURCES = {"ssdcore.kernels": "kernels", "ssdcore": "ssdcore", "ssdperf": "perf/ssdperf", "": "tests"}


def missing(modules: Iterable[str]) -> list[str]:
    """Return the names on PyPI of the top-level modules that are not installed."""
    return [DISTRIBUTIONS.get(name, name) for name in modules if find_spec(name) is None]


def needed_by(file: Path) -> set[str]:
    """Return the third-party modules that a source file imports, itself or through other files of the repository.

    Imports inside functions count too, because a test of the function runs them.
    """
    found: set[str] = set()
    files, seen = [file], {file}
    while files:
        for module in _imports(files.pop()):
            source = _source_of(module)
            if source is None:
                found.add(REEXPORTED.get(module) or module.partition(".")[0])
            elif source not in seen:
                seen.add(source)
                files.append(source)
    return found - set(sys.stdlib_module_names) - OPTIONAL


@functools.cache
def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            # A name that is imported from a package may be a module of it.
            found |= {name for alias in node.names if _source_of(name := f"{node.module}.{alias.name}")}
    return found


def _source_of(module: str) -> Path | None:
    """Return the file of the repository that defines `module`."""
    for prefix, folder in SOURCES.items():
        if prefix in ("", module) or module.startswith(f"{prefix}."):
            path = ROOT.joinpath(folder, *module.removeprefix(prefix).strip(".").split("."))
            candidates = [path.with_suffix(".py"), path / "__init__.py"]
            return next((candidate for candidate in candidates if candidate.is_file()), None)
    return None
