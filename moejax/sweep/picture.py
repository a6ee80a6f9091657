"""A number of a sweep against one of its options: every run a point, means of seeds joined, bars of their sample deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.report import figures
from moejax.sweep.results import Row


def png(found: Sequence[Row], x: str, y: str, by: str | None = None) -> bytes:
    """PNG of settings (of `results.settings`); x and `by` are options of the sweep, y is a number of its runs."""
    with figures.drawing(5.6, 3.6) as (figure, axes):
        _draw(axes, lines(found, x, y, by), x, y)
        return figures.png(figure)


def lines(found: Sequence[Row], x: str, y: str, by: str | None) -> dict[str, list[tuple[float, list[float]]]]:
    """(x, values over seeds) of each line, by its label, in order of x; settings without the number or the option are left out."""
    of: dict[str, list[tuple[float, list[float]]]] = {}
    for row in found:
        if x in row["overrides"] and y in row["each"]:
            label = "" if by is None else f"{by.rsplit('.', 1)[-1]}={row['overrides'].get(by, 'default')}"
            of.setdefault(label, []).append((float(row["overrides"][x]), row["each"][y]))
    if not of:
        names = sorted({key for row in found for key in row["each"]})
        raise UserError(f"no run that has ended sets {x} and has {y}; numbers: {', '.join(names) or 'none yet'}")
    return {label: sorted(points) for label, points in of.items()}


def _draw(axes: Any, of: dict[str, list[tuple[float, list[float]]]], x: str, y: str) -> None:
    for i, (label, points) in enumerate(of.items()):
        style = figures.style_of(i)
        where, mean = [p for p, _ in points], [float(np.mean(v)) for _, v in points]
        bars = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for _, v in points]
        axes.errorbar(where, mean, bars, **style, linewidth=1.8, capsize=3, label=label or None)
        each = [(p, value) for p, values in points for value in values]
        axes.plot(*zip(*each, strict=True), color=style["color"], linestyle="none", marker="o", markersize=4, alpha=0.6)
    ticks = sorted({p for points in of.values() for p, _ in points})
    if min(ticks) > 0 and max(ticks) >= 8 * min(ticks):
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=x, ylabel=y.replace("/", ", ").replace("_", " "))
    axes.grid(True)
    if any(of):
        axes.legend()
