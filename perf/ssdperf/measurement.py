"""From a case and a shape to rows of results: build the inputs, check every provider, time the right ones."""

import argparse
import fnmatch
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from ssdcore.cores import usable_cores
from ssdperf import counting, timing
from ssdperf.cases import LEFT_OUT
from ssdperf.registry import REGISTRY, Case, Shape, Workload
from ssdperf.results import OURS, Results, Row

MAX_NOTE = 200  # characters that a row keeps of an error message


def prepare(device: str, parser: argparse.ArgumentParser) -> None:
    """Bring PyTorch into the state in which everything is measured on `device`; exit if that is impossible."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("the speed of interpreted kernels means nothing: unset TRITON_INTERPRET")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    if device == "cpu":
        torch.set_num_threads(usable_cores())
    # Dynamo reports that eager's decisions break a compiled graph. That is known.
    torch._logging.set_logs(all=logging.ERROR)
    warnings.filterwarnings("ignore", module="torch._dynamo")


def matching_cases(patterns: Sequence[str]) -> list[Case]:
    """Return the registered cases whose names match a pattern; exit if no name does."""
    cases = [case for case in REGISTRY.values() if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]
    if not cases:
        raise SystemExit(
            f"no case matches {' '.join(patterns)}; there are: {', '.join(REGISTRY)}\n{left_out_text()}".rstrip()
        )
    return cases


def left_out_text() -> str:
    """Return a line that names the cases which this machine cannot run, and why; "" if it can run all."""
    reasons = "; ".join(dict.fromkeys(LEFT_OUT.values()))
    return f"left out: {', '.join(LEFT_OUT)} ({reasons})\n" if LEFT_OUT else ""


def notes(found: Results) -> str:
    """Return a line for each provider that was not timed."""
    noted = [row for row in found.rows if row.note]
    return "".join(f"{row.status}: {' '.join(row.key)}, {row.provider}: {row.note}\n" for row in noted)


def rows_of(case: Case, shape: Shape, device: str, bandwidth: float, compiled: bool) -> list[Row]:
    """Check and measure all providers of one problem.

    Args:
        case: the kind of problem.
        shape: its sizes and dtype.
        device: "cpu" or "cuda".
        bandwidth: bytes per second, for the floor.
        compiled: whether torch.compile of eager is a provider too, if the case compiles.

    Returns:
        A row for each provider; a single failed row if the inputs cannot be built.
    """
    torch.manual_seed(0)
    sizes = dict(shape)
    dtype = sizes.pop("dtype")
    blank = Row(case.name, sizes, dtype, provider=OURS, status="failed")
    try:
        workload = case.build(device, getattr(torch, dtype), **sizes)
    except Exception as error:  # most likely out of memory
        stop_if_gpu_is_lost(error)
        return [replace(blank, note=f"its inputs: {error_text(error)}")]
    if compiled and case.compiles:
        torch.compiler.reset()
        with_compiled = {**workload.providers, "torch.compile": torch.compile(workload.providers["eager"])}
        workload = replace(workload, providers=with_compiled)
    right, excluded, result = checked(workload)
    if right and not workload.phased:
        moved = size_of([*workload.reads, result])
        blank = replace(blank, bytes=moved, floor=moved / bandwidth * 1e3)
    del result
    found = {name: replace(blank, provider=name, status=status, note=note) for name, (status, note) in excluded.items()}
    values_of = measured_phases(right, device, workload) if workload.phased else measured(right, device)
    for name, values in values_of.items():
        found[name] = replace(blank, provider=name, **({"status": "timed"} | values))
    return [found[name] for name in workload.providers]


def checked(workload: Workload) -> tuple[dict[str, Callable[[], Any]], dict[str, tuple[str, str]], Any]:
    """Run every provider once and compare its result with the reference's.

    If the reference fails, the next provider that does not fail takes its place.

    Returns:
        The providers whose result is right; for each other provider its status and a note; and the right result.
    """
    excluded: dict[str, tuple[str, str]] = {}
    right: list[str] = []
    expected = None
    for name in [workload.reference, *(name for name in workload.providers if name != workload.reference)]:
        try:
            result = _result(workload, name)
            note = workload.difference(result, expected) if right else ""
        except Exception as error:  # a peer may raise anything; so may ssdcore, and the table shows it
            stop_if_gpu_is_lost(error)
            excluded[name] = "failed", error_text(error)
            continue
        if note:
            excluded[name] = "wrong", note
            continue
        if not right:
            expected = result
        right.append(name)
    return {name: call for name, call in workload.providers.items() if name in right}, excluded, expected


def _result(workload: Workload, name: str) -> Any:
    """Return a provider's result. Nothing of the provider keeps running."""
    call = workload.providers[name]
    if not workload.phased:
        return call()
    result = timing.finish(call())
    workload.close()
    return result


def size_of(tensors: Any) -> int:
    """Return the bytes of all tensors in nested containers: what is read once or written once."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(size_of, tensors.values() if isinstance(tensors, Mapping) else tensors))


def measured(calls: Mapping[str, Callable[[], Any]], device: str) -> dict[str, dict[str, Any]]:
    """Return for each call its counts, its times and the times of its replay. A call that fails spoils no other."""
    found: dict[str, dict[str, Any]] = {}

    def attempt(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            found[name] = found.get(name, {}) | measure()
        except Exception as error:
            stop_if_gpu_is_lost(error)
            found[name] = {"status": "failed", "note": error_text(error)}

    for name, call in calls.items():
        attempt(name, lambda call=call: asdict(counting.count(call, device)))
    sound = {name: call for name, call in calls.items() if "status" not in found[name]}
    try:
        times = timing.measure(sound, device)
    except Exception as error:  # timing each call alone shows which call failed
        stop_if_gpu_is_lost(error)
        times = {}
        for name, call in sound.items():
            attempt(name, lambda name=name, call=call: asdict(timing.measure({name: call}, device)[name]))
    for name, measured_times in times.items():
        found[name] |= asdict(measured_times)
    if device == "cuda":
        for name, call in sound.items():
            # None if the profiler does not see the GPU. `measure_replay` looks for waits itself.
            if "status" not in found[name] and not found[name]["syncs"]:
                found[name] |= _replay(call)
    return found


def _replay(call: Callable[[], Any]) -> dict[str, Any]:
    """The times of a replay; or a note, if the call cannot be captured, because its own times are known already."""
    try:
        times = timing.measure_replay(call)
    except Exception as error:
        stop_if_gpu_is_lost(error)
        return {"note": f"no replay: {error_text(error)}"}
    return {"replay": times.median, "replay_p10": times.p10, "replay_p90": times.p90} if times else {}


def measured_phases(steps: Mapping[str, timing.Phased], device: str, workload: Workload) -> dict[str, dict[str, Any]]:
    """Do the same as `measured` for calls with phases.

    The providers run one after the other, because the next step's data may be fetched while a step runs.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        try:
            times, whole, shares = timing.measure_phases(step, device, workload.ahead)
            counts = counting.count(lambda step=step: timing.finish(step()), device)
            found[name] = asdict(counts) | asdict(times) | {"whole": whole, "stages": shares}
        except Exception as error:
            stop_if_gpu_is_lost(error)
            found[name] = {"status": "failed", "note": error_text(error)}
        workload.close()
    return found


def stop_if_gpu_is_lost(error: Exception) -> None:
    """Exit if this process can no longer use the GPU. What was measured before is saved by then."""
    if gpu_is_lost():
        raise SystemExit(f"the GPU no longer answers, after {error_text(error)}") from error


def gpu_is_lost() -> bool:
    """Tell whether this process can no longer use the GPU, as after a kernel's illegal memory access."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


def error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_NOTE]
