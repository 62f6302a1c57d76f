"""How the time of a case grows with one of its sizes: the shapes of a sweep, the exponents and the plots."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ssdperf.charts import colour
from ssdperf.registry import Case, Shape, on_cpu, unique
from ssdperf.results import OURS, Results, shape_text
from ssdperf.text import text_table, time_text

MIN_POINTS = 3  # sizes that an exponent is fitted to
REPLAY = f"{OURS} (graph)"
Sweep = tuple[str, str]  # the name of a case and the size that varies
Curve = tuple[list[float], list[float]]  # sizes and milliseconds


def shapes(case: Case, size: str, device: str, quick: bool) -> list[Shape]:
    """Return the shapes of a sweep over `size`."""
    base = case.quick[0] if device == "cpu" or quick else case.shapes[0]
    varied = [{**base, size: value} for value in case.sweep[size]]
    return unique(on_cpu(shape) for shape in varied) if device == "cpu" else varied


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """Return the least-squares slope of log time over log size in the upper half of the rising sizes.

    The upper half, because launching hides the growth at small sizes. None if there are fewer than `MIN_POINTS` sizes.
    """
    points = [(math.log(x), math.log(t)) for x, t in zip(sizes, times, strict=True)]
    upper = [(x, t) for x, t in points if 2 * x >= points[0][0] + points[-1][0]]
    points = upper if len(upper) >= MIN_POINTS else points[-MIN_POINTS:]
    if len(points) < MIN_POINTS:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def curves(results: Results, size: str) -> dict[str, Curve]:
    """Return the curve of ssdcore, of its replay and of each peer."""
    found: dict[str, Curve] = {}
    for row in results.rows:
        if row.status != "timed" or (row.provider != OURS and row.provider not in results.peers):
            continue
        times = {row.provider: row.median}
        if row.provider == OURS and row.replay:
            times[REPLAY] = row.replay
        for name, time in times.items():
            curve = found.setdefault(name, ([], []))
            curve[0].append(float(row.shape[size]))
            curve[1].append(time)
    return found


def table(swept: dict[Sweep, Results]) -> str:
    lines = []
    for (case, size), results in swept.items():
        for provider, (sizes, times) in curves(results, size).items():
            slope = exponent(sizes, times)
            figures = [f"{sizes[0]:.0f} to {sizes[-1]:.0f}", *map(time_text, (times[0], times[-1]))]
            lines.append([case, size, provider, *figures, "" if slope is None else f"{slope:.2f}"])
    return text_table(["case", "size", "provider", "from", "first", "last", "exponent"], lines)


def draw(swept: dict[Sweep, Results], title: str, output: Path) -> None:
    """Draw a log-log plot for each sweep."""
    columns = min(4, len(swept))
    lines = math.ceil(len(swept) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines + 0.4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for number, ((case, size), results) in enumerate(swept.items(), start=1):
        axes = figure.add_subplot(lines, columns, number)
        for provider, (sizes, times) in curves(results, size).items():
            slope = exponent(sizes, times)
            label = provider if slope is None else f"{provider} {slope:.2f}"
            line = "o--" if provider == REPLAY else "o-"
            axes.loglog(sizes, times, line, markersize=3, color=colour(provider), label=label)
        ticks = sorted({float(row.shape[size]) for row in results.rows})
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks], fontsize="x-small")
        others = {name: value for name, value in results.rows[0].shape.items() if name != size}
        axes.set_title(f"{case}\n{shape_text(others)}", fontsize="small")
        axes.set(xlabel=size, ylabel="ms")
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
