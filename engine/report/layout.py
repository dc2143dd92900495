"""Rows of equal keys -> text: Markdown, or columns for a terminal."""

import re
import textwrap
from pathlib import Path

from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path


def filled_columns(rows: list[dict[str, str]]) -> list[str]:
    """The columns in which anything stands."""
    return [name for name in rows[0] if any(row[name] for row in rows)]


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table, without empty columns."""
    names = filled_columns(rows)
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aligned(rows: list[dict[str, str]], width: int | None = None) -> str:
    """Aligned columns without empty ones, numbers to the right.

    Args:
        width: characters a line at most. Where the table is wider, the widest columns are wrapped.
    """
    names = filled_columns(rows)
    cells = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    while width and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    right = [all(re.match(r"[-+(\d]", line[k] or "0") for line in cells[1:]) for k in range(len(names))]

    def lines_of(line: list[str]) -> list[str]:
        parts = [textwrap.wrap(cell, wide) or [""] for cell, wide in zip(line, widths)]
        texts = []
        for k in range(max(map(len, parts))):
            cut = [part[k] if k < len(part) else "" for part in parts]
            padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cut, widths, right)]
            texts.append("  ".join(padded).rstrip())
        return texts

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([*lines_of(names), rule, *(text for line in cells[1:] for text in lines_of(line))])


def replace_table(file: Path, name: str, table: str) -> None:
    """Puts ``table`` between ``<!-- table:name -->`` and ``<!-- /table:name -->`` of a file.

    Raises:
        UserError: the markers are not there.
    """
    text = file.read_text()
    pattern = re.compile(rf"(<!-- table:{re.escape(name)}\b[^>]*-->\n).*?(<!-- /table:{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(text):
        raise UserError(
            f"{file} has no lines <!-- table:{name} --> and <!-- /table:{name} -->; add them where the table goes"
        )
    with atomic_path(file) as temporary:
        temporary.write_text(pattern.sub(lambda m: m[1] + table + "\n" + m[2], text))
