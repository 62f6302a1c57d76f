"""The figures in the READMEs: tables and charts between two markers, made from the results."""

from ssdperf.results import OURS, Key, Results, Row
from ssdperf.spread import first_runs, spread
from ssdperf.tables import device_text, peer_text, phases_text
from ssdperf.text import markdown_table, share_text, time_text

BEGIN = "<!-- figures: written by perf/report.py, not by hand -->"
END = "<!-- end of figures -->"
NO_GPU = "**No GPU has been measured yet.** The benchmark is ready for one; the following figures are from a CPU."


def headline(run: Results) -> list[Key]:
    """Return the first shape of each case; of each model and kind of outputs where a case has several."""
    found: dict[tuple[str, ...], Key] = {}
    for row in run.rows:
        kind = tuple(str(row.shape.get(name, "")) for name in ("model", "outputs"))
        found.setdefault((row.case, *kind), row.key)
    return list(found.values())


def section(runs: dict[str, Results]) -> str:
    """Return the figures of README.md: the ops beside their peers, GPUs first.

    Args:
        runs: results by the stem of their file in perf/results/.
    """
    parts = [] if any(run.facts["kind"] == "cuda" for run in runs.values()) else [NO_GPU]
    for stem, run in _gpus_first(first_runs(runs)):
        parts += [f"**{device_text(run.facts)}**", _ops(run, headline(run))]
        parts.append(f"![Time of each peer over ssdcore's](perf/results/{stem}-speedup.svg)")
    return "\n\n".join(part for part in parts if part)


def details(runs: dict[str, Results]) -> str:
    """Return the figures of perf/README.md: whole detectors, the share of the floor, the spread of repeated runs.

    Args:
        runs: results by the stem of their file in perf/results/.
    """
    parts = []
    for stem, run in _gpus_first(first_runs(runs)):
        parts += [f"**{device_text(run.facts)}**", _detectors(run, headline(run))]
        parts += [f"![Share of the floor](results/{stem}-floor.svg)", spread(runs, run)]
    return "\n\n".join(part for part in parts if part)


def _gpus_first(runs: dict[str, Results]) -> list[tuple[str, Results]]:
    return sorted(runs.items(), key=lambda item: (item[1].facts["kind"] != "cuda", item[0]))


def _ops(run: Results, keys: list[Key]) -> str:
    table = run.by_key()
    replayed = any(row.replay for row in run.rows)
    lines = []
    for key in keys:
        rows = table[key]
        ours = rows.get(OURS, Row(*key[:1], {}, "", OURS, "failed"))
        if any(row.stages for row in rows.values()):
            continue
        time = time_text(ours.median) or ours.status
        entries = [f"`{key[0]}`", key[1], key[2], time, *([time_text(ours.replay)] if replayed else [])]
        entries += [peer_text(rows.get(peer), ours) for peer in run.peers]
        entries += [time_text(ours.floor), share_text(ours.share)]
        lines.append(entries)
    header = ["op", "shape", "dtype", OURS, *(["as a CUDA graph"] if replayed else []), *run.peers, "floor", "reached"]
    return markdown_table(header, lines) if lines else ""


def _detectors(run: Results, keys: list[Key]) -> str:
    table = run.by_key()
    lines = []
    for key in keys:
        for row in table[key].values():
            if row.stages:
                lines.append([*key, row.provider, f"{row.images_per_second:.1f}", phases_text(row)])
    header = ["from host to host", "shape", "dtype", "provider", "images/s", "where the time goes"]
    return markdown_table(header, lines) if lines else ""


def with_section(readme: str, text: str) -> str:
    """Return `readme` with `text` between the markers."""
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"a README with figures must hold the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
