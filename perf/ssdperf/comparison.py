"""Several results side by side, and what changed from one to the next."""

import math
from collections.abc import Sequence
from pathlib import Path

from ssdperf.results import OURS, Key, Results, Row
from ssdperf.text import text_table, time_text

NOISE = 1.05  # medians whose ratio is smaller may be equal
NOISE_OF_FEW = 1.2  # the same for measurements of fewer than `FEW` runs, whose deciles say little
FEW = 5


def differs(before: Row, after: Row) -> bool:
    """Tell whether two timings differ: their medians by more than noise, and p10 to p90 do not overlap.

    It is enough if the replays differ, because launching may hide a change to a kernel in the time of the whole call.
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
    """Return a table of the problems in both results that became faster or slower, the worst first."""
    old, new = baseline.by_key(), found.by_key()
    lines = []
    common = [key for key in new if OURS in new[key] and OURS in old.get(key, {})]
    for key in common:
        before, after = old[key][OURS], new[key][OURS]
        if before.status == after.status == "timed":
            if differs(before, after):
                old_time, new_time = _comparable([before, after])
                line = [time_text(old_time), time_text(new_time), f"{new_time / old_time:.2f}x"]
                lines.append((new_time / old_time, [*key, *line]))
        elif before.status != after.status:
            lines.append((math.inf, [*key, before.status, after.status, ""]))
    lines.sort(key=lambda line: -line[0])
    text = f"{len(common)} problems in common, {len(lines)} changed"
    if lines:
        text += "\n" + text_table(["case", "shape", "dtype", "before", "after", ""], [line for _, line in lines])
    if baseline.facts["device"] != found.facts["device"]:
        text += f"\nnot the same device: {baseline.facts['device']} before, {found.facts['device']} after"
    return text


def _comparable(rows: Sequence[Row | None]) -> list[float | None]:
    """Return the times of the replays if every timed row has one, otherwise the times of the whole calls."""
    timed = [row if row and row.status == "timed" else None for row in rows]
    if all(row is None or row.replay is not None for row in timed):
        return [row and row.replay for row in timed]
    return [row and row.median for row in timed]


def side_by_side(runs: dict[str, Results]) -> list[tuple[Key, list[float | None]]]:
    """Return our time in each run, for every problem that at least two runs hold."""
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
        entries = [
            time_text(time) + (f" ({time / times[0]:.2f}x)" if time and times[0] and number else "")
            for number, time in enumerate(times)
        ]
        lines.append([*key, *entries])
    return text_table(["case", "shape", "dtype", *runs], lines)


def names(files: Sequence[Path]) -> list[str]:
    """Return the files' names, each with as many of its folders as it takes to tell all files apart."""
    for depth in range(1, max(len(file.parts) for file in files) + 1):
        found = ["/".join(file.with_suffix("").parts[-depth:]) for file in files]
        if len(set(found)) == len(found):
            break
    return found
