"""Where there is no GPU the kernels run in Triton's interpreter; where there is one, on it. Same tests, both places."""

import os

import torch

if not torch.cuda.is_available():
    # Triton decides when a kernel is defined, so before anything imports one.
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings

from ssdcore.kernels import registry

registry.INTERPRETED = False  # CPU tensors run eager code, unless a test asks for `path`

# The same problems on every run where a red build would stop someone else; fresh ones on a developer's machine.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", print_blob=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@dataclass(frozen=True)
class Path:
    """One of the two implementations behind the public functions."""

    name: str
    device: str
    max_examples: int  # for property tests

    @property
    def full_size(self) -> bool:
        """Whether problems of a real detector's size are quick enough."""
        return self.name == "eager" or self.device == "cuda"

    @property
    def stored_ulps(self) -> float:
        """How far a store in 16 bits may be off: the interpreter truncates fp32 to bf16, the GPU rounds."""
        return 0.5 if self.full_size else 1.0


def _empty_as_nan(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.empty` whose every element is wrong until something is written to it."""

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return poisoned


@pytest.fixture(scope="module", params=["eager", "triton"])
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Runs the test on the eager ops and on the Triton kernels, both with uninitialised memory poisoned."""
    cuda = torch.cuda.is_available()
    on_triton = request.param == "triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "INTERPRETED", on_triton and not cuda)
        patch.setattr(torch, "empty", _empty_as_nan(torch.empty))
        device = "cuda" if on_triton and cuda else "cpu"
        # A program costs the interpreter milliseconds.
        yield Path(request.param, device, max_examples=30 if on_triton and not cuda else 150)
