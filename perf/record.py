"""What a run of the benchmark leaves: facts about the machine, and a row for each case, shape, dtype and provider."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1  # of the JSON; raised when its meaning changes
OURS = "ssdcore"
STATUSES = ("timed", "wrong", "failed")
Key = tuple[str, str, str]  # case, shape, dtype: what providers have in common


@dataclass(frozen=True)
class Row:
    """One provider on one problem. Times are in milliseconds; None where they were not or could not be taken."""

    case: str
    shape: dict[str, int | str]
    dtype: str
    provider: str
    status: str  # "timed"; "wrong": its result is not the reference's, so it was not timed; "failed": it raised
    note: str = ""  # of what is wrong or failed
    median: float | None = None  # launching included
    p10: float | None = None
    p90: float | None = None
    runs: int | None = None
    replay: float | None = None  # median of a CUDA graph of it
    replay_p10: float | None = None
    replay_p90: float | None = None
    bytes: int | None = None  # that must move: inputs read once, results written once
    floor: float | None = None  # the time they take at the bandwidth of a copy
    peak_bytes: int | None = None  # allocated at once, results included, inputs not
    launches: int | None = None  # on the GPU
    syncs: int | None = None  # waits of the CPU for the GPU
    whole: float | None = None  # end to end: of consecutive steps, each one's share of the time
    stages: dict[str, float] = field(default_factory=dict)  # end to end: the share of each in that

    @property
    def key(self) -> Key:
        return self.case, shape_text(self.shape), self.dtype

    @property
    def best(self) -> float | None:
        """The kernels' own time where it is known, else the whole call's."""
        return self.median if self.replay is None else self.replay

    @property
    def share(self) -> float | None:
        """Of the floor: 1 if nothing but the necessary bytes cost time."""
        return self.floor / self.best if self.floor and self.best else None

    @property
    def images_per_second(self) -> float | None:
        """End to end only."""
        return 1e3 * int(self.shape["B"]) / self.whole if self.whole else None


@dataclass(frozen=True)
class Results:
    facts: dict[str, Any]  # device, driver, clocks, versions, commit, date, bandwidth
    rows: list[Row]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, **self.facts, "rows": [_compact(row) for row in self.rows]}
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        scratch.replace(path)

    def by_key(self) -> dict[Key, dict[str, Row]]:
        """The providers of each problem, in the order of the run."""
        found: dict[Key, dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault(row.key, {})[row.provider] = row
        return found

    @property
    def providers(self) -> list[str]:
        """Ours first, then in the order of the run."""
        return list(dict.fromkeys([OURS, *(row.provider for row in self.rows)]))


def load(path: Path) -> Results:
    """Read what `Results.save` wrote.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA or "rows" not in content:
        raise ValueError(f"{path} holds no results of schema {SCHEMA}, those of this version of perf/run.py")
    known = {item.name for item in fields(Row)}
    rows = []
    for number, row in enumerate(content.pop("rows")):
        strange = set(row) - known
        missing = {"case", "shape", "dtype", "provider", "status"} - set(row)
        if strange or missing or row["status"] not in STATUSES:
            raise ValueError(f"{path}: row {number} is not one of schema {SCHEMA}: {row}")
        rows.append(Row(**row))
    return Results(content, rows)


def _compact(row: Row) -> dict[str, Any]:
    """Without what is empty, and times to four digits."""
    content = {name: value for name, value in asdict(row).items() if value not in (None, "", {})}
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in content.items()}


# --- in words ---------------------------------------------------------------------------------------------


def shape_text(shape: dict[str, int | str]) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


def time_text(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    for unit, scale in (("s", 1e-3), ("ms", 1.0)):
        if milliseconds * scale >= 1:
            return f"{_three_digits(milliseconds * scale)} {unit}"
    return f"{_three_digits(milliseconds * 1e3)} µs"


def bytes_text(count: int | None) -> str:
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{_three_digits(count)} {unit}"
        count /= 1000
    return f"{_three_digits(count)} GB"


def ratio_text(ratio: float | None) -> str:
    return "" if ratio is None else f"{_three_digits(ratio)}x"


def share_text(share: float | None) -> str:
    if share is None:
        return ""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.001 else "< 0.1%"


def _three_digits(value: float) -> str:
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(decimals, 0), 3)}f}"


def peer_text(row: Row | None, ours: Row | None) -> str:
    """What a table says of a peer: its time over ours, or why there is none."""
    if row is None:
        return ""
    if row.status != "timed":
        return row.status
    return ratio_text(row.median / ours.median) if ours and ours.median else time_text(row.median)


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned for a terminal: words to the left, figures to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    left = [not any(_is_figure(line[column]) for line in lines[1:]) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def machine_text(facts: dict[str, Any]) -> str:
    return facts["device"] + (f", {facts['threads']} threads" if facts.get("threads") else "")


def device_text(facts: dict[str, Any]) -> str:
    """The machine and the versions, in a line."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "torchvision") if facts.get(name))
    commit = (facts.get("commit") or "unknown")[:10] + (" with changes" if facts.get("modified") else "")
    return f"{machine_text(facts)}; {versions}; commit {commit}, {facts['date'][:10]}"


def table(results: Results) -> str:
    """Every problem in a line: our cost, and each peer's time over ours."""
    peers = results.providers[1:]
    header = ["case", "shape", "dtype", OURS, "p10", "p90", "replay", *peers, "floor", "reached", "memory"]
    header += ["launches", "syncs"]
    lines = []
    for (case, shape, dtype), rows in results.by_key().items():
        ours = rows.get(OURS)
        if ours is None or ours.status != "timed":
            own = [ours.status if ours else "", *[""] * 3]
            costs = [""] * 5
        else:
            own = [time_text(value) for value in (ours.median, ours.p10, ours.p90, ours.replay)]
            costs = [time_text(ours.floor), share_text(ours.share), bytes_text(ours.peak_bytes)]
            costs += ["" if value is None else str(value) for value in (ours.launches, ours.syncs)]
        lines.append([case, shape, dtype, *own, *(peer_text(rows.get(peer), ours) for peer in peers), *costs])
    return text_table(header, lines)


def stages_text(row: Row) -> str:
    return ", ".join(f"{name} {share_text(share)}" for name, share in row.stages.items())


def stage_table(results: Results) -> str:
    """End to end: images a second, and where the time goes."""
    staged = [row for row in results.rows if row.stages]
    lines = [[*row.key, row.provider, f"{row.images_per_second:.1f}", stages_text(row)] for row in staged]
    return text_table(["case", "shape", "dtype", "provider", "images/s", "where the time goes"], lines)
