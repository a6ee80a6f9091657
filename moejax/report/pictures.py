"""Pictures of runs, as SVG text: what was learned by step and by time, and where routing sent the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from moejax.report import figures, specialisation
from moejax.report.layers import chosen
from moejax.report.runs import Curve, Run

CHART = (5.2, 3.4)
BITS, BITS_KEY = "bits per byte", "bits_per_byte"


def by_step(runs: Sequence[Run], name: str = "by-step") -> str:
    """Held-out and smoothed training bits per byte against the step."""
    with figures.drawing(*CHART) as (figure, axes):
        shown = []
        for i, run in enumerate(runs):
            style = figures.style_of(i)
            if (curve := run.curves.get("train/bits_per_byte")) is not None:
                smooth = smoothed(curve)
                axes.plot(*smooth, **style, linewidth=1.1, alpha=0.85)
                shown.append(smooth.value[len(smooth.value) // 10 :])
            if (curve := run.curves.get(f"eval/{BITS_KEY}")) is not None:
                axes.plot(*curve, **style, linewidth=2, marker="o", markersize=4, label=run.name)
                shown.append(curve.value)
        _frame(figure, axes, "training step", shown)
        axes.xaxis.set_major_locator(figures.MaxNLocator(integer=True, nbins=7))
        return figures.svg(figure, name)


def by_time(runs: Sequence[Run], name: str = "by-time") -> str:
    """Held-out bits per byte against training seconds; the diamond is the full held-out set at the end."""
    with figures.drawing(*CHART) as (figure, axes):
        shown = []
        for i, run in enumerate(runs):
            style = figures.style_of(i)
            if not len(run.clock.step):
                continue
            if (curve := run.curves.get(f"eval/{BITS_KEY}")) is not None:
                seconds = run.seconds_at(curve.step)
                axes.plot(seconds, curve.value, **style, linewidth=2, marker="o", markersize=4, label=run.name)
                shown.append(curve.value)
            if (final := run.heldout.get(f"heldout/{BITS_KEY}")) is not None:
                axes.plot(
                    run.clock.value[-1], final, color=style["color"], linestyle="none", marker="D", markersize=8,
                    markeredgecolor=figures.INK, label=f"all: {final:.3f}",
                )  # fmt: skip
                shown.append(np.array([final]))
        _frame(figure, axes, "training time [s], without compilation, evaluation and saving", shown)
        axes.set_xlim(left=0)
        return figures.svg(figure, name)


@dataclasses.dataclass(frozen=True)
class Panel:
    """The label table of one sparse layer."""

    title: str
    svg: str
    information: float
    control: float


def label_panels(run: Run, name: str) -> list[Panel]:
    """A heat map per sparse layer of the share of each label's assignments that each expert takes; one colour scale."""
    found = []
    for kind, sums in run.routing.items():
        tables = list(sums.get("labels", ()))
        labels = run.labels if tables and len(run.labels) == len(tables[0]) else []
        names = labels or [f"label {i}" for i in range(len(tables[0]) if tables else 0)]
        found += panels(f"{name}-{kind}", kind, names, tables, "preferred label")
    return found


def panels(
    name: str, kind: str, rows: list[str], tables: Sequence[np.ndarray], order: str = "preferred row"
) -> list[Panel]:
    """A heat map per layer (some of many) of the share of each row's assignments that each expert takes, from tables [rows, E]; one
    colour scale."""
    top = max((specialisation.shares(table).max() for table in tables), default=1.0)
    shown = chosen(len(tables)) if tables else []
    return [_panel(f"{name}-{i}", f"{kind} layer {i}", rows, tables[i], top, order) for i in shown]


def _panel(name: str, title: str, rows: list[str], table: np.ndarray, top: float, by: str) -> Panel:
    order = specialisation.order(table)
    information = specialisation.normalized_information(table)
    control = specialisation.normalized_information(specialisation.shuffled(table))
    with figures.drawing(5.2, 1.1 + 0.28 * len(table)) as (figure, axes):
        shares = 100 * specialisation.shares(table)[:, order]
        image = axes.imshow(
            shares, aspect="auto", interpolation="none", cmap="cividis", vmin=0, vmax=max(100 * top, 1e-9)
        )
        axes.set_title(f"{title}: NMI {information:.3f} (shuffled {control:.3f})")
        axes.set_yticks(range(len(table)), rows)
        axes.set_xlabel(f"expert, ordered by {by}")
        _expert_ticks(axes, order)
        figure.colorbar(image, ax=axes, label="share [%]", pad=0.02)
        return Panel(title, figures.svg(figure, name), information, control)


def load_maps(run: Run, name: str) -> list[str]:
    """Load of every expert of every layer in fair shares (1 is perfect balance), a picture per kind of sparse layer."""
    loads = {kind: sums["load"].astype(np.float64) for kind, sums in run.routing.items() if "load" in sums}
    return [_load_map(f"{name}-{kind}", kind, load) for kind, load in loads.items()]


def _load_map(name: str, kind: str, load: Float[np.ndarray, "L E"]) -> str:
    fair = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    with figures.drawing(5.2, 1.1 + 0.28 * min(max(len(load), 3), 24)) as (figure, axes):
        norm = figures.TwoSlopeNorm(1.0, 0.0, max(2.0, fair.max()))
        image = axes.imshow(fair, aspect="auto", interpolation="none", cmap="PuOr_r", norm=norm)
        axes.set(xlabel="expert", ylabel=f"{kind} layer")
        axes.set_yticks(range(0, len(load), -(-len(load) // 12)))
        _expert_ticks(axes, np.arange(load.shape[1]))
        figure.colorbar(
            image, ax=axes, label="load [fair shares]", pad=0.02, ticks=[0, 0.5, 1, norm.vmax], format="%.3g"
        )
        return figures.svg(figure, name)


def smoothed(curve: Curve) -> Curve:
    """Mean over a window of a twentieth of the points, narrower at the ends."""
    width = len(curve.value) // 20 | 1
    window = np.ones(width)
    return Curve(
        curve.step, np.convolve(curve.value, window, "same") / np.convolve(np.ones_like(curve.value), window, "same")
    )


def _frame(figure: Any, axes: Any, x: str, shown: list[Float[np.ndarray, "_"]]) -> None:
    """Axes of a chart of bits per byte, as high as what was learned after the first tenth."""
    axes.set(xlabel=x, ylabel=BITS)
    axes.grid(True)
    values = np.concatenate(shown) if shown else np.empty(0)
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.06 * (values.max() - values.min()) or 0.1
        axes.set_ylim(values.min() - margin, values.max() + margin)
        figures.legend(figure, axes, 2)


def _expert_ticks(axes: Any, order: np.ndarray) -> None:
    """Expert ids under the columns, every one where there is room."""
    every = -(-len(order) // (24 if len(order) < 100 else 16))
    axes.set_xticks(range(0, len(order), every), [str(expert) for expert in order[::every]], fontsize=8)
