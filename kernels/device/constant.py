"""Constants that kernels read as globals."""

import triton.language as tl


class Constant(tl.constexpr):
    """A `tl.constexpr` that costs a launch 0.1 us instead of 0.7 us.

    At every launch, Triton compares each global constant of the kernel with its value at compile time. The comparison
    of `tl.constexpr` makes a new `tl.constexpr` of the answer; this one does not.
    """

    def __ne__(self, other: object) -> bool:
        return self.value != getattr(other, "value", other)
