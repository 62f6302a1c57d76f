"""Several results side by side: GPUs, MIG slices, commits, or one code before and after a change.

Prints our time in each file and its ratio to the first file's (2x: twice as long), and draws the ratios.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import record
from record import OURS, Results, Row

NOISE = 1.05  # medians closer than this say nothing
NOISE_OF_FEW = 1.2  # nor these, of fewer runs than have deciles
FEW = 5


def differs(before: Row, after: Row) -> bool:
    """Whether two timings are told apart: the medians by more than noise, and their middle eighty per cent disjoint.

    That of the whole call, or of its replay, which a change to a kernel may show alone.
    """
    few = min(before.runs, after.runs) < FEW
    whole = _apart((before.median, before.p10, before.p90), (after.median, after.p10, after.p90), few)
    if before.replay is None or after.replay is None:
        return whole
    replays = [(row.replay, row.replay_p10, row.replay_p90) for row in (before, after)]
    return whole or _apart(*replays, few)


def _apart(before: tuple[float, float, float], after: tuple[float, float, float], few: bool) -> bool:
    (median, p10, p90), (later, later_p10, later_p90) = before, after
    ratio = max(median / later, later / median)
    return ratio > (NOISE_OF_FEW if few else NOISE) and (later_p10 > p90 or later_p90 < p10)


def changes(baseline: Results, found: Results) -> str:
    """Every problem that both hold and that got faster or slower, the worst first, and what their machines share."""
    old, new = baseline.by_key(), found.by_key()
    lines = []
    common = [key for key in new if OURS in new[key] and OURS in old.get(key, {})]
    for key in common:
        before, after = old[key][OURS], new[key][OURS]
        if before.status == after.status == "timed":
            if differs(before, after):
                old_time, new_time = _comparable([before, after])
                line = [record.time_text(old_time), record.time_text(new_time), f"{new_time / old_time:.2f}x"]
                lines.append((new_time / old_time, [*key, *line]))
        elif before.status != after.status:
            lines.append((math.inf, [*key, before.status, after.status, ""]))
    lines.sort(key=lambda line: -line[0])
    text = f"{len(common)} problems in common, {len(lines)} changed"
    if lines:
        text += "\n" + record.text_table(["case", "shape", "dtype", "before", "after", ""], [line for _, line in lines])
    if baseline.facts["device"] != found.facts["device"]:
        text += f"\nnot the same device: {baseline.facts['device']} before, {found.facts['device']} after"
    return text


def _comparable(rows: Sequence[Row | None]) -> list[float | None]:
    """The kernels' own times if all rows have them, else the whole calls'."""
    timed = [row if row and row.status == "timed" else None for row in rows]
    if all(row is None or row.replay is not None for row in timed):
        return [row and row.replay for row in timed]
    return [row and row.median for row in timed]


def side_by_side(runs: dict[str, Results]) -> list[tuple[record.Key, list[float | None]]]:
    """Our time of every problem that at least two runs hold, one for each run."""
    tables = [run.by_key() for run in runs.values()]
    found = []
    for key in dict.fromkeys(key for table in tables for key in table):
        times = _comparable([table.get(key, {}).get(OURS) for table in tables])
        if sum(time is not None for time in times) > 1:
            found.append((key, times))
    return found


def table(runs: dict[str, Results]) -> str:
    lines = []
    for key, times in side_by_side(runs):
        cells = [
            record.time_text(time) + (f" ({time / times[0]:.2f}x)" if time and times[0] and number else "")
            for number, time in enumerate(times)
        ]
        lines.append([*key, *cells])
    return record.text_table(["case", "shape", "dtype", *runs], lines)


def names(files: Sequence[Path]) -> list[str]:
    """The files' names, with as many folders as it takes to tell them apart."""
    for depth in range(1, max(len(file.parts) for file in files) + 1):
        found = ["/".join(file.with_suffix("").parts[-depth:]) for file in files]
        if len(set(found)) == len(found):
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what perf/run.py wrote")
    parser.add_argument("--output", type=Path, default=Path("comparison.svg"), help="picture (default: %(default)s)")
    arguments = parser.parse_args()
    if len(arguments.files) < 2:
        parser.error("comparing takes two files or more")
    if len(set(arguments.files)) < len(arguments.files):
        parser.error("a file is named twice")
    try:
        loaded = [record.load(file) for file in arguments.files]
    except ValueError as error:
        parser.error(str(error))
    runs = dict(zip(names(arguments.files), loaded, strict=True))
    if not side_by_side(runs):
        raise SystemExit("the files have no problem in common")

    import plot

    print(table(runs))
    for name, run in runs.items():
        print(f"{name}: {record.device_text(run.facts)}")
    plot.draw_comparison(runs, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
