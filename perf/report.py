"""Write the README's figures from perf/results/: its tables between two markers, its charts beside the results.

Only the first shape of each case is shown, those that `torch.compile` is timed at; the rest is in the files.
"""

import argparse
from pathlib import Path

import plot
import record
from record import OURS, Results, Row

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "perf" / "results"
BEGIN = "<!-- figures: written by perf/report.py, not by hand -->"
END = "<!-- end of figures -->"
NO_GPU = "**No GPU has been measured yet**: the harness is ready for one, and what follows is a CPU."


def headline(run: Results) -> list[record.Key]:
    """The first shape of each case, or of each model, and with `outputs` of each kind of them."""
    found: dict[tuple[str, ...], record.Key] = {}
    for row in run.rows:
        kind = tuple(str(row.shape.get(name, "")) for name in ("model", "outputs"))
        found.setdefault((row.case, *kind), row.key)
    return list(found.values())


def section(runs: dict[str, Results]) -> str:
    """What stands between the markers, for results by the stem of their file."""
    ordered = sorted(runs.items(), key=lambda item: (item[1].facts["kind"] != "cuda", item[0]))
    parts = [] if any(run.facts["kind"] == "cuda" for run in runs.values()) else [NO_GPU]
    for stem, run in ordered:
        keys = headline(run)
        parts.append(f"**{record.device_text(run.facts)}**")
        parts.append(_ops(run, keys))
        parts.append(_detectors(run, keys))
        parts += [f"![{name}](perf/results/{stem}-{name}.svg)" for name in plot.CHARTS]
    return "\n\n".join(part for part in parts if part)


def _ops(run: Results, keys: list[record.Key]) -> str:
    table = run.by_key()
    peers = run.providers[1:]
    replayed = any(row.replay for row in run.rows)
    lines = []
    for key in keys:
        rows = table[key]
        ours = rows.get(OURS, Row(*key[:1], {}, "", OURS, "failed"))
        if any(row.stages for row in rows.values()):
            continue
        own = record.time_text(ours.median) or ours.status
        cells = [f"`{key[0]}`", key[1], key[2], own, *([record.time_text(ours.replay)] if replayed else [])]
        cells += [record.peer_text(rows.get(peer), ours) for peer in peers]
        cells += [record.time_text(ours.floor), record.share_text(ours.share)]
        lines.append(cells)
    header = ["op", "shape", "dtype", OURS, *(["as a CUDA graph"] if replayed else []), *peers, "floor", "reached"]
    return record.markdown_table(header, lines) if lines else ""


def _detectors(run: Results, keys: list[record.Key]) -> str:
    table = run.by_key()
    lines = []
    for key in keys:
        for row in table[key].values():
            if row.stages:
                lines.append([*key, row.provider, f"{row.images_per_second:.1f}", record.stages_text(row)])
    header = ["from host to host", "shape", "dtype", "provider", "images/s", "where the time goes"]
    return record.markdown_table(header, lines) if lines else ""


def with_section(readme: str, text: str) -> str:
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"README.md must hold the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        runs = {file.stem: record.load(file) for file in sorted(FOLDER.glob("*.json"))}
    except ValueError as error:
        raise SystemExit(str(error)) from None
    readme = ROOT / "README.md"
    readme.write_text(with_section(readme.read_text(), section(runs)))
    for stem, run in runs.items():
        for name, svg in plot.charts(run, headline(run)).items():
            (FOLDER / f"{stem}-{name}.svg").write_bytes(svg)
    charts = len(plot.CHARTS) * len(runs)
    print(f"wrote README.md and {charts} charts in {FOLDER.relative_to(ROOT)}, from {len(runs)} files")


if __name__ == "__main__":
    main()
