"""How every picture looks: colour-blind safe, transparent, text that follows the page. matplotlib without a display."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from moejax.errors import UserError

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise UserError("pictures need matplotlib: pip install moejax[plot]") from error
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

__all__ = ["MaxNLocator", "TwoSlopeNorm", "drawing", "grid", "legend", "line", "panels", "png", "style_of", "svg"]

INK = "#7f7e7d"
"""Text and lines: replaced by the page's own colour, this grey elsewhere; readable on white and on black."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette (Color Universal Design, 2008), those with contrast on both backgrounds first."""

DASHES = ("-", "--", "-.", ":")

STYLE: dict[str, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "moejax",
    "font.size": 10,
    "axes.titlesize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Any]]:
    """A figure of this many inches and its axes, in the style of the report. Take its `svg` inside."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots()


@contextlib.contextmanager
def panels(width: float, height: float, widths: Sequence[float]) -> Iterator[tuple[Figure, Any]]:
    """A figure with axes side by side, of these relative widths."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(1, len(widths), width_ratios=widths)


@contextlib.contextmanager
def grid(width: float, height: float, rows: int, columns: int) -> Iterator[tuple[Figure, Any]]:
    """A figure with rows of equal axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG, transparent, for pages that take files."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def svg(figure: Figure, name: str) -> str:
    """The figure as one <svg> element, to be put inline: ids are its own, nothing is loaded, width is the page's."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, f"var(--ink, {INK})")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.strip()


def style_of(index: int) -> dict[str, str]:
    """Colour and dashes of the index-th run: told apart without colour too."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def line(index: int) -> Line2D:
    """What stands for the index-th run in a legend."""
    return Line2D([], [], linewidth=1.5, **style_of(index))


def legend(figure: Figure, axes: Any, columns: int = 1) -> None:
    """What the lines of the axes are, under them: names of runs are long."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
