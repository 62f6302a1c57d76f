"""Compare several results: GPUs, MIG slices, commits, or the code before and after a change.

Prints our time in each file and its ratio to the time in the first file (2x: it takes twice as long), and draws the
ratios.
"""

import argparse
from pathlib import Path

from ssdperf import charts, comparison, results, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results that perf/run.py wrote")
    parser.add_argument(
        "--output", type=Path, default=Path("comparison.svg"), help="the picture to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if len(arguments.files) < 2:
        parser.error("give two files or more to compare")
    if len(set(arguments.files)) < len(arguments.files):
        parser.error("a file is named twice")
    try:
        loaded = [results.load(file) for file in arguments.files]
    except ValueError as error:
        parser.error(str(error))
    runs = dict(zip(comparison.names(arguments.files), loaded, strict=True))
    if not comparison.side_by_side(runs):
        raise SystemExit("the files have no problem in common")

    print(comparison.table(runs))
    for name, run in runs.items():
        print(f"{name}: {tables.device_text(run.facts)}")
    charts.draw_comparison(runs, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
