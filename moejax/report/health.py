"""Is the routing of a run healthy? One line a sparse layer, and what was noticed, for the page."""

from __future__ import annotations

import numpy as np

from moejax.moe import diagnostics
from moejax.report.runs import Run
from moejax.train import watch

HEAD = (
    "layer", "MaxVio", "Gini", "effective", "dead", "entropy", "confidence", "label NMI", "saturation",
)  # fmt: skip
CAPTION = (
    "MaxVio: largest load over the fair one, less 1. Gini: 0 is even. Effective: as many experts under even load have the "
    "entropy of this one. Entropy (nats) and confidence (largest probability): means over tokens. Label NMI: mutual information of "
    "label and expert. Saturation: share of a probe's choices at the first evaluation that the last one makes again."
)


def lines(run: Run) -> list[list[str]]:
    """A row of HEAD for every sparse layer; a dash for what the run does not hold."""
    found = []
    early = first_saturation(run)
    for kind, sums in run.routing.items():
        if "load" not in sums:
            continue
        load = sums["load"]
        missing = np.full(len(load), np.nan)
        tokens = np.maximum(sums.get("tokens", missing), 1)
        tables = sums.get("labels")
        columns = (
            (diagnostics.max_violation(load), ".2f"),
            (diagnostics.gini(load), ".3f"),
            (diagnostics.effective_experts(load), ".1f"),
            (diagnostics.dead(load), ".0f"),
            (sums.get("entropy", missing) / tokens, ".2f"),
            (sums.get("confidence", missing) / tokens, ".3f"),
            (missing if tables is None else [diagnostics.normalized_mutual_information(t) for t in tables], ".3f"),
            (early if early is not None and len(early) == len(load) else missing, ".3f"),
        )
        for i in range(len(load)):
            found.append([f"{kind}\u00a0{i}", *(_shown(float(column[i]), show) for column, show in columns)])
    return found


def notes(run: Run) -> list[str]:
    """Alarms of the run, experts that repeat each other, and which expert takes most of which label, layer by layer."""
    found = [str(event["alarm"]) for event in run.events if event.get("event") == "collapse"]
    for kind, sums in run.routing.items():
        for i, table in enumerate(sums.get("coactivation", ())):
            for a, b, overlap in diagnostics.duplicates(table, sums["load"][i]):
                found.append(f"{kind} layer {i}: experts {a} and {b} are chosen together ({overlap:.0%}): duplicates")
        for i, table in enumerate(sums.get("labels", ())):
            ties = diagnostics.tie(table)
            names = run.labels if len(run.labels) == len(ties) else [f"label {j}" for j in range(len(ties))]
            taken = (f"{n} to expert {e} ({s:.0%})" for n, (e, s) in zip(names, ties, strict=True) if e >= 0)
            found.append(f"{kind} layer {i}: {', '.join(taken) or 'no label prefers an expert'}")
    return found


def first_saturation(run: Run) -> np.ndarray | None:
    """Agreement of the first probe with the last, by layer; None where there is no earlier probe."""
    probes = watch.saturation(run.path)
    return probes[0][1] if len(probes) > 1 else None


def _shown(value: float, show: str) -> str:
    return "–" if np.isnan(value) else format(value, show)
