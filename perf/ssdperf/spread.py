"""Repeated runs on one machine: how far the figures of each problem spread, alone and with a busy core."""

from collections.abc import Callable, Iterable

from ssdperf.results import OURS, Key, Results, Row
from ssdperf.text import markdown_table, ratio_text, time_text

Rows = list[dict[str, Row]]  # the rows of one problem by provider, one entry per run


def first_runs(runs: dict[str, Results]) -> dict[str, Results]:
    """Return the first run of each commit on each device, by the stem of its file; runs with a busy core come last."""
    found: dict[tuple[object, ...], tuple[str, Results]] = {}
    for stem, run in sorted(runs.items(), key=lambda item: (_is_busy(item[1]), item[0])):
        found.setdefault(_subject(run), (stem, run))
    return dict(found.values())


def spread(runs: dict[str, Results], first: Results) -> str:
    """Return a table of the problems measured both alone and with a busy core; empty if there are none.

    Repetitions are runs of the same commit on the same device. Each figure is the range of the medians of all runs that
    hold the problem.
    """
    repetitions = [run for run in runs.values() if _subject(run) == _subject(first)]
    quiet = [run for run in repetitions if not _is_busy(run)]
    busy = [run for run in repetitions if _is_busy(run)]
    if not quiet or not busy:
        return ""
    lines = []
    for key in first.by_key():
        alone, beside = _rows_of(key, quiet), _rows_of(key, busy)
        if alone and beside:
            slower = _median(beside) / _median(alone)
            lines.append([f"`{key[0]}`", key[1], *_figures(alone), *_figures(beside), ratio_text(slower)])
    header = ["op", "shape", "runs", "ssdcore alone", "torchvision"]
    return markdown_table([*header, "runs", "ssdcore, one core busy", "torchvision", "slower by"], lines)


def _subject(run: Results) -> tuple[object, ...]:
    """What was measured: the device and the commit."""
    return run.facts["device"], run.facts["kind"], run.facts.get("commit")


def _is_busy(run: Results) -> bool:
    return bool(run.facts.get("busy"))


def _rows_of(key: Key, runs: Iterable[Results]) -> Rows:
    """The rows of a problem in the runs that timed ssdcore on it; none of a whole detector, which has stages."""
    found = [run.by_key().get(key, {}) for run in runs]
    return [rows for rows in found if OURS in rows and rows[OURS].status == "timed" and not rows[OURS].stages]


def _median(rows: Rows) -> float:
    times = sorted(providers[OURS].median or 0.0 for providers in rows)
    return times[len(times) // 2]


def _figures(rows: Rows) -> list[str]:
    """The number of runs, the range of our times, and the range of torchvision's times over ours."""
    times = [providers[OURS].median for providers in rows]
    peers = [providers.get("torchvision") for providers in rows]
    ratios = [peer.median / time for peer, time in zip(peers, times, strict=True) if peer and peer.median and time]
    return [str(len(rows)), _range(times, time_text), _range(ratios, ratio_text)]


def _range(values: Iterable[float | None], as_text: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    texts = dict.fromkeys(as_text(value) for value in (min(known), max(known))) if known else {}
    return " to ".join(texts)
