"""Compile every kernel at its production configuration, for GPUs that need not be there.

The launchers run on CPU tensors with launching replaced by recording, so what is compiled is what they launch: the
same kernels, block sizes, warps, dtypes and specialisations. The smallest problems, which Triton specialises otherwise,
are compiled too. Prints, from the machine code, registers and spilled bytes a thread, shared memory a program, and
instructions: all of them, the loads and stores of global memory, how many of these are 16 bytes wide, and the barriers.
So a change to a kernel shows without a GPU. Exits with 1 if a kernel spills.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise SystemExit("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")

import torch
import triton
from record import text_table
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ssdcore.kernels.boxes.triton import (
    launch_box_iou,
    launch_decode_boxes,
    launch_decode_boxes_backward,
    launch_encode_boxes,
)
from ssdcore.kernels.device.head import HeadShape
from ssdcore.kernels.matching.triton import launch_match_anchors
from ssdcore.kernels.multibox.triton import launch_multibox_loss, launch_multibox_loss_backward
from ssdcore.kernels.nms.triton import launch_batched_nms_padded
from ssdcore.kernels.postprocess.triton import launch_postprocess_detections

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")  # A100, H100 and H200, B200, MI300
COLUMNS = ("registers", "spilled", "shared", "instructions", "loads", "stores", "wide", "barriers")
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
SSD300 = [
    (38 * 38, 4),
    (19 * 19, 6),
    (10 * 10, 6),
    (5 * 5, 6),
    (3 * 3, 4),
    (1, 4),
]  # cells and anchors a cell, by level


@contextmanager
def recorded() -> Iterator[list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]]:
    """Collect kernel launches instead of making them."""
    launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((self, args, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def production(dtype: torch.dtype) -> None:
    """Call every launcher at the shapes of SSD300: COCO's classes in maps of both layouts, VOC's in one tensor."""
    sizes = {"batch": 2, "topk": 400, "max_detections": 200, "min_negatives": 0}
    # Torchvision's 91 classes of COCO make the kernels of 81: both are six pieces of 16.
    launch_all(dtype, num_classes=81, layouts=("rows", "planes"), levels=SSD300, **sizes)
    launch_all(dtype, num_classes=21, layouts=("packed",), levels=SSD300, **sizes)


def many_classes(dtype: torch.dtype) -> None:
    """Call every launcher with the classes of OpenImages."""
    sizes = {"batch": 2, "topk": 400, "max_detections": 200, "min_negatives": 0}
    launch_all(dtype, num_classes=601, layouts=("planes",), levels=SSD300, **sizes)


def smallest(dtype: torch.dtype) -> None:
    """Call every launcher with ones: Triton makes an argument of 1 a constant, and another kernel of it."""
    sizes = {"batch": 1, "topk": 1, "max_detections": 1, "min_negatives": 1}
    launch_all(dtype, num_classes=2, layouts=("packed",), levels=[(1, 1)], **sizes)
    launch_all(dtype, num_classes=2, layouts=("planes",), levels=[(1, 1), (2, 1), (2, 2)], **sizes)


def levels_of(levels: list[tuple[int, int]], layout: str, batch: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """[B, P, a, width] of each level of P cells with a anchors each."""
    if layout == "packed":
        levels = [(sum(cells * per_cell for cells, per_cell in levels), 1)]
    if layout == "planes":
        return [torch.zeros(batch, a, width, cells, dtype=dtype).permute(0, 3, 1, 2) for cells, a in levels]
    return [torch.zeros(batch, cells, a, width, dtype=dtype) for cells, a in levels]


def launch_all(
    dtype: torch.dtype,
    *,
    batch: int,
    levels: list[tuple[int, int]],
    layouts: tuple[str, ...],
    num_classes: int,
    topk: int,
    max_detections: int,
    min_negatives: int,
) -> None:
    num_anchors = sum(cells * per_cell for cells, per_cell in levels)
    boxes = torch.zeros(batch, num_anchors, 4, dtype=dtype)
    anchors = torch.zeros(num_anchors, 4)
    gt_boxes, gt_labels = torch.zeros(batch, 4), torch.ones(batch, dtype=torch.int64)
    gt_offsets = torch.arange(batch + 1, dtype=torch.int32)
    matched = torch.zeros(batch, num_anchors, dtype=torch.int64)
    scalar = torch.zeros(())

    launch_box_iou(boxes[0], boxes[-1])
    launch_encode_boxes(boxes, anchors, WEIGHTS)
    launch_decode_boxes(boxes, anchors, WEIGHTS)
    launch_decode_boxes_backward(boxes.float(), boxes, anchors, WEIGHTS)
    launch_match_anchors(gt_boxes, gt_offsets, anchors, 0.5)
    truth = (matched, gt_boxes, gt_labels, gt_offsets, anchors)
    for layout in layouts:
        head = [levels_of(levels, layout, batch, width, dtype) for width in (num_classes, 4)]
        for normalizer in ("batch", "image"):
            *_, lse, selected, scale = launch_multibox_loss(*head, *truth, WEIGHTS, 3.0, 1.0, min_negatives, normalizer)
        launch_multibox_loss_backward(scalar, scalar, *head, *truth, lse, selected, scale, WEIGHTS, 1.0)
        launch_postprocess_detections(
            *head, anchors, torch.full((batch, 2), 300), WEIGHTS, 0.01, 0.45, topk, max_detections
        )
    for idxs in (None, matched):
        launch_batched_nms_padded(boxes, boxes[..., 0], idxs, 0.45, max_detections, 0.01)


def describe(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for this launch, and the options it would compile it with."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update({name: value for name, value in options.items() if name in kernel.arg_names})
    signature, constants, attributes = {}, {}, {}

    def specialise(value: Any, path: tuple[int, ...], constexpr: bool = False, as_it_is: bool = False) -> Any:
        """The type of an argument, or of each in a tuple; what is constant and what divisible by 16 goes by `path`."""
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
    return source, {name: value for name, value in options.items() if name not in kernel.arg_names}


def head_text(values: dict[str, Any]) -> str:
    """Classes, levels and layout of the head's outputs that a launch reads, as in "81x6 rows"; "" if it reads none."""
    head = values.get("HEAD")
    if not isinstance(head, HeadShape):
        return ""
    return f"{head.classes}x{len(values['levels'].cells)} {'planes' if head.planes else 'rows'}"


def target_of(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


def nvidia_resources(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump` says of the machine code."""
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
    """What the assembly says of itself; scalar registers spill into vector ones, which costs no memory."""
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly))
    lines = re.findall(r"^\s+([sv]_\w+|(?:global|buffer|ds|flat)_\w+)", assembly, re.MULTILINE)
    memory = "(global|buffer|flat)"
    return {
        "registers": int(found["vgpr_count"]),
        "spilled": int(found["private_segment_fixed_size"]),
        **instruction_counts(
            lines,
            load=rf"{memory}_load",
            store=rf"{memory}_store",
            wide=rf"{memory}_(load|store)_dwordx4",
            barrier="s_barrier",
        ),
    }


def instruction_counts(lines: list[str], **patterns: str) -> dict[str, int]:
    """All instructions, and those whose mnemonic begins with each pattern."""
    counts = {
        f"{name}s".replace("wides", "wide"): sum(bool(re.match(p, x)) for x in lines) for name, p in patterns.items()
    }
    return {"instructions": len(lines), **counts}


def flat(kinds: Iterable[Any]) -> Iterator[str]:
    """The types of arguments, those in bundles one by one."""
    for kind in kinds:
        if isinstance(kind, tuple):
            yield from flat(kind)
        else:
            yield kind


def compile_all(architecture: str, calls: Callable[[], None]) -> Iterator[dict[str, Any]]:
    with recorded() as launches:
        calls()
    target = target_of(architecture)
    seen = set()
    for kernel, args, options in launches:
        head = head_text(options)
        source, options = describe(kernel, args, options)
        if source.hash() in seen:
            continue
        seen.add(source.hash())
        compiled = triton.compile(source, target=target, options=options)
        dtypes = {kind.removeprefix("*") for kind in flat(source.signature.values()) if kind.startswith("*")}
        yield {
            "kernel": kernel.__name__,
            "arch": architecture,
            "dtypes": " ".join(sorted(dtypes)),
            "head": head,
            "warps": options["num_warps"],
            "shared": compiled.metadata.shared,
            **(
                nvidia_resources(compiled.asm["cubin"])
                if target.backend == "cuda"
                else amd_resources(compiled.asm["amdgcn"])
            ),
        }


def report(architecture: str) -> list[dict[str, Any]]:
    rows = []
    problems = [(production, torch.float32), (production, torch.bfloat16)]
    problems += [(many_classes, torch.bfloat16), (smallest, torch.float32)]
    for calls, dtype in problems:
        for row in compile_all(architecture, lambda dtype=dtype, calls=calls: calls(dtype)):
            rows.append({"problem": calls.__name__, **row})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help=f"default: {' '.join(ARCHITECTURES)}")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead")
    arguments = parser.parse_args()
    for architecture in arguments.arch:
        if not re.fullmatch(r"sm_\d+|gfx\w+", architecture):
            parser.error(f"--arch takes names such as sm_90 or gfx942, got {architecture}")

    with ProcessPoolExecutor(os.cpu_count()) as pool:
        reports = tqdm(pool.map(report, arguments.arch), total=len(arguments.arch), unit="arch", disable=None)
        rows = [row for rows in reports for row in rows]
    spilling = sorted({row["kernel"] for row in rows if row["spilled"]})
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        shown = [row for row in rows if row["problem"] == "production"]
        head = ("kernel", "arch", "dtypes", "head", "warps", *COLUMNS)
        print(text_table(head, [[str(row[name]) for name in head] for row in shown]))
        print(f"{len(rows)} kernels compiled; spilling: {', '.join(spilling) or 'none'}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
