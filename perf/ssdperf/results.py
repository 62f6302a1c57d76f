"""Results and their file: facts about the machine, and a row for each case, shape, dtype and provider."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1  # of the JSON; raised when its meaning changes
OURS = "ssdcore"
# On a CPU ssdcore runs eager behind the dispatcher, so that eager and its compiled form are no peers there.
OURS_ON_CPU = (OURS, "eager", "torch.compile")
STATUSES = ("timed", "wrong", "failed")
Key = tuple[str, str, str]  # case, shape, dtype: identifies a problem


@dataclass(frozen=True)
class Row:
    """One provider on one problem. Times are in milliseconds, and None where they were not or could not be taken."""

    case: str
    shape: dict[str, int | str]
    dtype: str
    provider: str
    status: str  # "timed"; "wrong": the result is not the reference's, so it was not timed; "failed": it raised
    note: str = ""  # what is wrong, or the error
    median: float | None = None  # of the whole call, including the launches
    p10: float | None = None
    p90: float | None = None
    runs: int | None = None
    replay: float | None = None  # median of the call as a CUDA graph
    replay_p10: float | None = None
    replay_p90: float | None = None
    bytes: int | None = None  # that must move: inputs read once, results written once
    floor: float | None = None  # the time that these bytes take at the bandwidth of a copy
    peak_bytes: int | None = None  # the most that was allocated at once, including the result, excluding the inputs
    launches: int | None = None  # on the GPU
    syncs: int | None = None  # times that the CPU waited for the GPU
    whole: float | None = None  # end-to-end cases: the time per step over consecutive steps, waits included
    stages: dict[str, float] = field(default_factory=dict)  # end-to-end cases: each phase's share of that time

    @property
    def key(self) -> Key:
        return self.case, shape_text(self.shape), self.dtype

    @property
    def best(self) -> float | None:
        """The kernels' time alone where it is known, otherwise the time of the whole call."""
        return self.median if self.replay is None else self.replay

    @property
    def share(self) -> float | None:
        """The share of the floor: 1 if only moving the necessary bytes took time."""
        return self.floor / self.best if self.floor and self.best else None

    @property
    def images_per_second(self) -> float | None:
        """The throughput; of end-to-end cases only."""
        return 1e3 * int(self.shape["B"]) / self.whole if self.whole else None


@dataclass(frozen=True)
class Results:
    facts: dict[str, Any]  # device, driver, clocks, versions, commit, date, bandwidth
    rows: list[Row]

    def save(self, path: Path) -> None:
        """Replace the file as a whole, so that an interruption leaves a valid file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, **self.facts, "rows": [_compact(row) for row in self.rows]}
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        scratch.replace(path)

    def by_key(self) -> dict[Key, dict[str, Row]]:
        """Return the rows of each problem by provider, in the order of the run."""
        found: dict[Key, dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault(row.key, {})[row.provider] = row
        return found

    @property
    def peers(self) -> list[str]:
        """The providers that ssdcore is compared with, in the order of the run."""
        ours = OURS_ON_CPU if self.facts["kind"] == "cpu" else (OURS,)
        return [provider for provider in dict.fromkeys(row.provider for row in self.rows) if provider not in ours]


def load(path: Path) -> Results:
    """Read what `Results.save` wrote.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA or "rows" not in content:
        raise ValueError(f"{path} holds no results of schema {SCHEMA}, which this version of perf/run.py writes")
    known = {item.name for item in fields(Row)}
    rows = []
    for number, row in enumerate(content.pop("rows")):
        unknown = set(row) - known
        missing = {"case", "shape", "dtype", "provider", "status"} - set(row)
        if unknown or missing or row["status"] not in STATUSES:
            raise ValueError(f"{path}: row {number} does not follow schema {SCHEMA}: {row}")
        rows.append(Row(**row))
    return Results(content, rows)


def shape_text(shape: dict[str, int | str]) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


def _compact(row: Row) -> dict[str, Any]:
    """Return the row's values without the empty ones, and with times rounded to four digits."""
    content = {name: value for name, value in asdict(row).items() if value not in (None, "", {})}
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in content.items()}
