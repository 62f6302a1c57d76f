"""The one tolerance policy: how far a result may lie from the float64 oracle, by the dtype it is stored in.

What hangs on comparisons alone (indices, labels, counts) must be equal, and is compared with `==`, not here.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCES = {
    # A few dozen roundings of 2**-24 each, and the GPU's approximate exp and log (2**-22 relative).
    torch.float32: (1e-5, 1e-5),
    torch.float64: (1e-12, 1e-12),
    # One rounding of the stored result, half an ulp, over the fp32 one.
    torch.float16: (2**-11 + 1e-5, 1e-5),
    torch.bfloat16: (2**-8, 1e-5),
}


def assert_close(actual: Tensor, expected: Any, *, scale: float = 1.0, name: str = "result") -> None:
    """Raise AssertionError unless `actual` is within tolerance of `expected` everywhere; NaN equals NaN.

    Args:
        actual: any float tensor; its dtype sets the tolerance.
        expected: float64, an array or a tensor of the same shape.
        scale: the size of the numbers that `actual` is a difference of, where that is more than 1: pixels for boxes.
    """
    rtol, atol = TOLERANCES[actual.dtype]
    wanted = expected.detach().cpu().numpy() if isinstance(expected, Tensor) else np.asarray(expected)
    got = actual.detach().cpu().double().numpy()
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol * scale, equal_nan=True, err_msg=name)
