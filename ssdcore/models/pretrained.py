"""Weights for a backbone from torchvision, by name, or from a file."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHT_FILES = {".pth", ".pt", ".safetensors"}


def backbone_state(architecture: str, weights: str | Path | object) -> dict[str, Tensor]:
    """Return the state dict of a torchvision classifier.

    Args:
        architecture: torchvision's name of the classifier, such as "resnet50".
        weights: a member of the architecture's weights enum; its name, such as "DEFAULT" or "IMAGENET1K_V1", which
            torchvision downloads once; or the path of a state dict, a .pth, .pt or .safetensors file.

    Raises:
        ValueError: `weights` is neither the name of weights nor a readable file.
    """
    from torchvision.models import get_model_weights

    if isinstance(weights, (str, Path)):
        path = Path(weights)
        if path.suffix in WEIGHT_FILES:
            return read_state(path)
        members = get_model_weights(architecture).__members__
        if str(weights) not in members:
            raise ValueError(
                f"weights_backbone must be {', '.join(members)} or the path of a {', '.join(sorted(WEIGHT_FILES))} "
                f"file, got {str(weights)!r}"
            )
        weights = members[str(weights)]
    state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)  # type: ignore[attr-defined]
    return state


def read_safely(path: Path) -> Any:
    """Read a .safetensors file, or what `torch.save` wrote, without running code that the file may contain.

    Raises:
        ValueError: the file does not exist, is damaged, or holds other objects than tensors and plain Python values.
    """
    if not path.is_file():
        raise ValueError(f"no weights at {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # torchvision's scripts save the arguments of the command line beside the weights.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever the reader happens to meet
        raise ValueError(f"{path} is not a file of weights that can be read safely: {error}") from error


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file, without running code that the file may contain.

    Raises:
        ValueError: the file does not exist, is damaged, or holds something else.
    """
    state = read_safely(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state dict, tensors by name, got {type(state).__name__}")
    return state
