"""How close floating-point results must be to the float64 oracle, by the dtype of the result.

Results that depend only on comparisons (indices, labels, counts) must be equal, and are not compared with this module.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

COMPUTED = {  # relative error of a result that was computed in this dtype
    # A few dozen roundings of 2**-24 each, and the approximate exp and log of a GPU (relative error 2**-22).
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}


def assert_close(
    actual: Tensor, expected: Any, *, scale: float = 1.0, stored_ulps: float = 0.5, name: str = "result"
) -> None:
    """Assert that `actual` is within tolerance of `expected` everywhere. NaN equals NaN.

    The tolerance is rtol * |expected| + atol. For fp32 and fp64, rtol is the entry of `COMPUTED` for the dtype. A
    16-bit result is taken as a rounded fp32 result, so the rounding error of the 16-bit dtype is added to rtol. atol is
    the entry of `COMPUTED` times `scale`.

    Args:
        actual: a floating-point tensor on any device.
        expected: float64, an array or a tensor of the same shape.
        scale: if `actual` is a difference of larger numbers, the size of these numbers; for boxes, in pixels.
        stored_ulps: error of storing a 16-bit result, in units in the last place: 0.5 for rounding, 1 for truncation,
            which is what Triton's interpreter does for bf16.
        name: what the result is called in the error message.

    Raises:
        AssertionError: an element is not close enough; the message shows the largest differences.
    """
    computed = COMPUTED.get(actual.dtype, COMPUTED[torch.float32])
    rtol = computed if actual.dtype in COMPUTED else computed + stored_ulps * torch.finfo(actual.dtype).eps
    expected_array = expected.detach().cpu().numpy() if isinstance(expected, Tensor) else np.asarray(expected)
    actual_array = actual.detach().cpu().double().numpy()
    np.testing.assert_allclose(
        actual_array, expected_array, rtol=rtol, atol=computed * scale, equal_nan=True, err_msg=name
    )
