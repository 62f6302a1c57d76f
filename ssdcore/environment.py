"""What a result was computed with: versions of packages, and the device."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("ssdcore", "torch", "triton", "torchvision", "pycocotools", "numpy")


def environment(device: torch.device) -> dict[str, str]:
    """Return the device, the operating system, and the versions of Python and of those `PACKAGES` that are there."""
    threads = f"{torch.get_num_threads()} threads on {platform.machine()}"
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
