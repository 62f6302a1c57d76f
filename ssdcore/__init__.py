"""Exact, batched object-detection ops (`ssdcore.kernels`), and a thin SSD detector that uses them."""

from importlib import import_module
from importlib.metadata import version

__version__ = version("ssdcore")

# Public name -> module. Modules are imported on first use, so that `import ssdcore` is fast and needs no extra.
_LAZY = {
    "AnchorConfig": "ssdcore.anchors",
    "make_anchors": "ssdcore.anchors",
    "MultiBoxLoss": "ssdcore.criterion",
    "MODELS": "ssdcore.models",
    "SSD": "ssdcore.models",
    "ssd300_resnet50": "ssdcore.models",
    "ssd300_tiny": "ssdcore.models",
    "ssd300_vgg16": "ssdcore.models",
    "ssd512_vgg16": "ssdcore.models",
    "load_model": "ssdcore.weights",
    "save_weights": "ssdcore.weights",
    "accelerate": "ssdcore.torchvision_patch",
    "restore": "ssdcore.torchvision_patch",
    "torchvision_ops": "ssdcore.torchvision_functions",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'ssdcore' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
