"""Solve problems of every op once at full size, and compare ssdcore's results with those of eager.

Decisions must be equal, losses and gradients close, and a second run of ssdcore must give the same bits. The kernels
whose programs wait for one another come first. The problems of each subject are solved in a process of their own under
a time limit of their own, so that a kernel that hangs fails by name and the next subject goes on.

On a CPU the kernels run in Triton's interpreter, on small problems.
"""

import argparse
import functools
import math
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path

from ssdperf import environment, isolation
from ssdperf.isolation import LEFT, Outcome
from ssdperf.progress import FAILED, PASSED, UNFINISHED, Progress
from ssdperf.text import text_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="kill what is not finished by then")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="keep what passed in this file, and leave it out in the next call on the same device with the same code; "
        f"exits with {UNFINISHED} if problems remain (default: none)",
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, so before the kernels' import
        # The problems hold 0/0 and infinities on purpose, and NumPy warns about each under the interpreter.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    else:
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: PyTorch finds no GPU")
    from ssdperf.checks import SUBJECTS, solve

    progress = None
    if arguments.output:
        progress = Progress(arguments.output, environment.identity(arguments.device, "kernels", "ssdcore", "perf"))
        if progress.restarted:
            print(f"{arguments.output} was of other code or another device: beginning anew", flush=True)
    passed = set(progress.names(PASSED)) if progress else set()
    failed_before = progress.names(FAILED) if progress else []

    groups = []
    for subject in SUBJECTS:
        names = [problem.name for problem in subject.problems(arguments.device) if problem.name not in passed]
        # Last, so that a problem that hangs does not keep the problems after it from being solved in every call.
        names.sort(key=failed_before.__contains__)
        groups.append(isolation.Group(names, subject.limit_on(arguments.device)))
    # After a fork the GPU cannot be used. Without a GPU a fork spares each process the import of torch.
    context = multiprocessing.get_context("fork" if arguments.device == "cpu" else "spawn")
    solve_here = functools.partial(solve, device=arguments.device)
    found: list[Outcome] = []
    for outcome in isolation.solve_groups(solve_here, groups, context, deadline - time.monotonic()):
        found.append(outcome)
        if outcome.status != LEFT:
            print(f"{outcome.status}  {outcome.seconds:6.2f} s  {outcome.name}", flush=True)
            if progress:
                progress.record(outcome.name, outcome.status, outcome.note)

    failures = [outcome for outcome in found if outcome.status == FAILED]
    left = sum(outcome.status == LEFT for outcome in found)
    print(f"\n{len(found) - len(failures) - left} passed, {len(failures)} failed, {left} were not solved", end="")
    print(f", {len(passed)} had passed before" if passed else "")
    if failures:
        print(text_table(["problem", "what is wrong"], [[outcome.name, outcome.note] for outcome in failures]))
    return 1 if failures else UNFINISHED if left else 0


if __name__ == "__main__":
    sys.exit(main())
