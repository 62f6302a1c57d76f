"""Draw results: how much longer each peer takes than ours, and how close ours come to the floor that memory sets."""

import argparse
import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import compare
import matplotlib
import record
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter
from record import OURS, Results

matplotlib.rcParams["svg.hashsalt"] = "ssdcore"  # the same picture, the same bytes
BAR = 0.28  # inches
COLOURS = {
    OURS: "tab:blue",
    "torchvision": "tab:orange",
    "torch.compile": "tab:green",
    "eager": "tab:gray",
    "conch": "tab:purple",
}
DESCRIPTION = re.compile(r"<dc:description>\s*(\S+)\s*</dc:description>")


def colour(provider: str) -> str:
    return COLOURS.get(provider.split()[0], "tab:brown")


def charts(run: Results, keys: Sequence[record.Key]) -> dict[str, bytes]:
    """SVG pictures of the problems `keys`, by name; each carries `digest` of what it shows."""
    return {name: draw(run, keys) for name, draw in CHARTS.items()}


def digest(run: Results, keys: Sequence[record.Key]) -> str:
    """Of all that `charts` draws: tells whether a picture is of these results."""
    table = run.by_key()
    shown = [
        (key, name, row.status, row.median, row.best, row.floor) for key in keys for name, row in table[key].items()
    ]
    content = json.dumps([run.facts["device"], run.facts["commit"], shown])
    return hashlib.sha256(content.encode()).hexdigest()


def digest_in(svg: str) -> str | None:
    found = DESCRIPTION.search(svg)
    return found[1] if found else None


def _label(key: record.Key) -> str:
    case, shape, dtype = key
    return f"{case}  {shape}  {dtype}"


def _bars(count: int, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 1.4 + BAR * count), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_ylim(count - 0.5, -0.5)  # the first on top
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(axes: Axes, text: str, x: float, y: int) -> None:
    """Beside the end of a bar."""
    axes.annotate(text, (x, y), (3, 0), textcoords="offset points", va="center", fontsize="small")


def _ratio_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.12)  # for the figures beside the bars


def _speedup(run: Results, keys: Sequence[record.Key]) -> bytes:
    table = run.by_key()
    bars = []  # label or "", peer, ratio
    for key in keys:
        ours = table[key].get(OURS)
        peers = [row for name, row in table[key].items() if name != OURS and row.status == "timed"]
        if ours and ours.median:
            bars += [
                (_label(key) if first else "", row.provider, row.median / ours.median)
                for first, row in zip([True] + [False] * len(peers), peers, strict=False)
            ]
    figure, axes = _bars(len(bars), f"Time over ssdcore's: {record.machine_text(run.facts)}")
    seen: set[str] = set()
    for position, (_, peer, ratio) in enumerate(bars):
        axes.barh(
            position,
            ratio - 1,
            left=1,
            height=0.8,
            color=colour(peer),
            label=None if peer in seen else peer,
        )
        axes.annotate(
            record.ratio_text(ratio), (max(ratio, 1), position), (3, 0), textcoords="offset points", va="center"
        )
        seen.add(peer)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    _ratio_axis(axes)
    axes.set_xlabel("left of 1 the peer is faster, right of it ssdcore is")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return _svg(figure, digest(run, keys))


def _floor(run: Results, keys: Sequence[record.Key]) -> bytes:
    table = run.by_key()
    shown = [(key, table[key][OURS]) for key in keys if OURS in table[key] and table[key][OURS].share is not None]
    figure, axes = _bars(len(shown), f"Share of the floor that memory sets: {record.machine_text(run.facts)}")
    for position, (_, row) in enumerate(shown):
        axes.barh(position, row.share, height=0.8, color=colour(OURS))
        text = f"{record.share_text(row.share)} of {record.time_text(row.floor)}"
        _write(axes, text, row.share, position)
    axes.set_yticks(range(len(shown)), [_label(key) for key, _ in shown])
    axes.set_xlim(0, max(1.0, *(row.share for _, row in shown)) * 1.15 if shown else 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.axvline(1, color="black", linewidth=1)
    return _svg(figure, digest(run, keys))


def draw_comparison(runs: dict[str, Results], output: Path) -> None:
    """Every problem's time over that in the first run."""
    problems = [(key, times) for key, times in compare.side_by_side(runs) if times[0]]
    figure, axes = _bars(len(problems) * (len(runs) - 1), f"Time over that of {next(iter(runs))}")
    labels: list[str] = []
    names, seen = list(runs)[1:], set()
    for number, (key, times) in enumerate(problems):
        for other, time in enumerate(times[1:]):
            position = number * (len(runs) - 1) + other
            labels.append("" if other else _label(key))
            if time:
                label = None if names[other] in seen else names[other]
                axes.barh(position, time / times[0] - 1, left=1, height=0.8, color=f"C{other}", label=label)
                seen.add(names[other])
                text = record.ratio_text(time / times[0])
                axes.annotate(
                    text, (max(1, time / times[0]), position), (3, 0), textcoords="offset points", va="center"
                )
    axes.set_yticks(range(len(labels)), labels)
    _ratio_axis(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def _svg(figure: Figure, description: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Description": description})
    return buffer.getvalue()


CHARTS = {"speedup": _speedup, "floor": _floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what perf/run.py wrote")
    parser.add_argument("--output", type=Path, default=Path("."), metavar="DIR", help="default: the current folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for file in arguments.files:
        try:
            run = record.load(file)
        except ValueError as error:
            parser.error(str(error))
        for name, svg in charts(run, list(run.by_key())).items():
            target = arguments.output / f"{file.stem}-{name}.svg"
            target.write_bytes(svg)
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
