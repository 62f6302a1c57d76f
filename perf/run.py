"""Time every op, the criterion, the postprocess and the whole detector against their peers, on the same inputs.

A provider whose result is not the reference's is reported as wrong and not timed. Prints a table of our times and each
peer's over ours (2x: the peer takes twice as long), with the floor that the memory's bandwidth sets and the share of it
reached. Everything about how to read it, and what is not measured, is in perf/README.md.
"""

import argparse
import fnmatch
import gc
import logging
import math
import os
import re
import sys
import time
import warnings
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
from tqdm import tqdm

from ssdcore.cores import usable_cores

FOLDER = Path(__file__).resolve().parent
SHORT_NOTE = 200  # characters of an error


def checked(workload: Workload) -> tuple[dict[str, Callable[[], Any]], dict[str, tuple[str, str]], Any]:
    """The providers whose result is right; of the others why not, as a status and a note; and the right result.

    Should the reference fail, the next provider that does not takes its place.
    """
    excluded: dict[str, tuple[str, str]] = {}
    right: list[str] = []
    expected = None
    for name in [workload.reference, *(name for name in workload.providers if name != workload.reference)]:
        try:
            result = _finished(workload, name)
            note = workload.difference(result, expected) if right else ""
        except Exception as error:  # whatever a peer may raise; ours too, and the table shows it
            _stop_if_lost(error)
            excluded[name] = "failed", _short(error)
            continue
        if note:
            excluded[name] = "wrong", note
            continue
        if not right:
            expected = result
        right.append(name)
    return {name: call for name, call in workload.providers.items() if name in right}, excluded, expected


def rows_of(case: Case, shape: Shape, device: str, bandwidth: float, compiled: bool) -> list[Row]:
    """Check and measure all providers of one problem."""
    torch.manual_seed(0)
    sizes = dict(shape)
    dtype = sizes.pop("dtype")
    blank = Row(case.name, sizes, dtype, provider=OURS, status="failed")
    try:
        workload = case.build(device, getattr(torch, dtype), **sizes)
    except Exception as error:  # out of memory, most likely
        _stop_if_lost(error)
        return [replace(blank, note=f"its inputs: {_short(error)}")]
    if compiled and case.compiles:
        torch.compiler.reset()
        with_compiled = {**workload.providers, "torch.compile": torch.compile(workload.providers["eager"])}
        workload = replace(workload, providers=with_compiled)
    right, excluded, result = checked(workload)
    if right and not workload.staged:
        moved = size_of([*workload.reads, result])
        blank = replace(blank, bytes=moved, floor=moved / bandwidth * 1e3)
    del result
    found = {name: replace(blank, provider=name, status=status, note=note) for name, (status, note) in excluded.items()}
    values_of = measured_stages(right, device, workload) if workload.staged else measured(right, device)
    for name, values in values_of.items():
        found[name] = replace(blank, provider=name, **({"status": "timed"} | values))
    return [found[name] for name in workload.providers]


def size_of(tensors: Any) -> int:
    """Bytes of all tensors in nested containers: what is read once or written once."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(size_of, tensors.values() if isinstance(tensors, Mapping) else tensors))


def measured(calls: Mapping[str, Callable[[], Any]], device: str) -> dict[str, dict[str, Any]]:
    """For each call its counts, times and those of its replay; a call that fails costs no other its row."""
    found: dict[str, dict[str, Any]] = {}

    def attempt(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            found[name] = found.get(name, {}) | measure()
        except Exception as error:
            _stop_if_lost(error)
            found[name] = {"status": "failed", "note": _short(error)}

    for name, call in calls.items():
        attempt(name, lambda call=call: asdict(timing.count(call, device)))
    sound = {name: call for name, call in calls.items() if "status" not in found[name]}
    try:
        times = timing.measure(sound, device)
    except Exception as error:  # whose it is shows when each is alone
        _stop_if_lost(error)
        times = {}
        for name, call in sound.items():
            attempt(name, lambda name=name, call=call: asdict(timing.measure({name: call}, device)[name]))
    for name, measured_times in times.items():
        found[name] |= asdict(measured_times)
    if device == "cuda":
        for name, call in sound.items():
            if found[name].get("syncs") == 0:
                attempt(name, lambda call=call: _replay(call))
    return found


def _replay(call: Callable[[], Any]) -> dict[str, float]:
    times = timing.measure_replay(call)
    return {"replay": times.median, "replay_p10": times.p10, "replay_p90": times.p90} if times else {}


def measured_stages(steps: Mapping[str, timing.Staged], device: str, workload: Workload) -> dict[str, dict[str, Any]]:
    """As `measured`, but one provider after the other: while a step runs the next one's data may be fetched."""
    found: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        try:
            times, whole, stages = timing.measure_stages(step, device, workload.ahead)
            counts = timing.count(lambda step=step: timing.finish(step()), device)
            found[name] = asdict(counts) | asdict(times) | {"whole": whole, "stages": stages}
        except Exception as error:
            _stop_if_lost(error)
            found[name] = {"status": "failed", "note": _short(error)}
        workload.close()
    return found


def _finished(workload: Workload, name: str) -> Any:
    """A provider's result, with nothing of it left running."""
    call = workload.providers[name]
    if not workload.staged:
        return call()
    result = timing.finish(call())
    workload.close()
    return result


def _stop_if_lost(error: Exception) -> None:
    """After some errors a GPU answers nothing more; what has been measured is saved by then."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise SystemExit(f"the GPU no longer answers, after {_short(error)}") from error


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
        torch.set_num_threads(usable_cores())
    # That eager's decisions break a compiled graph is known.
    torch._logging.set_logs(all=logging.ERROR)
    warnings.filterwarnings("ignore", module="torch._dynamo")


def notes(found: Results) -> str:
    """A line for each provider that was not timed."""
    untimed = [row for row in found.rows if row.note]
    return "".join(f"{row.status}: {' '.join(row.key)}, {row.provider}: {row.note}\n" for row in untimed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="such as nms or 'nms*'")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one or two shapes a case")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="start no shape after so many; the first of each case come first",
    )
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
        (case, shape, number == 0)
        for case in selected(arguments.case)
        for number, shape in enumerate(case.shapes_for(arguments.device, arguments.quick))
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

    started = time.monotonic()
    rows: dict[int, list[Row]] = {}
    skipped = 0
    found = Results(facts, [])
    order = sorted(range(len(work)), key=lambda number: not work[number][2])  # headlines first
    with tqdm(order, unit="shape", disable=None) as progress:
        for number in progress:
            case, shape, first = work[number]
            if time.monotonic() - started > 60 * arguments.minutes:
                skipped += 1
                continue
            progress.set_description(f"{case.name} {record.shape_text(shape)}")
            rows[number] = rows_of(case, shape, arguments.device, bandwidth, compiled=first)
            found = Results(facts, [row for key in sorted(rows) for row in rows[key]])
            if output:  # after every shape, so that an interruption loses one
                found.save(output)
            gc.collect()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()

    print(record.table(found))
    if any(row.stages for row in found.rows):
        print("\n" + record.stage_table(found))
    print(f"\n{notes(found)}{record.device_text(facts)}; a copy moves {bandwidth / 1e9:.0f} GB/s")
    if skipped:
        print(f"{skipped} of {len(work)} shapes were not begun within {arguments.minutes:g} minutes")
    if baseline:
        print("\n" + compare.changes(baseline, found))
    if output:
        print(f"wrote {output}; python perf/plot.py draws it, python perf/report.py writes the README's tables")


if __name__ == "__main__":
    sys.exit(main())
