"""Time every op, the criterion, the postprocess and the whole detector beside their peers, on the same inputs.

A provider whose result differs from the reference's is reported as wrong and not timed. Prints a table of ssdcore's
times and each peer's time over ssdcore's (2x: the peer takes twice as long), with the floor that the memory bandwidth
sets and the share of the floor that ssdcore reaches. perf/README.md says how to read it and what is not measured.
"""

import argparse
import gc
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ssdperf import comparison, environment, measurement, results, tables, timing
from ssdperf.results import Results, Row, shape_text

FOLDER = Path(__file__).resolve().parent / "results"


def arguments_and_parser() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="such as nms or 'nms*'")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one or two shapes per case")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin no shape after this time; the first shapes of all cases come before all others",
    )
    parser.add_argument("--list", action="store_true", help="print the cases and their shapes, and stop")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="print what changed since these results")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="results to write (default: perf/results/<device>.json if all cases run at all shapes, otherwise none)",
    )
    return parser.parse_args(), parser


def main() -> None:
    arguments, parser = arguments_and_parser()
    measurement.prepare(arguments.device, parser)
    try:
        baseline = results.load(arguments.baseline) if arguments.baseline else None
    except ValueError as error:
        parser.error(str(error))

    work = [
        (case, shape, number == 0)
        for case in measurement.selected(arguments.case)
        for number, shape in enumerate(case.shapes_for(arguments.device, arguments.quick))
    ]
    if arguments.list:
        for case, shape, _ in work:
            print(f"{case.name:20}{shape_text(shape)}")
        print(measurement.left_out_text(), end="")
        return

    facts = environment.facts(arguments.device)
    output = arguments.output
    if output is None and arguments.case == ["*"] and not arguments.quick:
        output = FOLDER / f"{environment.file_stem(facts['device'])}.json"
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
            progress.set_description(f"{case.name} {shape_text(shape)}")
            rows[number] = measurement.rows_of(case, shape, arguments.device, bandwidth, compiled=first)
            found = Results(facts, [row for key in sorted(rows) for row in rows[key]])
            if output:  # after every shape, so that an interruption loses only one
                found.save(output)
            gc.collect()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()

    print(tables.table(found))
    if any(row.stages for row in found.rows):
        print("\n" + tables.stage_table(found))
    print(f"\n{measurement.notes(found)}{measurement.left_out_text()}", end="")
    print(f"{tables.device_text(facts)}; a copy moves {bandwidth / 1e9:.0f} GB/s")
    if skipped:
        print(f"{skipped} of {len(work)} shapes were not begun within {arguments.minutes:g} minutes")
    if baseline:
        print("\n" + comparison.changes(baseline, found))
    if output:
        print(f"wrote {output}; python perf/plot.py draws it, python perf/report.py writes the README's tables")


if __name__ == "__main__":
    sys.exit(main())
