"""What a time depends on besides the code: the machine, its clocks as found, and the versions."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
QUERY = {  # nvidia-smi's names
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
    """Of the machine and the software.

    Outside a repository, as where the code was copied to, `commit` is what SSDCORE_COMMIT in the environment says.
    """
    status = _git("status", "--porcelain", "--", "kernels", "ssdcore", "perf/*.py")
    machine = _gpu() if device == "cuda" else {"device": _cpu_name(), "threads": torch.get_num_threads()}
    return {
        **machine,
        "kind": device,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "torchvision", "numpy", "conch-triton-kernels")},
        "cuda": torch.version.cuda,
        "commit": _git("rev-parse", "HEAD") or os.environ.get("SSDCORE_COMMIT"),
        "modified": None
        if status is None
        else bool(status),  # the code is not that of the commit; None where nobody can tell
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _gpu() -> dict[str, Any]:
    """The name tells a MIG slice: "NVIDIA A100-SXM4-40GB MIG 1g.5gb"."""
    properties = torch.cuda.get_device_properties()
    found = {
        "device": torch.cuda.get_device_name(),
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "tf32": torch.backends.cudnn.allow_tf32,  # in convolutions of fp32
    }
    index = "{:08x}:{:02x}:{:02x}.0".format(
        *(getattr(properties, name, 0) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id"))
    )
    query = ("nvidia-smi", "-i", index, f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader")
    # Busy while asked, for an idle GPU lowers its clocks.
    busy = torch.ones(2**26, device="cuda")
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(_output, *query)
        while not answer.done():
            busy.mul_(1)
            torch.cuda.synchronize()
    values = (answer.result() or "").split(", ")
    return found | (dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else {})


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(ROOT), *arguments)


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
