"""What a measurement depends on besides the problem: the machine, its clocks as found, the versions and the code.

Functions that need torch import it themselves, because the import takes seconds and most facts do not need it.
"""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "torchvision", "numpy", "conch-triton-kernels")
QUERY = {  # names of nvidia-smi
    "driver": "driver_version",
    "clock_sm": "clocks.sm",
    "clock_sm_max": "clocks.max.sm",
    "clock_memory": "clocks.mem",
    "clock_memory_max": "clocks.max.mem",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
    "mig_mode": "mig.mode.current",
}


def facts(device: str) -> dict[str, Any]:
    """Return what is known about the machine and the software.

    `commit` is git's, or, where the code was copied without its history, what SSDCORE_COMMIT in the environment says.
    `modified` tells whether the code differs from the commit; it is None where nobody can tell.
    """
    import torch

    status = _git("status", "--porcelain", "--", "kernels", "ssdcore", "perf/*.py")
    machine = _gpu() if device == "cuda" else {"device": cpu_name(), "threads": torch.get_num_threads()}
    return {
        **machine,
        "kind": device,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "commit": commit(),
        "code": code_digest("kernels", "ssdcore", "perf"),
        "modified": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def identity(device: str, *folders: str) -> dict[str, Any]:
    """Return what must be equal for a result to count again: the device, the versions, the code in `folders`."""
    versions = {name: version(name) for name in ("torch", "triton")}
    return {"device": device_name(device), **versions, "code": code_digest(*folders)}


def device_name(device: str) -> str:
    """Return the name of the GPU or CPU. A MIG slice is part of the name: "NVIDIA A100-SXM4-40GB MIG 1g.5gb"."""
    if device == "cpu":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name()


def file_stem(name: str) -> str:
    """Return a device's name as a file name: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def commit() -> str | None:
    return _git("rev-parse", "HEAD") or os.environ.get("SSDCORE_COMMIT")


def code_digest(*folders: str) -> str:
    """Return a hash of the Python files in folders of the repository.

    It tells whether two measurements are of the same code, also where git's history was not copied along.
    """
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties()
    found = {
        "device": device_name("cuda"),
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "tf32": torch.backends.cudnn.allow_tf32,  # in fp32 convolutions
    }
    index = "{:08x}:{:02x}:{:02x}.0".format(
        *(getattr(properties, name, 0) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id"))
    )
    query = ("nvidia-smi", "-i", index, f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader")
    # Keep the GPU busy while asking, because an idle GPU lowers its clocks.
    busy = torch.ones(2**26, device="cuda")
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(_output, *query)
        while not answer.done():
            busy.mul_(1)
            torch.cuda.synchronize()
    values = (answer.result() or "").split(", ")
    return found | (dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else {})


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(ROOT), *arguments)


def _output(*command: str) -> str | None:
    """Return what a command prints, or None if it fails or is not there."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
