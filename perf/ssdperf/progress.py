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
    several lines, the last one counts.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Open the file; begin a new one if there is none, or if the existing one has another identity."""
        self.path = path
        self.results: dict[str, str] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        self.restarted = bool(lines) and json.loads(lines[0]) != identity
        if not lines or self.restarted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(identity) + "\n")
            return
        for line in lines[1:]:
            entry = json.loads(line)
            self.results[entry["name"]] = entry["status"]

    def names(self, status: str) -> list[str]:
        return [name for name, found in self.results.items() if found == status]

    def record(self, name: str, status: str, note: str = "") -> None:
        self.results[name] = status
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name, "status": status, "note": note}) + "\n")
