"""Rules that every implementation of an op follows, so that eager code and kernels decide alike.

Needs PyTorch and NumPy alone: both `eager.py` and `triton.py` of every op import it.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # 1 / the variances 0.1, 0.1, 0.2, 0.2 of the SSD paper's code
MAX_LOG_SCALE = math.log(1000.0 / 16)  # decoding clamps dw and dh here; torchvision's BoxCoder, bbox_xform_clip

# PyTorch divides an operation equally among threads, and all wait for the last one: for milliseconds, where another
# process keeps a core busy. NumPy works in the calling thread. Up to this many elements, that is also the faster way.
SERIAL_ELEMENTS = 2**16

# An option of every launch: eager code rounds a product before it adds to it. A fused multiply-add would not, and the
# last bit of an IoU can decide whether a box is kept.
EXACT = {"enable_fp_fusion": False}


def registers(limit: int) -> dict[str, int]:
    """The option of a launch that a thread gets at most `limit` registers.

    Without it, ptxas may stay below a number of its own choice and spill a few bytes. AMD's backend has no such option.
    """
    return {} if torch.version.hip else {"maxnreg": limit}


def exp(x: Tensor) -> Tensor:
    """e to the power of `x`, in the calling thread if `x` is small.

    PyTorch leaves exp and log to MKL, which divides even a hundred elements among threads. NumPy does not.
    """
    with np.errstate(all="ignore"):  # overflow
        return torch.from_numpy(np.exp(x.numpy())) if _is_small(x) else torch.exp(x)


def log(x: Tensor) -> Tensor:
    """The natural logarithm of `x`, in the calling thread if `x` is small."""
    with np.errstate(all="ignore"):  # the logarithm of 0 is -inf, that of a negative number NaN
        return torch.from_numpy(np.log(x.numpy())) if _is_small(x) else torch.log(x)


def nonzero(mask: Tensor) -> tuple[Tensor, ...]:
    """`mask.nonzero(as_tuple=True)`, in the calling thread: PyTorch divides it among threads whatever the size."""
    if not mask.is_cpu or torch.compiler.is_compiling():
        return mask.nonzero(as_tuple=True)
    return tuple(map(torch.from_numpy, mask.numpy().nonzero()))


def _is_small(x: Tensor) -> bool:
    return x.is_cpu and x.numel() <= SERIAL_ELEMENTS and not torch.compiler.is_compiling()


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op computes on `x`: float64 stays, every other dtype becomes float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype in which an op computes on it."""
    return x if x.dtype == torch.float64 else x.float()


@functools.cache
def round_down(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`.

    An fp32 IoU exceeds this number if and only if it exceeds the real number `threshold`.
    """
    # The device is named because under another default device `item` would wait for the GPU.
    nearest = torch.tensor(threshold, dtype=torch.float32, device="cpu")
    if nearest.item() > threshold:
        nearest = torch.nextafter(nearest, torch.full_like(nearest, -math.inf))
    return nearest.item()


def sort_key(scores: Tensor) -> Tensor:
    """`scores` widened, with -0.0 turned into 0.0: both are equal, but a radix sort would put them apart."""
    return widen(scores) + 0.0
