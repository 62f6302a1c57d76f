"""Quotients, those of fp32 with the bits of IEEE division, and comparisons of them, for less than a division costs.

A fused multiply-add rounds once. So it gives what a quotient leaves over, x - q * y, without any rounding if q is a
neighbour of x / y, because that remainder is a number. The theorem is P. Markstein's, in "Computation of elementary
functions on the IBM RISC System/6000 processor", 1990.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ssdcore.kernels.device.constant import Constant

INTERPRETER = Constant(triton.knobs.runtime.interpret)
LEAST_QUOTIENT = Constant(2.0**-64)  # from here on, the remainders of `divide` are far from underflow


class Divisor(NamedTuple):
    """What `divide` needs of a divisor."""

    value: tl.tensor
    reciprocal: tl.tensor  # rounded
    correction: tl.tensor  # what rounding took from the reciprocal


@triton.jit
def fused_multiply_add(x, y, z):
    """x * y + z of fp32 numbers, rounded once."""
    if INTERPRETER:
        # The interpreter of Triton 3.6 rounds the product as well. In fp64, the product is exact.
        result = (tl.cast(x, tl.float64) * tl.cast(y, tl.float64) + tl.cast(z, tl.float64)).to(tl.float32)
    else:
        result = tl.fma(x, y, z)
    return result


@triton.jit
def whole_quotient(x, y):
    """x // y of int32 numbers, x from 0 on and y from 1 on. Without signs, it takes fewer instructions."""
    return (tl.cast(x, tl.int32).to(tl.uint32) // tl.cast(y, tl.int32).to(tl.uint32)).to(tl.int32)


@triton.jit
def half_step(x):
    """Half the distance from x, 0 or more, to the next larger fp32 number."""
    x = tl.cast(x, tl.float32)
    return 0.5 * ((x.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True) - x)


@triton.jit
def divisor_of(y):
    """Prepare a division by y, a normal number."""
    reciprocal = tl.div_rn(tl.full(y.shape, 1.0, tl.float32), y)
    return Divisor(y, reciprocal, fused_multiply_add(-y, reciprocal, 1.0) * reciprocal)


@triton.jit
def divide(x, y):
    """x / y as IEEE division rounds it, if both are 0 or more and the result is LEAST_QUOTIENT or more.

    Smaller results are less than LEAST_QUOTIENT too, but may be rounded otherwise.

    Args:
        x: fp32, at most y.
        y: Divisor.
    """
    # Both parts of the reciprocal give a neighbour of the quotient. The remainder then says which neighbour is right.
    neighbour = fused_multiply_add(x, y.reciprocal, x * y.correction)
    remainder = fused_multiply_add(-y.value, neighbour, x)
    return fused_multiply_add(remainder, y.reciprocal, neighbour)
