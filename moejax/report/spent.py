"""Pictures of where time and memory went: sections of each run, step time and memory over its steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moejax.report import figures, goodput
from moejax.report.runs import Run

WIDTH = 5.2


def sections(runs: Sequence[Run], name: str = "sections") -> str:
    """Seconds of each section of each run, from its ledger; empty without one."""
    found = {run.name: goodput.seconds(run.events) for run in runs}
    found = {title: seconds for title, seconds in found.items() if sum(seconds.values())}
    if not found:
        return ""
    order = sorted(
        {s for of_run in found.values() for s in of_run}, key=lambda s: -max(r.get(s, 0) for r in found.values())
    )
    kept = [s for s in order if any(of_run.get(s, 0) >= 0.005 * sum(of_run.values()) for of_run in found.values())]
    with figures.drawing(WIDTH, 0.9 + 0.22 * len(kept) * (0.5 + len(found) / 2)) as (figure, axes):
        height = 0.8 / len(found)
        for i, (title, seconds) in enumerate(found.items()):
            where = np.arange(len(kept)) + (i - (len(found) - 1) / 2) * height
            bars = axes.barh(
                where, [seconds.get(s, 0.0) for s in kept], height, color=figures.style_of(i)["color"], label=title
            )
            whole = sum(seconds.values())
            axes.bar_label(bars, [f"{100 * seconds.get(s, 0) / whole:.0f} %" for s in kept], padding=2, fontsize=7)
        axes.set_yticks(range(len(kept)), kept)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(xlabel="seconds of the run")
        axes.grid(True, axis="x")
        if len(found) > 1:
            figures.legend(figure, axes)
        return figures.svg(figure, name)


def step_time(runs: Sequence[Run], name: str = "step-time") -> str:
    """Milliseconds per step over the steps; empty where nothing was timed."""
    return _over_steps([(run, "seconds_per_step", "", i) for i, run in enumerate(runs)], 1e3, "step time [ms]", name)


def memory(runs: Sequence[Run], name: str = "memory") -> str:
    """Largest memory so far, of the process and of the fullest device; empty where it was not kept."""
    lines = [(run, "host_peak_bytes", ", process", 2 * i) for i, run in enumerate(runs)]
    lines += [(run, "device_peak_bytes", ", device", 2 * i + 1) for i, run in enumerate(runs)]
    return _over_steps(lines, 1e-9, "largest memory so far [GB]", name)


def _over_steps(lines: Sequence[tuple[Run, str, str, int]], unit: float, title: str, name: str) -> str:
    """Lines of (run, number of timing.jsonl, addition to the run's name, style), in multiples of `unit`."""
    drawn = [(run.timing[key], run.name + more, style) for run, key, more, style in lines if key in run.timing]
    if not drawn:
        return ""
    with figures.drawing(WIDTH, 3.0) as (figure, axes):
        for curve, label, style in drawn:
            axes.plot(curve.step, unit * curve.value, **figures.style_of(style), linewidth=1.4, label=label)
        axes.set(xlabel="training step", ylabel=title)
        axes.set_ylim(bottom=0)
        axes.grid(True)
        figures.legend(figure, axes)
        return figures.svg(figure, name)
