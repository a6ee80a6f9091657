"""report.html: one file that needs no network, for light and dark, for a phone and a desk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.report import goodput, health, pictures, table
from moejax.report.runs import Run

CSS = """
:root { color-scheme: light dark; --ink: #333; --strong: #111; --page: #fff; --rule: #ccc; --shade: #f4f4f2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ccc; --strong: #f2f2f2; --page: #16181b; --rule: #45494e; --shade: #1f2226; }
}
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page); }
h1, h2, h3, th, b { color: var(--strong); }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: pre-wrap; }
.words td, .words th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.words td:first-child { white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; max-width: 34rem; }
svg text { font-family: system-ui, sans-serif !important; }
figcaption, .note { font-size: .9rem; }
@media (max-width: 40rem) {
  table { font-size: .8rem; }
  th, td { padding: .25rem .35rem; }
  th:first-child, td:first-child { min-width: 7rem; }
  th:not(:first-child) { white-space: normal; }
}
code, pre { font-size: .85rem; overflow-wrap: anywhere; }
pre { background: var(--shade); padding: 1rem; overflow-x: auto; }
"""

BY_STEP = (
    "<b>What a step teaches.</b> Lower is better; markers are a fixed part of the held-out rows, the thin line is the "
    "training loss, smoothed."
)
BY_TIME = (
    "<b>What a second buys.</b> At equal time the lower run is ahead; the line is a fixed part of the held-out rows "
    "and the diamond all of them, so the two need not meet."
)
LABELS = (
    "<b>Which experts take which label.</b> Rows that differ mean experts that specialise; NMI is the mutual "
    "information of expert and label over the smaller entropy (1: one determines the other), beside the same with "
    "experts drawn without regard to the label."
)
LOAD = (
    "<b>Load.</b> White is the fair share, orange more, purple less; the darkest purple is an expert without a token."
)


def html(runs: Sequence[Run]) -> str:
    """The whole page."""
    title = escape(" and ".join(run.name for run in runs))
    plans = "".join(
        f"<p><b>{escape(run.name)}</b><br>{escape(str(run.facts.get('plan', 'no run.json')))}</p>" for run in runs
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes(runs))
    results = _table(["", *table.header(runs)], ([row.title, *row.cells()] for row in table.rows(runs)))
    charts = _figure(pictures.by_step(runs), BY_STEP) + _figure(pictures.by_time(runs), BY_TIME)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head><body>\n"
        f"<h1>{title}</h1>{plans}\n<h2>Results</h2>{results}{notes}\n"
        f'<h2>Learning</h2><div class="grid">{charts}</div>\n'
        + "".join(_routing(run, f"run{i}") for i, run in enumerate(runs))
        + f"\n{_configs(runs)}\n{_versions(runs)}\n</body></html>\n"
    )


def write(runs: Sequence[Run], out: Path) -> None:
    """Writes the page; raises UserError where that is not possible."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html(runs), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; choose another --out") from error


def _routing(run: Run, name: str) -> str:
    """Who goes where, of one run; empty for a dense one."""
    loads = "".join(_figure(svg, LOAD) for svg in pictures.load_maps(run, f"{name}-load"))
    panels = "".join(_figure(panel.svg) for panel in pictures.label_panels(run, f"{name}-labels"))
    if not loads and not panels:
        return ""
    source = "all held-out rows" if run.routing_from == "heldout" else f"the training batch of {run.routing_from}"
    labels = f'<p>{LABELS}</p><div class="grid">{panels}</div>' if panels else ""
    head = f'<h2>Routing of {escape(run.name)}</h2><p class="note">From {source}.</p>'
    rows = health.lines(run)
    state = f'{_table(health.HEAD, rows)}<p class="note">{health.CAPTION}</p>' if rows else ""
    noticed = "".join(f"<li>{escape(note)}</li>" for note in health.notes(run))
    said = f'<ul class="note">{noticed}</ul>' if noticed else ""
    return f'{head}{state}<div class="grid">{loads}</div>{labels}{said}'


def _configs(runs: Sequence[Run]) -> str:
    """How the configs differ, and each in full."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = [
        key for key in dict.fromkeys(key for tree in flat for key in tree) if len({tree.get(key) for tree in flat}) > 1
    ]
    names = [run.name for run in runs]
    differing = ""
    if len(runs) > 1:
        lines = ([key, *(tree.get(key, table.NONE) for tree in flat)] for key in keys)
        differing = _table(["differs", *names], lines, "words") if keys else "<p>The configs are the same.</p>"
    full = "".join(
        f"<details><summary>{escape(run.name)}, in full</summary>"
        f"<pre>{escape(json.dumps(run.config, indent=2))}</pre></details>"
        for run in runs
    )
    return f"<h2>Config</h2>{differing}{full}"


def _versions(runs: Sequence[Run]) -> str:
    """What each run ran on, and what happened to it."""
    facts = []
    for run in runs:
        devices = run.facts.get("devices", [])
        counts = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
        known = {"workdir": str(run.path), "python": run.facts.get("python"), "devices": counts}
        known |= {"processes": run.facts.get("processes"), "data hash": run.facts.get("data_hash")}
        known |= run.facts.get("versions", {})
        known["time"] = goodput.sentence(run.events)
        told = (" ".join(map(str, event.values())) for event in goodput.happened(run.events))
        known["events"] = "; ".join(told) or "none"
        facts.append({key: str(value or table.NONE) for key, value in known.items()})
    lines = (
        [key, *(known.get(key, table.NONE) for known in facts)] for key in dict.fromkeys(k for f in facts for k in f)
    )
    return f"<h2>Versions</h2>{_table(['', *(run.name for run in runs)], lines, 'words')}"


def _flat(tree: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """`model.moe.top_k`, `2` of every option."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, json.dumps(tree)


def _figure(svg: str, caption: str = "") -> str:
    """A picture; `caption` is trusted text of this file."""
    return f"<figure>{svg}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>\n"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    columns = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'
    )
