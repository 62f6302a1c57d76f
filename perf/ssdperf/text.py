"""Figures in words, and tables of text."""

import math
from collections.abc import Iterable, Sequence


def time_text(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    milliseconds = _rounded(milliseconds)
    for unit, scale in (("s", 1e-3), ("ms", 1.0)):
        if milliseconds * scale >= 1:
            return f"{_three_digits(milliseconds * scale)} {unit}"
    return f"{_three_digits(milliseconds * 1e3)} µs"


def bytes_text(count: float | None) -> str:
    if count is None:
        return ""
    count = _rounded(count)
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


def _rounded(value: float) -> float:
    """Round to three digits. This comes before the unit is chosen, because 0.9996 ms is written as 1.00 ms."""
    return float(f"{value:.3g}")


def _three_digits(value: float) -> str:
    value = _rounded(value)
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(decimals, 0), 3)}f}"


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for a terminal: columns of words aligned to the left, columns of figures to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    left = [not any(_is_figure(line[column]) for line in lines[1:]) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            entry.ljust(width) if is_left else entry.rjust(width)
            for entry, width, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_figure(entry: str) -> bool:
    return entry[:1].isdigit()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])
