"""Checks of what callers pass to the public functions: shapes, dtypes, devices and settings, never the values of a
tensor.

A check of values would make the host wait for the GPU. Each error names the argument, what was expected and what came.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
OFFSETS = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[str | int, ...],
    dtypes: tuple[torch.dtype, ...],
    like: Tensor | None = None,
) -> None:
    """Raise unless `tensor` has this shape, one of these dtypes and the device of `like`.

    A string in `shape` names a dimension that may have any length.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(expected, str) or expected == length for expected, length in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected_shape = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{expected_shape}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        expected_dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {expected_dtypes}, got {str(tensor.dtype).removeprefix('torch.')}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as the first argument, got {tensor.device}")
    if tensor.dtype == torch.float64 and tensor.device.type != "cpu":
        raise TypeError(f"{name} must be float32, float16 or bfloat16 on {tensor.device.type}, got float64")


def check_no_gradient(function: str, **tensors: Tensor) -> None:
    """Raise if gradients are being recorded and one of `tensors` requires a gradient, which `function` does not have.

    Detaching the tensor instead would lose the gradient silently.
    """
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, and {function} has none with respect to it: "
                    f"pass {name}.detach(), or call {function} under torch.no_grad()"
                )


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Raise unless `value` is finite and not below `minimum`."""
    if not minimum <= value < math.inf:  # written so that NaN fails
        raise ValueError(f"{name} must be finite and {minimum} or more, got {value}")


def check_count(name: str, value: int, minimum: int) -> None:
    """Raise unless `value` is an int and not below `minimum`."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be {minimum} or more, got {value}")


def check_weights(weights: Sequence[float]) -> list[float]:
    """The four weights of the box encoding as floats; raises unless there are four, all positive and finite."""
    if not isinstance(weights, Sequence) or len(weights) != 4 or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights must be four positive, finite numbers, got {weights}")
    return [float(weight) for weight in weights]
