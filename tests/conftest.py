"""The same tests on every machine: with a GPU the kernels run on it, without one they run in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    # Triton looks at this variable when a kernel is defined, so it is set before any kernel is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings

from ssdcore.kernels import registry
from ssdcore.kernels.nms import eager as nms_eager

registry.INTERPRETED = False  # CPU tensors run eager code, unless a test uses the fixture `backend`

# In CI every run draws the same problems, so that nobody's build fails by chance. A developer's machine draws new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", print_blob=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@dataclass(frozen=True)
class Backend:
    """One of the two implementations behind the public functions."""

    name: str
    device: str
    max_examples: int  # for property tests

    @property
    def full_size(self) -> bool:
        """Whether it is fast enough for problems of a real detector's size."""
        return self.name == "eager" or self.device == "cuda"

    @property
    def stored_ulps(self) -> float:
        """Error of a store in 16 bits, in units of the last place: the interpreter truncates, a GPU rounds."""
        return 0.5 if self.full_size else 1.0


def _empty_as_nan(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.empty`, filled with values that are wrong wherever nothing is written to."""

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return poisoned


@pytest.fixture(scope="module", params=["eager", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs a test on the eager code and on the Triton kernels, both with uninitialised memory poisoned."""
    cuda = torch.cuda.is_available()
    on_triton = request.param == "triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "INTERPRETED", on_triton and not cuda)
        patch.setattr(torch, "empty", _empty_as_nan(torch.empty))
        # Our own code decides, also where torchvision's kernel would be faster.
        patch.setattr(nms_eager, "_torchvision_nms", lambda: None)
        for name in ("new_empty", "new_empty_strided"):  # the gradients of the loss are allocated with these
            patch.setattr(torch.Tensor, name, _empty_as_nan(getattr(torch.Tensor, name)))
        device = "cuda" if on_triton and cuda else "cpu"
        # The interpreter takes milliseconds per program, so it gets fewer problems.
        yield Backend(request.param, device, max_examples=30 if on_triton and not cuda else 150)
