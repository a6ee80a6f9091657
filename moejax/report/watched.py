"""What was watched of routing, as curves over the steps: small charts, one a number, every run a line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moejax.report import figures
from moejax.report.pictures import smoothed
from moejax.report.runs import Run

CHARTS = {
    "moe/max_violation": ("MaxVio: largest load, less the fair one", 1.0),
    "moe/dead": ("experts without a token in a step, all layers", 1.0),
    "moe/starved": ("experts long unfed, all layers", 1.0),
    "moe/drop_rate": ("dropped [% of requests]", 100.0),
    "moe/reroute_rate": ("rerouted [% of requests]", 100.0),
    "moe/unserved": ("tokens without an expert [%]", 100.0),
    "moe/entropy": ("router entropy [nats]", 1.0),
    "moe/confidence": ("largest probability of a token", 1.0),
    "moe/margin": ("margin at the last choice", 1.0),
    "moe/logit_rms": ("router logits, root mean square", 1.0),
    "eval/churn": ("probe tokens rerouted since the last look [%]", 100.0),
    "train/gradient_norm": ("gradient norm", 1.0),
}
"""Title and unit by name in metrics.jsonl."""


def charts(runs: Sequence[Run], name: str = "watched") -> str:
    """One figure; a number that no run has, or that is 0 throughout in all, has no chart but a place in `quiet`."""
    shown = [key for key in CHARTS if any(key in run.curves and run.curves[key].value.any() for run in runs)]
    if not shown:
        return ""
    columns = 3
    rows = math.ceil(len(shown) / columns)
    with figures.grid(10.0, 2.0 * rows + 0.5, rows, columns) as (figure, axes):
        for own, key in zip(axes.flat, shown, strict=False):
            title, unit = CHARTS[key]
            for i, run in enumerate(runs):
                if (curve := run.curves.get(key)) is not None:
                    smooth = smoothed(curve)
                    own.plot(smooth.step, unit * smooth.value, **figures.style_of(i), linewidth=1.3, label=run.name)
            own.set_title(title, fontsize=9)
            own.tick_params(labelsize=8)
            own.xaxis.set_major_locator(figures.MaxNLocator(integer=True, nbins=4))
            own.grid(True)
            own.set_xlabel("training step", fontsize=8)
        for left in axes.flat[len(shown) :]:
            left.remove()
        if len(runs) > 1:
            handles = [figures.line(i) for i in range(len(runs))]
            figure.legend(handles, [run.name for run in runs], loc="outside upper center", ncols=min(len(runs), 3))
        return figures.svg(figure, name)


def quiet(runs: Sequence[Run]) -> list[str]:
    """Titles of the numbers that were 0 throughout."""
    known = [key for key in CHARTS if any(key in run.curves for run in runs)]
    return [
        CHARTS[key][0] for key in known if not any(key in run.curves and run.curves[key].value.any() for run in runs)
    ]
