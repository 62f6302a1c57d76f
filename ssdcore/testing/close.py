"""The one tolerance policy: how far a result may lie from the float64 oracle, by the dtype it is stored in.

What hangs on comparisons alone (indices, labels, counts) must be equal, and is compared with `==`, not here.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

COMPUTED = {
    # A few dozen roundings of 2**-24 each, and the GPU's approximate exp and log (2**-22 relative).
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}


def assert_close(
    actual: Tensor, expected: Any, *, scale: float = 1.0, stored_ulps: float = 0.5, name: str = "result"
) -> None:
    """Raise AssertionError unless `actual` is within tolerance of `expected` everywhere; NaN equals NaN.

    Args:
        actual: any float tensor; its dtype sets the tolerance. 16 bits are taken as a rounding of fp32.
        expected: float64, an array or a tensor of the same shape.
        scale: the size of the numbers that `actual` is a difference of, where that is more than 1: pixels for boxes.
        stored_ulps: the error of that rounding in units in the last place; 1 where it is a truncation, as Triton's
            interpreter does with bf16.
    """
    computed = COMPUTED.get(actual.dtype, COMPUTED[torch.float32])
    rtol = computed if actual.dtype in COMPUTED else computed + stored_ulps * torch.finfo(actual.dtype).eps
    wanted = expected.detach().cpu().numpy() if isinstance(expected, Tensor) else np.asarray(expected)
    got = actual.detach().cpu().double().numpy()
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=computed * scale, equal_nan=True, err_msg=name)
