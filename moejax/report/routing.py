"""The sections of the page on routing: one for each run that has any."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from moejax.report import health, history, layers, pictures, style, tokens, vocabulary
from moejax.report.runs import Run

LABELS = (
    "<b>Which experts take which label.</b> Rows that differ mean experts that specialise; NMI is the mutual "
    "information of expert and label over the smaller entropy (1: one determines the other), beside the same with "
    "experts drawn without regard to the label. scripts/specialisation.py says whether it is more than chance."
)
LOAD = (
    "<b>Load.</b> White is the fair share, orange more, purple less; the darkest purple is an expert without a token."
)
LOADS = "<b>Load over training.</b> Colours as above; a column is the batch of one step."
HEALTH = "<b>Health over training.</b> Every layer, down, over the steps, across."
TOGETHER = (
    "<b>Chosen together.</b> Of the tokens of one expert, the share that another gets as well (itself left out); a bright "
    "pair are duplicates."
)
CLASSES = "<b>Which experts take which tokens.</b> By what a token is, on the probe: a batch of held-out rows."
POSITIONS = (
    "<b>Which experts take which positions.</b> On the probe, a batch of held-out rows; experts that differ here have "
    "learned places, not words."
)
TEXT = "<b>The probe, coloured by expert.</b> A token lies on the colour of its first expert; its number shows when pointed at."


def sections(runs: Sequence[Run]) -> list[str]:
    """One a run; none for a dense one."""
    found = [_section(run, f"run{i}") for i, run in enumerate(runs)]
    return [section for section in found if section]


def _section(run: Run, name: str) -> str:
    past = history.read(run.path)
    body = _state(run, name) + _past(past, name) + _labels(run, name) + _together(run, name) + _probe(run, name)
    return f"<h2>Routing of {escape(run.name)}</h2>{body}" if body else ""


def _state(run: Run, name: str) -> str:
    """Load and health at the end."""
    loads = "".join(style.figure(svg, LOAD) for svg in pictures.load_maps(run, f"{name}-load"))
    rows = health.lines(run)
    if not loads and not rows:
        return ""
    source = "all held-out rows" if run.routing_from == "heldout" else f"the training batch of {run.routing_from}"
    state = f'{style.table(health.HEAD, rows)}<p class="note">{health.CAPTION}</p>' if rows else ""
    noticed = "".join(f"<li>{escape(note)}</li>" for note in health.notes(run))
    said = f'<details{" open" if len(rows) <= layers.MOST else ""}><summary>Noticed</summary><ul class="note">{noticed}</ul></details>'
    said = said if noticed else ""
    return f'<p class="note">From {source}.</p>{state}{said}<div class="grid">{loads}</div>'


def _past(past: dict[str, history.History], name: str) -> str:
    parts = []
    for kind, own in past.items():
        depth = own.sums["load"].shape[1]
        some = f" Of {depth} layers {len(layers.chosen(depth))} are shown." if depth > layers.MOST else ""
        parts.append(style.figure(layers.load_over_time(own, kind, f"{name}-{kind}-loads"), LOADS + some))
        svg, still = layers.health_over_time(own, f"{name}-{kind}-health")
        zero = f" 0 throughout: {'; '.join(still)}." if still else ""
        parts.append(style.figure(svg, HEALTH + zero))
    return f'<h3>Over training</h3><div class="scroll">{"".join(parts)}</div>' if parts else ""


def _labels(run: Run, name: str) -> str:
    depth = sum(len(sums.get("labels", ())) for sums in run.routing.values())
    return _panels(pictures.label_panels(run, f"{name}-labels"), depth, LABELS)


def _together(run: Run, name: str) -> str:
    tables = {kind: sums["coactivation"] for kind, sums in run.routing.items() if "coactivation" in sums}
    parts = [
        style.figure(layers.together(np.asarray(found, np.float64), kind, f"{name}-{kind}-together"), TOGETHER)
        for kind, found in tables.items()
        if found.any()
    ]
    return f'<div class="scroll">{"".join(parts)}</div>' if parts else ""


def _probe(run: Run, name: str) -> str:
    """What the last probe's tokens were, and where they went."""
    probe = history.probe(run.path)
    if probe is None:
        return ""
    words = vocabulary.of(run.config)
    titles, tables = tokens.by_position(probe, run.config["data"]["context"])
    parts = _panels(pictures.panels(f"{name}-position", "sparse", titles, tables), len(tables), POSITIONS)
    if words is not None:
        titles, tables = tokens.by_class(probe, words)
        parts = _panels(pictures.panels(f"{name}-class", "sparse", titles, tables), len(tables), CLASSES) + parts
    return f"{parts}<p>{TEXT}</p>{tokens.text(probe, 'sparse', vocabulary.written(words))}"


def _panels(panels: Sequence[pictures.Panel], layers_of: int, caption: str) -> str:
    some = f" Of {layers_of} layers {len(panels)} are shown." if len(panels) < layers_of else ""
    figures = "".join(style.figure(panel.svg) for panel in panels)
    return f'<p>{caption}{some}</p><div class="grid">{figures}</div>' if panels else ""
