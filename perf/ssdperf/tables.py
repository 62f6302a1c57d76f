"""Results as tables for a terminal."""

from typing import Any

from ssdperf.results import OURS, Results, Row
from ssdperf.text import bytes_text, ratio_text, share_text, text_table, time_text


def machine_text(facts: dict[str, Any]) -> str:
    threads = f", {facts['threads']} threads" if facts.get("threads") else ""
    return facts["device"] + threads + (", another process keeps a core busy" if facts.get("busy") else "")


def device_text(facts: dict[str, Any]) -> str:
    """Return the machine, the versions, the commit and the date in one line."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "torchvision") if facts.get(name))
    commit = (facts.get("commit") or "unknown")[:10] + (" with changes" if facts.get("modified") else "")
    return f"{machine_text(facts)}; {versions}; commit {commit}, {facts['date'][:10]}"


def peer_text(row: Row | None, ours: Row | None) -> str:
    """Return a peer's time as a multiple of ours, or why there is none."""
    if row is None:
        return ""
    if row.status != "timed":
        return row.status
    return ratio_text(row.median / ours.median) if ours and ours.median else time_text(row.median)


def table(results: Results) -> str:
    """Return a line per problem: what it costs us, and each peer's time as a multiple of ours."""
    peers = results.peers
    header = ["case", "shape", "dtype", OURS, "p10", "p90", "replay", *peers, "floor", "reached", "memory"]
    header += ["launches", "syncs"]
    lines = []
    for (case, shape, dtype), rows in results.by_key().items():
        ours = rows.get(OURS)
        if ours is None or ours.status != "timed":
            times = [ours.status if ours else "", *[""] * 3]
            costs = [""] * 5
        else:
            times = [time_text(value) for value in (ours.median, ours.p10, ours.p90, ours.replay)]
            costs = [time_text(ours.floor), share_text(ours.share), bytes_text(ours.peak_bytes)]
            costs += ["" if value is None else str(value) for value in (ours.launches, ours.syncs)]
        lines.append([case, shape, dtype, *times, *(peer_text(rows.get(peer), ours) for peer in peers), *costs])
    return text_table(header, lines)


def phases_text(row: Row) -> str:
    return ", ".join(f"{name} {share_text(share)}" for name, share in row.stages.items())


def phase_table(results: Results) -> str:
    """Return a line per provider of the end-to-end cases: images per second, and where the time goes."""
    with_phases = [row for row in results.rows if row.stages]
    lines = [[*row.key, row.provider, f"{row.images_per_second:.1f}", phases_text(row)] for row in with_phases]
    return text_table(["case", "shape", "dtype", "provider", "images/s", "where the time goes"], lines)
