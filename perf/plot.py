"""Draw results: how much longer each peer takes than ssdcore, and how close ssdcore comes to the floor.

The floor is the time that the memory bandwidth alone sets.
"""

import argparse
from pathlib import Path

from ssdperf import charts, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results that perf/run.py wrote")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="folder for the pictures (default: the current folder)",
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for file in arguments.files:
        try:
            run = results.load(file)
        except ValueError as error:
            parser.error(str(error))
        for name, svg in charts.charts(run, list(run.by_key())).items():
            target = arguments.output / f"{file.stem}-{name}.svg"
            target.write_bytes(svg)
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
