"""What kernels decide without dividing is what IEEE division says, to the last bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ssdcore.kernels.device.arithmetic import LEAST_QUOTIENT, divide, divisor_of
from ssdcore.kernels.device.boxmath import areas_are_usual, columns, iou_exceeds, iou_limit, load_box
from ssdcore.kernels.rules import EXACT

COUNT = 4096
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _divide_kernel(x_ptr, y_ptr, quotient_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    quotient = divide(tl.load(x_ptr + index), divisor_of(tl.load(y_ptr + index)))
    tl.store(quotient_ptr + index, quotient)


@triton.jit
def _iou_exceeds_kernel(a_ptr, b_ptr, threshold, exceeds_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    a, b = columns(load_box(a_ptr, index, index >= 0)), columns(load_box(b_ptr, index, index >= 0))
    limit = iou_limit(threshold)
    exceeds = iou_exceeds(a, b, limit, areas_are_usual(b, limit))
    tl.store(exceeds_ptr + index[None, :], exceeds)


def near(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positive fp32 numbers at most 3 steps from `x`."""
    bits = x.astype(np.float32).view(np.int32) + rng.integers(-3, 4, x.shape, dtype=np.int32)
    return bits.view(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_quotients_are_rounded_as_by_division(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.uniform(1, 2, COUNT).astype(np.float32) * 2.0 ** rng.integers(0, 8, COUNT)
    y[::4] = np.nextafter(y[::4] // 1 + 1, 0, dtype=np.float32)  # many of them have a mantissa of ones
    y = y.astype(np.float32)
    between = rng.uniform(1, 2, COUNT).astype(np.float32).astype(np.float64) + 2.0**-24  # two neighbours
    x = near(between * y * 0.5 ** rng.integers(9, 60, COUNT), rng)
    x[:8] = [0, 1e-38, 2.0**-126, 2.0**-90, 2.0**-80, 2.0**-70, 2.0**-65, 1]  # some quotients are too small
    quotient = torch.empty(COUNT, device=DEVICE)
    _divide_kernel[(1,)](torch.from_numpy(x).to(DEVICE), torch.from_numpy(y).to(DEVICE), quotient, COUNT=COUNT, **EXACT)
    found, expected = quotient.cpu().numpy(), x / y
    is_exact = expected >= LEAST_QUOTIENT.value
    assert is_exact.sum() > COUNT // 2
    assert np.array_equal(found[is_exact], expected[is_exact])
    assert (found[~is_exact] < LEAST_QUOTIENT.value).all()


def box_pairs(threshold: float, scale: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [COUNT, 4] whose IoUs are, in fp32, at most a few numbers from `threshold`; and odd ones."""
    width = rng.uniform(1, 2, COUNT).astype(np.float32)
    zero, one = np.zeros(COUNT, np.float32), np.ones(COUNT, np.float32)
    a = np.stack((zero, zero, width, one), axis=1)
    b = np.stack((zero, zero, near(width * max(threshold, 2.0**-60), rng), one), axis=1)
    odd = np.array(
        [
            [0, 0, 0, 0],
            [1, 0, 0, 1],  # sides or areas that are negative
            [1, 1, 0, 0],
            [4, 0, 0, 4],
            [np.nan, 0, 1, 1],
            [0, 0, np.inf, 1],
            [-np.inf, -np.inf, np.inf, np.inf],
            [0, 0, 1, 1],
            [0, 0, 3e38, 3e38],
        ],
        dtype=np.float32,
    )
    a[: len(odd) ** 2], b[: len(odd) ** 2] = np.repeat(odd, len(odd), axis=0), np.tile(odd, (len(odd), 1))
    if scale >= 1:
        a[COUNT // 2] = [0, 0, 1e-30, 1e-10]  # not in b, where a single such box brings the division back
    return a * np.float32(scale), b * np.float32(scale)


@pytest.mark.parametrize("scale", [1.0, 2.0**-35, 2.0**-50, 2.0**-70, 2.0**40])  # of a side
@pytest.mark.parametrize("threshold", [0.0, 1e-12, 2.0**-11, 2.0**-10, 0.3, 0.45, 0.5, 1 - 2.0**-24, 1.0, 1.5, 3e38])
def test_an_iou_exceeds_a_threshold_as_its_quotient_does(threshold: float, scale: float) -> None:
    threshold = float(np.float32(threshold))
    with np.errstate(all="ignore"):
        a, b = box_pairs(threshold, scale, np.random.default_rng(0))
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        intersection = np.prod(np.maximum(sides, 0), axis=1)
        areas = (np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (a, b))
        expected = (intersection > 0) & (intersection / (sum(areas) - intersection) > np.float32(threshold))
    exceeds = torch.empty(COUNT, dtype=torch.bool, device=DEVICE)
    _iou_exceeds_kernel[(1,)](
        torch.from_numpy(a).to(DEVICE), torch.from_numpy(b).to(DEVICE), threshold, exceeds, COUNT=COUNT, **EXACT
    )
    assert np.array_equal(exceeds.cpu().numpy(), expected)
