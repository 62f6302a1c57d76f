"""Time every op, the criterion, the postprocess and the whole detector beside their peers, on the same inputs.

A provider whose result differs from the reference's is reported as wrong and not timed. Prints a table of ssdcore's
times and each peer's time over ssdcore's (2x: the peer takes twice as long), with the floor that the memory bandwidth
sets and the share of the floor that ssdcore reaches. perf/README.md says how to read it and what is not measured.
"""

import argparse
import contextlib
import math
import sys
from pathlib import Path

import torch

from ssdperf import benchmark, comparison, environment, measurement, results, tables, timing
from ssdperf.busy import one_core_busy
from ssdperf.progress import UNFINISHED
from ssdperf.results import Results

FOLDER = Path(__file__).resolve().parent / "results"


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="such as nms or 'nms*'")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one to three shapes per case")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin no shape after this time; the first shapes of all cases come before all others. Without --case and "
        "--quick it needs --output or --resume, because an unfinished run would overwrite the results of a full run",
    )
    parser.add_argument(
        "--busy", action="store_true", help="keep a core busy with another process all the while; the results say so"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and their shapes, and stop")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="print what changed since these results")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="results to write (default: perf/results/<device>.json, which is overwritten; with --case or --quick, "
        "none)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the results in the output file: measure only what they do not hold, with their bandwidth. The "
        "file must be of the same commit, code, device and versions. Otherwise nothing is measured and nothing is "
        "overwritten, because the facts at the head of a file hold for all of its rows and may be hard to measure "
        f"again. Exits with {UNFINISHED} if shapes remain.",
    )
    return parser


def main() -> int:
    parser = arguments_parser()
    arguments = parser.parse_args()
    saved_by_default = arguments.case == ["*"] and not arguments.quick
    if arguments.output is None and not arguments.list:
        if arguments.resume and not saved_by_default:
            parser.error("--resume needs --output with --case or --quick")
        if saved_by_default and not arguments.resume and math.isfinite(arguments.minutes):
            reason = "an unfinished run would overwrite the results of a full run"
            parser.error(f"--minutes needs --output or --resume, because {reason}")
    measurement.prepare(arguments.device, parser)
    work = benchmark.problems(arguments.case, arguments.device, arguments.quick)
    if arguments.list:
        for case, shape, _ in work:
            print(f"{case.name:20}{results.shape_text(shape)}")
        print(measurement.left_out_text(), end="")
        return 0

    facts = environment.facts(arguments.device) | {"quick": arguments.quick, "busy": arguments.busy}
    output = arguments.output
    if output is None and saved_by_default:
        output = FOLDER / f"{environment.file_stem(facts['device'])}{'-busy' if arguments.busy else ''}.json"
    try:
        baseline = results.load(arguments.baseline) if arguments.baseline else None
        found = benchmark.resumed(output, facts) if arguments.resume and output.exists() else None
    except ValueError as error:
        parser.error(str(error))
    with one_core_busy() if arguments.busy else contextlib.nullcontext():
        if found is None:
            found = Results(facts | {"bandwidth": round(timing.copy_bandwidth(arguments.device))}, [])
        found, left = benchmark.run(work, found, minutes=arguments.minutes, output=output)

    print(tables.table(found))
    if any(row.stages for row in found.rows):
        print("\n" + tables.phase_table(found))
    print(f"\n{measurement.notes(found)}{measurement.left_out_text()}", end="")
    print(f"{tables.device_text(found.facts)}; a copy moves {found.facts['bandwidth'] / 1e9:.0f} GB/s")
    if left:
        limit = "" if math.isinf(arguments.minutes) else f" within {arguments.minutes:g} minutes"
        print(f"{left} of {len(work)} shapes were not begun{limit}")
    if baseline:
        print("\n" + comparison.changes(baseline, found))
    if output:
        print(f"wrote {output}; python perf/plot.py draws it, python perf/report.py writes the README's tables")
    return UNFINISHED if arguments.resume and left else 0


if __name__ == "__main__":
    sys.exit(main())
