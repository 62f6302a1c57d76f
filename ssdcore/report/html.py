"""Build HTML from Python values, so that no text can become markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = {"img", "meta"}  # the elements in use that have no end tag


class Html(str):
    """Text that is HTML already. `tag` escapes every other text."""


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """Return an element.

    Args:
        name: of the element, such as "p".
        content: texts and numbers, which are escaped; `Html`; or iterables of these.
        attributes: their values are escaped. One that is None is left out. An underscore in a name stands for a hyphen,
            except at the end, where it is dropped: `class_`, `stroke_width`.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{_joined(content)}</{name}>")


def table(
    header: Iterable[object], rows: Iterable[Iterable[object]], current: object = None, **attributes: object
) -> Html:
    """Return a table that scrolls sideways where it is too wide.

    Args:
        header: the names of the columns.
        rows: the cells of each row. The first is the heading of the row.
        current: the heading of the row to highlight, if any.
        attributes: of the table.
    """
    head = tag("tr", (tag("th", name, scope="col") for name in header))
    body = (
        tag(
            "tr",
            tag("th", first, scope="row"),
            (tag("td", cell) for cell in cells),
            aria_current="true" if first == current and current is not None else None,
        )
        for first, *cells in rows
    )
    content = tag("table", tag("thead", head), tag("tbody", body), **attributes)
    return tag("div", content, class_="scroll", tabindex=0)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash if it is not defined."""
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001 (an en dash is meant)


def _joined(content: Iterable[object]) -> str:
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(part if isinstance(part, Html) else escape(part))
        elif isinstance(part, Iterable):
            parts.append(_joined(part))
        else:
            parts.append(escape(str(part)))
    return "".join(parts)
