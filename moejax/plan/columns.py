"""Text tables of plans."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal columns two spaces apart, the first to the left and the others to the right. Rows have equally many cells."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    place = lambda i, cell: cell.rjust(widths[i]) if i else cell.ljust(widths[0])  # noqa: E731
    return ["  ".join(place(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]
