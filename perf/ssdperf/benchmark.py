"""A run of the benchmark: its problems in order, measured one after the other and saved after each."""

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ssdperf import results
from ssdperf.measurement import matching_cases, rows_of
from ssdperf.registry import Case, Shape
from ssdperf.results import Key, Results, Row, shape_text

# The facts that must be equal for two runs to share a file. Besides the commit there is a hash of the code, because a
# copy without git's history does not tell whether its code is that of the commit.
SHARED_FACTS = ("device", "kind", "busy", "quick", "commit", "code", "torch", "triton", "torchvision")


class Problem(NamedTuple):
    case: Case
    shape: Shape
    headline: bool

    @property
    def key(self) -> Key:
        sizes = {name: value for name, value in self.shape.items() if name != "dtype"}
        return self.case.name, shape_text(sizes), self.shape["dtype"]

    def __str__(self) -> str:
        return f"{self.case.name} {shape_text(self.shape)}"


def problems(patterns: Sequence[str], device: str, quick: bool) -> list[Problem]:
    """Return the problems of the cases that match a pattern."""
    return [
        Problem(case, shape, number == 0)
        for case in matching_cases(patterns)
        for number, shape in enumerate(case.shapes_for(device, quick))
    ]


def resumed(path: Path, facts: dict[str, Any]) -> Results:
    """Return the results in `path`, so that a run can continue them.

    Raises:
        ValueError: the file is not readable, or its results are of another commit, device or version.
    """
    found = results.load(path)
    others = [name for name in SHARED_FACTS if found.facts.get(name) != facts[name]]
    if others:
        differences = ", ".join(f"{name} {found.facts.get(name)} (now {facts[name]})" for name in others)
        raise ValueError(f"{path} holds results of {differences}: remove the file or name another --output")
    return found


def run(work: Sequence[Problem], found: Results, *, minutes: float, output: Path | None) -> tuple[Results, int]:
    """Measure the problems that `found` does not hold yet, headlines first.

    Stops early on Ctrl-C.

    Args:
        work: the problems.
        found: facts about the machine, and the rows that are known already.
        minutes: no problem begins after this time.
        output: the file to save after every problem, so that an interruption loses only one.

    Returns:
        The results in the order of `work`, and how many problems were not measured.
    """
    device, bandwidth = found.facts["kind"], found.facts["bandwidth"]
    started = time.monotonic()
    position = {problem.key: number for number, problem in enumerate(work)}
    rows: dict[Key, list[Row]] = {key: list(by_provider.values()) for key, by_provider in found.by_key().items()}
    order = sorted((problem for problem in work if problem.key not in rows), key=lambda problem: not problem.headline)
    left = len(order)
    with tqdm(order, unit="shape", disable=None) as progress:
        for problem in progress:
            if time.monotonic() - started > 60 * minutes:
                break
            progress.set_description(str(problem))
            if progress.disable:  # no terminal: a line for each problem, so that a log shows where a run hangs
                print(f"{len(order) - left + 1} of {len(order)}: {problem}", file=sys.stderr, flush=True)
            try:
                rows[problem.key] = rows_of(problem.case, problem.shape, device, bandwidth, compiled=problem.headline)
            except KeyboardInterrupt:
                print(f"interrupted: {problem} is not measured", file=sys.stderr)
                break
            left -= 1
            keys = sorted(rows, key=lambda key: position.get(key, len(work)))
            found = Results(found.facts, [row for key in keys for row in rows[key]])
            if output:
                found.save(output)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return found, left
