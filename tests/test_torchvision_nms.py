"""torchvision's kernel, which decides about a few boxes on a CPU, decides as our own code does."""

import platform
from math import inf, nan
from typing import Any

import hypothesis.extra.numpy as hnp
import pytest
import torch
import torchvision  # noqa: F401  # its kernel is used where it is loaded
from hypothesis import given
from hypothesis import strategies as st

from ssdcore.kernels import nms
from ssdcore.kernels.nms import eager

EXTREME = [-inf, -3e38, -1e19, -3.0, -1e-20, -0.0, 0.0, 1e-45, 1e-20, 1.0, 3.0, 1e19, 3e38, inf, nan]
ELEMENTS = st.one_of(
    st.sampled_from(EXTREME).map(lambda x: float(torch.tensor(x))),
    st.integers(0, 5).map(float),
    st.floats(-9, 9, width=32),
)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernel is used on x86-64 alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torchvision_decides_as_numpy_does(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    assert eager._torchvision_nms() is not None

    @given(hnp.arrays("float32", st.tuples(st.integers(0, 40), st.just(5)), elements=ELEMENTS), st.floats(0, 2))
    def check(numbers: Any, threshold: float) -> None:
        boxes, scores = torch.from_numpy(numbers).to(dtype).split((4, 1), dim=1)
        by_torchvision = nms(boxes, scores[:, 0], threshold)
        with monkeypatch.context() as patch:
            patch.setattr(eager, "_torchvision_nms", lambda: None)
            assert nms(boxes, scores[:, 0], threshold).tolist() == by_torchvision.tolist()

    check()


def test_other_processors_do_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert eager._torchvision_nms() is None
