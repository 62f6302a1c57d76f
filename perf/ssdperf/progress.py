"""What a command has done so far, kept in a file, so that the same command again does only the rest."""

import json
from pathlib import Path
from typing import Any

UNFINISHED = 75  # exit status, EX_TEMPFAIL of sysexits.h: nothing failed, and the same command again continues
PASSED, FAILED = "passed", "failed"


class Progress:
    """The results of single problems or tests in a file of JSON lines.

    The first line holds the identity of what was run: device, code and versions. Each other line holds a name, a status
    and a note. A line is written as soon as its result is known, so that an interruption loses nothing. If a name has
    several lines, the last one counts. A line that an interruption cut off is ignored.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Open the file; begin a new one if there is none, or if the existing one has another identity."""
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        known = bool(lines) and _parsed(lines[0]) == identity
        self.restarted = bool(lines) and not known
        if not known:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written as a whole or not at all, because results without an identity would be lost.
            scratch = path.with_suffix(".part")
            scratch.write_text(json.dumps(identity) + "\n")
            scratch.replace(path)

    def names(self, status: str) -> list[str]:
        entries = filter(None, map(_parsed, self.path.read_text().splitlines()[1:]))
        statuses = {entry["name"]: entry["status"] for entry in entries}
        return [name for name, found in statuses.items() if found == status]

    def record(self, name: str, status: str, note: str = "") -> None:
        append(self.path, name, status, note)


def append(path: Path, name: str, status: str, note: str = "") -> None:
    """Add a result to the file of a `Progress`; for a process that knows no more than the path."""
    end = "" if path.read_text().endswith("\n") else "\n"  # of a line that an interruption cut off
    with path.open("a") as file:
        file.write(end + json.dumps({"name": name, "status": status, "note": note}) + "\n")


def _parsed(line: str) -> Any:
    """Return what a line of JSON holds, or None if it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None
