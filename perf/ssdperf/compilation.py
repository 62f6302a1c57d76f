"""Recorded launches compiled for a GPU, and what the machine code says of each kernel."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ssdperf.launches import CALLS, recorded

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


def report(architecture: str) -> list[dict[str, Any]]:
    """Compile every kernel that any of `CALLS` launches for `architecture`; return a row for each."""
    return [
        {"problem": calls.name, **row}
        for calls in CALLS
        for row in compile_all(architecture, lambda calls=calls: calls.make(calls.dtype))
    ]


def compile_all(architecture: str, calls: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Compile every kernel that `calls` launches, once for each specialisation, and yield a row for each."""
    with recorded() as launches:
        calls()
    target = target_of(architecture)
    seen = set()
    for kernel, values in launches:
        source, options = describe(kernel, values)
        if source.hash() in seen:
            continue
        seen.add(source.hash())
        compiled = triton.compile(source, target=target, options=options)
        dtypes = {kind.removeprefix("*") for kind in flat(source.signature.values()) if kind.startswith("*")}
        yield {
            "kernel": kernel.__name__,
            "arch": architecture,
            "dtypes": " ".join(sorted(dtypes)),
            "head": head_text(values),
            "warps": options["num_warps"],
            "shared": compiled.metadata.shared,
            **(
                nvidia_resources(compiled.asm["cubin"])
                if target.backend == "cuda"
                else amd_resources(compiled.asm["amdgcn"])
            ),
        }


def describe(kernel: JITFunction, values: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """Return the source that Triton would compile for this launch, and the options that it would compile it with."""
    signature, constants, attributes = {}, {}, {}

    def specialise(value: Any, path: tuple[int, ...], constexpr: bool = False, as_it_is: bool = False) -> Any:
        """Return an argument's type, or the types of the members of a bundle.

        Records at `path` whether the argument is a constant and whether it is divisible by 16.
        """
        if isinstance(value, tuple) and not constexpr:
            kinds = [specialise(x, (*path, index)) for index, x in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)  # a bundle keeps its names
        if constexpr or value is None or (type(value) is int and value == 1 and not as_it_is):
            constants[path] = value
            return "constexpr"
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if type(number) is int and number % 16 == 0 and not as_it_is:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return "*" + TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for position, parameter in enumerate(kernel.params):
        signature[parameter.name] = specialise(
            values[parameter.name], (position,), parameter.is_constexpr, parameter.do_not_specialize
        )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, {name: value for name, value in values.items() if name not in kernel.arg_names}


def flat(kinds: Iterable[Any]) -> Iterator[str]:
    """Yield the types of arguments, and those of the members of bundles one by one."""
    for kind in kinds:
        if isinstance(kind, tuple):
            yield from flat(kind)
        else:
            yield kind


def head_text(values: dict[str, Any]) -> str:
    """Return the head's outputs that a launch reads as "81x6 rows": classes, levels and layout; "" if it reads none."""
    if "HEAD" not in values:
        return ""
    head = values["HEAD"]
    return f"{head.classes}x{len(values['levels'].cells)} {'planes' if head.planes else 'rows'}"


def target_of(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


def nvidia_resources(cubin: bytes) -> dict[str, int]:
    """Return what `cuobjdump` says about the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\w[\w.]*)", code, re.MULTILINE)
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        **instruction_counts(lines, load=r"LDG\b", store=r"STG\b", wide=r"(LDG|STG)\..*\b128\b", barrier=r"BAR\b"),
    }


def amd_resources(assembly: str) -> dict[str, int]:
    """Return what the assembly says about itself.

    Scalar registers that spill into vector registers do not count as spilled, because they cost no memory. The compiler
    may reserve a private segment for them all the same, which no instruction reads or writes then.
    """
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly))
    lines = re.findall(r"^\s+([sv]_\w+|(?:global|buffer|ds|flat|scratch)_\w+)", assembly, re.MULTILINE)
    uses_segment = int(found["vgpr_spill_count"]) > 0 or any(line.startswith("scratch_") for line in lines)
    memory = "(global|buffer|flat)"
    return {
        "registers": int(found["vgpr_count"]),
        "spilled": int(found["private_segment_fixed_size"]) if uses_segment else 0,
        **instruction_counts(
            lines,
            load=rf"{memory}_load",
            store=rf"{memory}_store",
            wide=rf"{memory}_(load|store)_dwordx4",
            barrier="s_barrier",
        ),
    }


def instruction_counts(lines: list[str], **patterns: str) -> dict[str, int]:
    """Count all instructions, and those whose mnemonic begins with each pattern."""
    counts = {
        f"{name}s".replace("wides", "wide"): sum(bool(re.match(p, x)) for x in lines) for name, p in patterns.items()
    }
    return {"instructions": len(lines), **counts}
