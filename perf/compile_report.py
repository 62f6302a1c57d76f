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
from collections.abc import Callable, Iterator
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

from ssdcore.kernels import (
    triton_codec,
    triton_iou,
    triton_match,
    triton_multibox,
    triton_nms,
    triton_postprocess,
)

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
    """Call every launcher at the shapes of SSD300: COCO's classes, torchvision's for it, and VOC's."""
    for num_classes in (81, 91, 21):
        launch_all(
            dtype, batch=2, num_anchors=8732, num_classes=num_classes, topk=400, max_detections=200, min_negatives=0
        )


def smallest(dtype: torch.dtype) -> None:
    """Call every launcher with ones: Triton makes an argument of 1 a constant, and another kernel of it."""
    launch_all(dtype, batch=1, num_anchors=1, num_classes=2, topk=1, max_detections=1, min_negatives=1)


def launch_all(
    dtype: torch.dtype,
    *,
    batch: int,
    num_anchors: int,
    num_classes: int,
    topk: int,
    max_detections: int,
    min_negatives: int,
) -> None:
    boxes = torch.zeros(batch, num_anchors, 4, dtype=dtype)
    logits = torch.zeros(batch, num_anchors, num_classes, dtype=dtype)
    anchors = torch.zeros(num_anchors, 4)
    gt_boxes, gt_labels = torch.zeros(batch, 4), torch.ones(batch, dtype=torch.int64)
    gt_offsets = torch.arange(batch + 1, dtype=torch.int32)
    matched = torch.zeros(batch, num_anchors, dtype=torch.int64)
    scalar = torch.zeros(())

    triton_iou.box_iou_triton(boxes[0], boxes[-1])
    triton_codec.encode_boxes_triton(boxes, anchors, WEIGHTS)
    triton_codec.decode_boxes_triton(boxes, anchors, WEIGHTS)
    triton_codec.decode_boxes_backward_triton(boxes.float(), boxes, anchors, WEIGHTS)
    triton_match.match_anchors_triton(gt_boxes, gt_offsets, anchors, 0.5)
    truth = (matched, gt_boxes, gt_labels, gt_offsets, anchors)
    head = [logits.unsqueeze(2)], [boxes.unsqueeze(2)]
    for normalizer in ("batch", "image"):
        *_, lse, selected, scale = triton_multibox.multibox_loss_triton(
            *head, *truth, WEIGHTS, 3.0, 1.0, min_negatives, normalizer
        )
    triton_multibox.multibox_loss_backward_triton(scalar, scalar, *head, *truth, lse, selected, scale, WEIGHTS, 1.0)
    for idxs in (None, matched):
        triton_nms.batched_nms_padded_triton(boxes, boxes[..., 0], idxs, 0.45, max_detections, 0.01)
    triton_postprocess.postprocess_detections_triton(
        *head, anchors, torch.full((batch, 2), 300), WEIGHTS, 0.01, 0.45, topk, max_detections
    )


def describe(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for this launch, and the options it would compile it with."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update({name: value for name, value in options.items() if name in kernel.arg_names})
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, {name: value for name, value in options.items() if name not in kernel.arg_names}


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


def compile_all(architecture: str, calls: Callable[[], None]) -> Iterator[dict[str, Any]]:
    with recorded() as launches:
        calls()
    target = target_of(architecture)
    seen = set()
    for kernel, args, options in launches:
        source, options = describe(kernel, args, options)
        if source.hash() in seen:
            continue
        seen.add(source.hash())
        compiled = triton.compile(source, target=target, options=options)
        dtypes = {kind.removeprefix("*") for kind in source.signature.values() if kind.startswith("*")}
        yield {
            "kernel": kernel.__name__,
            "arch": architecture,
            "dtypes": " ".join(sorted(dtypes)),
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
    for dtype in (torch.float32, torch.bfloat16):
        for calls in (production, smallest):
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

    rows = [row for architecture in tqdm(arguments.arch, unit="arch", disable=None) for row in report(architecture)]
    spilling = sorted({row["kernel"] for row in rows if row["spilled"]})
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        shown = [row for row in rows if row["problem"] == "production"]
        head = ("kernel", "arch", "dtypes", "warps", *COLUMNS)
        print(text_table(head, [[str(row[name]) for name in head] for row in shown]))
        print(f"{len(rows)} kernels compiled; spilling: {', '.join(spilling) or 'none'}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
