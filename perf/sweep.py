"""How cost grows: vary one size of a case at a time, fit the exponents, draw log-log plots.

An exponent is the slope of log time over log size in the upper half of the sweep: 1 is linear, 2 quadratic, 0 means
that the cost does not depend on it, or that launching hides it. Where a CUDA graph of ours can be captured, its time,
the kernels alone, is a curve of its own.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import environment
import plot
import record
import run
import timing
import torch
from cases import Case, Shape, on_cpu, unique
from matplotlib.figure import Figure
from record import OURS, Results, Row
from tqdm import tqdm

FEWEST = 3  # sizes to fit an exponent to
REPLAY = f"{OURS} (graph)"


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """The least-squares slope of log time over log size, from the middle of the rising sizes up; None if too few."""
    points = [(math.log(x), math.log(t)) for x, t in zip(sizes, times, strict=True)]
    upper = [(x, t) for x, t in points if 2 * x >= points[0][0] + points[-1][0]]
    points = upper if len(upper) >= FEWEST else points[-FEWEST:]
    if len(points) < FEWEST:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def shapes(case: Case, axis: str, device: str, quick: bool) -> list[Shape]:
    base = case.quick[0] if device == "cpu" or quick else case.shapes[0]
    varied = [{**base, axis: value} for value in case.sweep[axis]]
    return unique(on_cpu(shape) for shape in varied) if device == "cpu" else varied


def curves(rows: Sequence[Row], axis: str) -> dict[str, tuple[list[float], list[float]]]:
    """Sizes and milliseconds of each provider."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row.status == "timed":
            curves_of_row = {row.provider: row.median}
            if row.provider == OURS and row.replay:
                curves_of_row[REPLAY] = row.replay
            for name, time in curves_of_row.items():
                sizes, times = found.setdefault(name, ([], []))
                sizes.append(float(row.shape[axis]))
                times.append(time)
    return found


def draw(swept: dict[tuple[str, str], list[Row]], title: str, output: Path) -> None:
    columns = min(4, len(swept))
    lines = math.ceil(len(swept) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines + 0.4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for number, ((case, axis), rows) in enumerate(swept.items(), start=1):
        axes = figure.add_subplot(lines, columns, number)
        for provider, (sizes, times) in curves(rows, axis).items():
            slope = exponent(sizes, times)
            label = provider if slope is None else f"{provider} {slope:.2f}"
            line = "o--" if provider == REPLAY else "o-"
            axes.loglog(sizes, times, line, markersize=3, color=plot.colour(provider), label=label)
        ticks = sorted({float(row.shape[axis]) for row in rows})
        axes.set_xticks(ticks, [f"{size:.0f}" for size in ticks], fontsize="x-small")
        others = {name: value for name, value in rows[0].shape.items() if name != axis}
        axes.set_title(f"{case}\n{record.shape_text(others)}", fontsize="small")
        axes.set(xlabel=axis, ylabel="ms")
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="such as nms or 'nms*'")
    parser.add_argument("--axis", nargs="+", metavar="SIZE", help="such as B A C G N (default: all of a case)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="from the smaller shape of each case")
    parser.add_argument("--output", type=Path, default=Path("sweep.svg"), help="picture (default: %(default)s)")
    arguments = parser.parse_args()
    run.prepare(arguments.device, parser)
    work = [
        (case, axis, shapes(case, axis, arguments.device, arguments.quick))
        for case in run.selected(arguments.case)
        for axis in case.sweep
        if arguments.axis is None or axis in arguments.axis
    ]
    if not work:
        parser.error("nothing to sweep: no such case has such a size")
    facts = environment.facts(arguments.device)
    bandwidth = timing.copy_bandwidth(arguments.device)
    swept: dict[tuple[str, str], list[Row]] = {}
    with tqdm(total=sum(len(problems) for *_, problems in work), unit="shape", disable=None) as progress:
        for case, axis, problems in work:
            for shape in problems:
                progress.set_description(f"{case.name} {record.shape_text(shape)}")
                rows = run.rows_of(case, shape, arguments.device, bandwidth, compiled=False)
                swept.setdefault((case.name, axis), []).extend(rows)
                progress.update()

    lines = []
    for (case_name, axis), rows in swept.items():
        for provider, (sizes, times) in curves(rows, axis).items():
            slope = exponent(sizes, times)
            figures = [f"{sizes[0]:.0f} to {sizes[-1]:.0f}", *map(record.time_text, (times[0], times[-1]))]
            lines.append([case_name, axis, provider, *figures, "" if slope is None else f"{slope:.2f}"])
    print(record.text_table(["case", "size", "provider", "from", "first", "last", "exponent"], lines))
    print(run.notes(Results(facts, [row for rows in swept.values() for row in rows])) + record.device_text(facts))
    draw(swept, record.device_text(facts), arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
