"""Find the tensor in which the first NaN or infinity of a training step appeared."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssdcore.models import SSD
from ssdcore.objects import Target


@torch.no_grad()
def first_not_finite(model: SSD, images: Tensor, targets: Sequence[Target], autocast: Any) -> str:
    """Say which tensor is not finite, in the order in which a step computes them.

    Args:
        model: in training mode, with the weights before the step; its statistics may change.
        images: [B, 3, S, S] on the model's device.
        targets: of the batch.
        autocast: the context in which the step ran.
    """
    if not images.isfinite().all():
        return "the images"
    for i, target in enumerate(targets):
        if not target["boxes"].isfinite().all():
            return f"the boxes of image {i + 1} of the batch"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} of the model"
    found: list[str] = []
    hooks = []
    for name, layer in model.named_modules():
        if not list(layer.children()):

            def look(_layer: Any, _inputs: Any, output: Any, name: str = name) -> None:
                if not found and isinstance(output, Tensor) and not output.isfinite().all():
                    found.append(name)

            hooks.append(layer.register_forward_hook(look))
    try:
        with autocast:
            model.predict(model.resize(images))
    finally:
        for hook in hooks:
            hook.remove()
    return f"the output of {found[0]}" if found else "the loss"


def gradient_not_finite(model: SSD) -> str | None:
    """The first parameter whose gradient is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return None
