"""Time every op, the criterion, the postprocess and the whole detector against their peers, on the same inputs.

A provider whose result is not the reference's is reported as wrong and not timed. Prints a table of our times and each
peer's over ours (2x: the peer takes twice as long), with the floor that the memory's bandwidth sets and the share of it
reached. Everything about how to read it, and what is not measured, is in perf/README.md.
"""

import argparse
import fnmatch
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# Before torch is imported: its profiler talks much.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import compare
import detector  # noqa: F401 - registers its cases
import environment
import record
import timing
import torch
from cases import REGISTRY, Case, Shape, Workload
from record import OURS, Results, Row
from torch import Tensor
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
SHORT_NOTE = 200  # characters of an error


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def difference(found: Any, expected: Any, tolerance: float) -> str:
    """What is wrong with `found`, or nothing."""
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    for number, (a, b) in enumerate(pairs):
        if a.shape != b.shape:
            return f"result {number} has shape {list(a.shape)}, expected {list(b.shape)}"
        if tolerance < 1e-3 and not b.is_floating_point():
            if not torch.equal(a, b):
                return f"result {number} differs in {int((a != b).sum())} of {b.numel()} integers"
            continue
        a, b = a.double(), b.double()
        distance, size = (a - b).norm().item(), b.norm().item()
        if not distance <= tolerance * size:  # a NaN is wrong too
            return f"result {number} is off by {distance / size if size else distance:.2g} of its norm"
    return ""


def checked(workload: Workload) -> tuple[dict[str, Callable[[], Any]], dict[str, tuple[str, str]]]:
    """The providers whose result is right, and of the others why not: a status and a note."""
    call = _finished if workload.staged else (lambda provider: provider())
    expected = call(workload.providers[workload.reference])
    right, excluded = {}, {}
    for name, provider in workload.providers.items():
        if name == workload.reference:
            right[name] = provider
            continue
        try:
            note = difference(call(provider), expected, workload.tolerance)
        except Exception as error:  # whatever a peer may raise; ours too, and the table shows it
            excluded[name] = "failed", _short(error)
            continue
        if note:
            excluded[name] = "wrong", note
        else:
            right[name] = provider
    return {name: right[name] for name in workload.providers if name in right}, excluded


def rows_of(case: Case, shape: Shape, device: str, bandwidth: float, compiled: bool) -> list[Row]:
    """Check and measure all providers of one problem."""
    torch.manual_seed(0)
    sizes = dict(shape)
    dtype = sizes.pop("dtype")
    blank = Row(case.name, sizes, dtype, provider=OURS, status="failed")
    try:
        workload = case.build(device, getattr(torch, dtype), **sizes)
        if compiled and "eager" in workload.providers:
            torch.compiler.reset()
            with_compiled = {**workload.providers, "torch.compile": torch.compile(workload.providers["eager"])}
            workload = replace(workload, providers=with_compiled)
        right, excluded = checked(workload)
        moved = bytes_of(workload) if not workload.staged else None
    except Exception as error:  # the problem, or its reference: out of memory, most likely
        return [replace(blank, note=_short(error))]
    blank = replace(blank, bytes=moved, floor=moved / bandwidth * 1e3 if moved else None)
    found = {name: replace(blank, provider=name, status=status, note=note) for name, (status, note) in excluded.items()}
    measure = measured_stages if workload.staged else measured
    for name, values in measure(right, device).items():
        found[name] = replace(blank, provider=name, **({"status": "timed"} | values))
    return [found[name] for name in workload.providers]


def bytes_of(workload: Workload) -> int:
    """That any implementation must move: inputs read once, results written once."""
    with torch.no_grad():
        moved = [*workload.reads, *tensors(workload.providers[workload.reference]())]
    return sum(x.numel() * x.element_size() for x in moved)


def measured(calls: Mapping[str, Callable[[], Any]], device: str) -> dict[str, dict[str, Any]]:
    """For each call its counts, times and the time of its replay; a call that fails costs no other its row."""
    found: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        try:
            found[name] = asdict(timing.count(call, device))
        except Exception as error:
            found[name] = {"status": "failed", "note": _short(error)}
    sound = {name: call for name, call in calls.items() if "status" not in found[name]}
    for name, times in timing.measure(sound, device).items():
        found[name] |= asdict(times)
    if device == "cuda":
        for name, call in sound.items():
            # A wait would abort the capture, and take some of PyTorch's allocator with it.
            replay = timing.measure_replay(call) if found[name]["syncs"] == 0 else None
            found[name]["replay"] = replay.median if replay else None
    return found


def measured_stages(steps: Mapping[str, timing.Staged], device: str) -> dict[str, dict[str, Any]]:
    """As `measured`, but one provider after the other: while a step runs the next one's data is fetched."""
    found: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        try:
            times, stages = timing.measure_stages(step, device)
            counts = timing.count(lambda step=step: timing.finish(step()), device)
            found[name] = asdict(counts) | asdict(times) | {"stages": stages}
        except Exception as error:
            found[name] = {"status": "failed", "note": _short(error)}
    return found


def _finished(step: timing.Staged) -> Any:
    return timing.finish(step())


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:SHORT_NOTE]


def selected(patterns: Sequence[str]) -> list[Case]:
    cases = [case for case in REGISTRY.values() if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]
    if not cases:
        raise SystemExit(f"no case matches {' '.join(patterns)}; there are: {', '.join(REGISTRY)}")
    return cases


def prepare(device: str, parser: argparse.ArgumentParser) -> None:
    """One state of PyTorch for every measurement on `device`."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("interpreted kernels say nothing of speed: unset TRITON_INTERPRET")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    if device == "cpu":
        torch.set_num_threads(environment.cores())
    torch._logging.set_logs(all=logging.ERROR)  # that eager NMS breaks a compiled graph is known


def notes(found: Results) -> str:
    """A line for each provider that was not timed."""
    untimed = [row for row in found.rows if row.note]
    return "".join(f"{row.status}: {' '.join(row.key)}, {row.provider}: {row.note}\n" for row in untimed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="such as nms or 'nms*'")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one or two shapes a case")
    parser.add_argument("--list", action="store_true", help="print the cases and their shapes, and stop")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="print what changed since these results")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: perf/results/<device>.json for all cases at all shapes"
    )
    arguments = parser.parse_args()
    prepare(arguments.device, parser)
    try:
        baseline = record.load(arguments.baseline) if arguments.baseline else None
    except ValueError as error:
        parser.error(str(error))

    work = [
        (case, shape, shape == case.shapes_for(arguments.device, arguments.quick)[0])
        for case in selected(arguments.case)
        for shape in case.shapes_for(arguments.device, arguments.quick)
    ]
    if arguments.list:
        for case, shape, _ in work:
            print(f"{case.name:20}{record.shape_text(shape)}")
        return

    facts = environment.facts(arguments.device)
    output = arguments.output
    if output is None and arguments.case == ["*"] and not arguments.quick:
        output = FOLDER / "results" / (re.sub(r"\W+", "-", facts["device"].lower()).strip("-") + ".json")
    bandwidth = timing.copy_bandwidth(arguments.device)
    facts |= {"quick": arguments.quick, "bandwidth": round(bandwidth)}

    rows: list[Row] = []
    with tqdm(work, unit="shape", disable=None) as progress:
        for case, shape, first in progress:
            progress.set_description(f"{case.name} {record.shape_text(shape)}")
            rows += rows_of(case, shape, arguments.device, bandwidth, compiled=first)
            gc.collect()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
            if output:  # after every case, so that an interruption loses one
                Results(facts, rows).save(output)

    found = Results(facts, rows)
    print(record.table(found))
    if any(row.stages for row in rows):
        print("\n" + record.stage_table(found))
    print(f"\n{notes(found)}{record.device_text(facts)}; a copy moves {bandwidth / 1e9:.0f} GB/s")
    if baseline:
        print("\n" + compare.changes(baseline, found))
    if output:
        print(f"wrote {output}; python perf/plot.py draws it, python perf/report.py writes the README's tables")


if __name__ == "__main__":
    sys.exit(main())
