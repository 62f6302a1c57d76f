"""Registration of the ops with PyTorch, as `torch.ops.ssdcore.*`.

PyTorch dispatches: CUDA tensors run Triton, CPU tensors run eager code. With TRITON_INTERPRET=1 in the environment, CPU
tensors run the Triton kernels in Triton's interpreter instead, so that the kernels are tested where there is no GPU.
float64 stays on eager code there, because the kernels do not take it.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.library import Library, infer_schema, register_autograd, register_fake

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIBRARY = Library("ssdcore", "DEF")  # not `custom_op`, because each call of one takes 10 µs longer


def define(
    name: str, *, eager: Callable[..., Any], load_triton: Callable[[], Callable[..., Any]], fake: Callable[..., Any]
) -> OpOverload:
    """Define the op `ssdcore::<name>`. All its implementations take the arguments of `eager`.

    Args:
        name: the op's name.
        eager: runs on CPU tensors; its signature is the op's schema.
        load_triton: imports and returns the launcher, which runs on CUDA tensors. It is called when the op first needs
            Triton, so that the package can be imported without it.
        fake: returns empty tensors of the result's shapes, dtypes and strides. It keeps sizes symbolic: `x.shape[0]`,
            never `len(x)`.
    """
    load = functools.cache(load_triton)

    def run_triton(*args: Any) -> Any:
        try:
            launch = load()
        except ModuleNotFoundError as error:
            raise RuntimeError(f"ssdcore::{name} needs Triton to run on this device: {error}") from error
        return launch(*args)

    def run_on_cuda(*args: Any) -> Any:
        # Triton launches on the current device, which may be another one than that of the tensors.
        with torch.cuda.device(_tensors(args)[0].device):
            return run_triton(*args)

    def run_on_cpu(*args: Any) -> Any:
        if INTERPRETED and not any(x.dtype == torch.float64 for x in _tensors(args)):
            return run_triton(*args)
        return eager(*args)

    LIBRARY.define(name + infer_schema(eager, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, _hidden_from_dynamo(run_on_cuda), "CUDA")
    LIBRARY.impl(name, _hidden_from_dynamo(run_on_cpu), "CPU")
    register_fake(f"ssdcore::{name}", fake, lib=LIBRARY)
    overload: OpOverload = getattr(torch.ops.ssdcore, name).default
    return overload


def forbid_second_gradient(function: str, backward: OpOverload) -> None:
    """Make it an error to differentiate `backward`, the gradient of `function`; otherwise it would be taken as 0."""

    def raise_error(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{function} can be differentiated only once")

    register_autograd(backward, raise_error, lib=LIBRARY)


def _hidden_from_dynamo(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, whose Python code torch.compile does not compile.

    It would, where an op breaks the graph, as `nms` does unless `capture_dynamic_output_shape_ops` is set. NumPy would
    then be replaced by an imitation that does not know all of it.
    """
    hidden: Callable[..., Any] | None = None

    def run_hidden(*args: Any) -> Any:
        nonlocal hidden
        # `disable` imports Dynamo, which takes seconds. Until somebody imports it, nothing is compiled.
        if "torch._dynamo" not in sys.modules:
            return run(*args)
        if hidden is None:
            hidden = torch.compiler.disable(run)
        return hidden(*args)

    return run_hidden


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among `args`, including those in lists."""
    flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return [x for x in flat if isinstance(x, Tensor)]
