"""Find the tensor in which the first NaN or infinity of a training step appeared."""

from typing import Any

import torch
from torch import Tensor

from ssdcore.models import SSD


@torch.no_grad()
def first_not_finite(model: SSD, images: Tensor, autocast: Any) -> str:
    """Say which tensor is not finite, in the order in which a step computes them.

    The network runs once, whatever is found. With synchronised normalisation, each process must call this function.

    Args:
        model: in training mode, with the weights before the step; its statistics may change.
        images: [B, 3, S, S] on the model's device.
        autocast: the context in which the step ran.
    """
    # The statistics of normalisations are left out, because the step has changed them already.
    broken = [f"{name} of the model" for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if not images.isfinite().all():
        broken.insert(0, "the images")
    found: list[str] = []
    hooks = []
    for name, layer in model.named_modules():
        if not list(layer.children()):

            def look(_layer: Any, _inputs: Any, output: Any, name: str = name) -> None:
                if not found and isinstance(output, Tensor) and not output.isfinite().all():
                    found.append(f"the output of {name}")

            hooks.append(layer.register_forward_hook(look))
    try:
        with autocast:
            model.predict(model.resize(images))
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(broken + found), "the loss")


def gradient_not_finite(model: SSD) -> str | None:
    """The first parameter whose gradient is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return None
