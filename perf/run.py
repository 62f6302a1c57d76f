"""Time every op against plain PyTorch and torchvision, in turn, on the same inputs.

A provider whose result does not match eager's is reported as wrong and not timed. Prints a table and writes it, with
the device, versions and commit, as JSON. Times are medians in milliseconds, launch overhead included; on the GPU with
CUDA events, its cache overwritten before every run.
"""

import argparse
import datetime
import json
import platform
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from cases import Case, cases
from timing import measure
from torch import Tensor
from tqdm import tqdm

FOLDER = Path(__file__).parent
TOLERANCE = 0.05  # |a - b| / |b|: 16 bits, and a near tie in mining that goes the other way, one row in thousands


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def matches(found: Any, expected: Any) -> bool:
    """Whether indices are equal, and the numbers of each tensor within `TOLERANCE` of its norm."""
    pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
    return all(
        a.shape == b.shape
        and (
            bool((a.float() - b.float()).norm() <= TOLERANCE * b.float().norm())
            if a.is_floating_point()
            else torch.equal(a, b)
        )
        for a, b in pairs
    )


def rows_of(case: Case, device: str) -> list[dict[str, Any]]:
    expected = case.providers["eager"]()
    rows = []
    for provider, call in case.providers.items():
        row: dict[str, Any] = {"case": case.name, "shape": case.shape, "dtype": case.dtype, "provider": provider}
        if matches(call(), expected):
            row |= asdict(measure(call, device))
        else:
            row["wrong"] = True
        rows.append(row)
    return rows


def environment(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=FOLDER, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=FOLDER, capture_output=True, text=True)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "triton": triton_version,
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'case':32}{'shape':28}{'dtype':10}{'ssdcore ms':>12}{'eager':>9}{'torchvision':>13}"]
    for case in dict.fromkeys((row["case"], row["shape"], row["dtype"]) for row in rows):
        by_provider = {row["provider"]: row for row in rows if (row["case"], row["shape"], row["dtype"]) == case}
        ours = by_provider["ssdcore"].get("median")
        cells = []
        for provider in ("eager", "torchvision"):
            theirs = by_provider[provider].get("median")
            cells.append(f"{theirs / ours:.2f}x" if ours and theirs else "wrong")
        mine = f"{ours:.3f}" if ours else "wrong"
        lines.append(f"{case[0]:32}{case[1]:28}{case[2]:10}{mine:>12}{cells[0]:>9}{cells[1]:>13}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small batches")
    parser.add_argument("--output", type=Path, help="default: perf/results/<device>.json on a GPU, none on a CPU")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    rows = []
    with tqdm(cases(arguments.device, arguments.quick), unit="case") as progress:
        for case in progress:
            progress.set_description(f"{case.name} {case.shape}")
            rows += rows_of(case, arguments.device)
    facts = environment(arguments.device)
    print(table(rows))
    print("eager and torchvision: their time over ours;", ", ".join(f"{k} {v}" for k, v in facts.items() if v))
    output = arguments.output
    if output is None and arguments.device == "cuda":
        output = FOLDER / "results" / (re.sub(r"\W+", "-", facts["device"].lower()) + ".json")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        print(f"wrote {output}")


if __name__ == "__main__":
    main()
