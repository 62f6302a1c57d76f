"""Measure how the time grows: vary one size of a case at a time, fit the exponents, draw log-log plots.

An exponent is the slope of log time over log size in the upper half of the sweep: 1 is linear, 2 is quadratic. 0 means
that the time does not depend on the size, or that launching hides the growth. Where ssdcore's call can be captured as a
CUDA graph, the time of the graph, which is the kernels alone, is a curve of its own.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ssdperf import environment, measurement, scaling, tables, timing
from ssdperf.results import Results, shape_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="such as nms or 'nms*'")
    parser.add_argument("--axis", nargs="+", metavar="SIZE", help="such as B A C G N (default: all sizes of a case)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="start from the smaller shape of each case")
    parser.add_argument(
        "--output", type=Path, default=Path("sweep.svg"), help="the picture to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    measurement.prepare(arguments.device, parser)
    work = [
        (case, size, scaling.shapes(case, size, arguments.device, arguments.quick))
        for case in measurement.matching_cases(arguments.case)
        for size in case.sweep
        if arguments.axis is None or size in arguments.axis
    ]
    if not work:
        parser.error("nothing to sweep: no such case has such a size")
    facts = environment.facts(arguments.device)
    bandwidth = timing.copy_bandwidth(arguments.device)
    swept: dict[scaling.Sweep, Results] = {}
    with tqdm(total=sum(len(shapes) for *_, shapes in work), unit="shape", disable=None) as progress:
        for case, size, shapes in work:
            for shape in shapes:
                progress.set_description(f"{case.name} {shape_text(shape)}")
                rows = measurement.rows_of(case, shape, arguments.device, bandwidth, compiled=False)
                swept.setdefault((case.name, size), Results(facts, [])).rows.extend(rows)
                progress.update()

    print(scaling.table(swept))
    everything = Results(facts, [row for results in swept.values() for row in results.rows])
    print(measurement.notes(everything) + measurement.left_out_text() + tables.device_text(facts))
    scaling.draw(swept, tables.device_text(facts), arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
