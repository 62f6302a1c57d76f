"""Charts of results: each peer's time over ours, the share of the floor, and several results side by side."""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from ssdperf.comparison import side_by_side
from ssdperf.results import OURS, Key, Results, Row
from ssdperf.tables import machine_text
from ssdperf.text import ratio_text, share_text, time_text

matplotlib.rcParams["svg.hashsalt"] = "ssdcore"  # so that the same picture is the same file
BAR = 0.28  # inches; height of a bar with the space around it
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


def charts(run: Results, keys: Sequence[Key]) -> dict[str, bytes]:
    """Return SVG pictures of the problems `keys` by name. Each picture carries the `digest` of what it shows."""
    return {name: draw(run, keys) for name, draw in CHARTS.items()}


def digest(run: Results, keys: Sequence[Key]) -> str:
    """Return a hash of everything that `charts` draws, which tells whether a picture shows these results."""
    table = run.by_key()
    shown = [
        (key, row.provider, row.status, row.median, row.best, row.floor)
        for key in keys
        for row in _shown(run, table[key])
    ]
    content = json.dumps([run.facts["device"], run.facts["commit"], shown])
    return hashlib.sha256(content.encode()).hexdigest()


def digest_in(svg: str) -> str | None:
    """Return the digest that a picture carries."""
    found = DESCRIPTION.search(svg)
    return found[1] if found else None


def _shown(run: Results, rows: dict[str, Row]) -> list[Row]:
    """Return the rows of a problem that are drawn: ours and the peers'."""
    return [row for name, row in rows.items() if name == OURS or name in run.peers]


def _label(key: Key) -> str:
    case, shape, dtype = key
    return f"{case}  {shape}  {dtype}"


def _bars(count: int, title: str) -> tuple[Figure, Axes]:
    """Return an empty chart for `count` horizontal bars, the first on top."""
    figure = Figure(figsize=(9, 1.4 + BAR * count), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_ylim(max(count, 1) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _ratio_bar(axes: Axes, position: int, ratio: float, colour: str, label: str | None) -> None:
    """Draw a bar from 1 to `ratio`, with the ratio beside it."""
    axes.barh(position, ratio - 1, left=1, height=0.8, color=colour, label=label)
    axes.annotate(ratio_text(ratio), (max(ratio, 1), position), (3, 0), textcoords="offset points", va="center")


def _ratio_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.12)  # room for the ratios beside the bars


def _speedup(run: Results, keys: Sequence[Key]) -> bytes:
    table = run.by_key()
    bars: list[tuple[str, str, float]] = []  # label, peer, ratio
    for key in keys:
        ours = table[key].get(OURS)
        if ours and ours.median:
            timed = [row for row in _shown(run, table[key]) if row.provider != OURS and row.status == "timed"]
            labels = [_label(key), *[""] * len(timed)]  # only the first bar of a problem has one
            bars += [(label, row.provider, row.median / ours.median) for label, row in zip(labels, timed, strict=False)]
    figure, axes = _bars(len(bars), f"Time over ssdcore's: {machine_text(run.facts)}")
    seen: set[str] = set()
    for position, (_, peer, ratio) in enumerate(bars):
        _ratio_bar(axes, position, ratio, colour(peer), None if peer in seen else peer)
        seen.add(peer)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    _ratio_axis(axes)
    axes.set_xlabel("left of 1 the peer is faster, right of 1 ssdcore is faster")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return _svg(figure, digest(run, keys))


def _floor(run: Results, keys: Sequence[Key]) -> bytes:
    table = run.by_key()
    shown = [(key, table[key][OURS]) for key in keys if OURS in table[key] and table[key][OURS].share is not None]
    figure, axes = _bars(len(shown), f"Share of the floor that the memory bandwidth sets: {machine_text(run.facts)}")
    for position, (_, row) in enumerate(shown):
        axes.barh(position, row.share, height=0.8, color=colour(OURS))
        text = f"{share_text(row.share)} of {time_text(row.floor)}"
        axes.annotate(text, (row.share, position), (3, 0), textcoords="offset points", va="center", fontsize="small")
    axes.set_yticks(range(len(shown)), [_label(key) for key, _ in shown])
    axes.set_xlim(0, max(1.0, *(row.share for _, row in shown)) * 1.15 if shown else 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.axvline(1, color="black", linewidth=1)
    return _svg(figure, digest(run, keys))


def draw_comparison(runs: dict[str, Results], output: Path) -> None:
    """Draw every problem's time in each run over its time in the first run."""
    problems = [(key, times) for key, times in side_by_side(runs) if times[0]]
    figure, axes = _bars(len(problems) * (len(runs) - 1), f"Time over that of {next(iter(runs))}")
    labels: list[str] = []
    names, seen = list(runs)[1:], set()
    for number, (key, times) in enumerate(problems):
        for other, time in enumerate(times[1:]):
            labels.append("" if other else _label(key))
            if time:
                name = names[other]
                position = number * len(names) + other
                _ratio_bar(axes, position, time / times[0], f"C{other}", None if name in seen else name)
                seen.add(name)
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
