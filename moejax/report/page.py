"""report.html: one file that needs no network. What stands in it, in order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from moejax.errors import UserError
from moejax.report import goodput, pictures, routing, settings, spent, style, table, tokens, watched
from moejax.report.runs import Run

BY_STEP = (
    "<b>What a step teaches.</b> Lower is better; markers are a fixed part of the held-out rows, the thin line is the "
    "training loss, smoothed."
)
BY_TIME = (
    "<b>What a second buys.</b> At equal time the lower run is ahead; the line is a fixed part of the held-out rows "
    "and the diamond all of them, so the two need not meet."
)
SECTIONS = "<b>Where the time went.</b> Shares are of the run's known time; what is not in steps is not learning."
STEP_TIME = "<b>Step time.</b> Between two lines of the log, without evaluation and saving."
MEMORY = "<b>Memory.</b> The largest so far; a device only where its backend tells it."


def html(runs: Sequence[Run], refresh: int = 0) -> str:
    """The whole page; it loads itself again every `refresh` seconds, 0 for never."""
    title = " and ".join(run.name for run in runs)
    parts = [
        f"<h1>{escape(title)}</h1>{_plans(runs)}",
        _results(runs),
        _learning(runs),
        *routing.sections(runs),
        _time(runs),
        _configs(runs),
        _versions(runs),
    ]
    return style.page(title, "\n".join(parts), tokens.CSS, refresh)


def write(runs: Sequence[Run], out: Path, refresh: int = 0) -> None:
    """Writes the page; raises UserError where that is not possible."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html(runs, refresh), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; choose another --out") from error


def _plans(runs: Sequence[Run]) -> str:
    return "".join(
        f"<p><b>{escape(run.name)}</b><br>{escape(str(run.facts.get('plan', 'no run.json')))}</p>" for run in runs
    )


def _results(runs: Sequence[Run]) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes(runs))
    results = style.table(["", *table.header(runs)], ([row.title, *row.cells()] for row in table.rows(runs)))
    return f"<h2>Results</h2>{results}{notes}"


def _learning(runs: Sequence[Run]) -> str:
    charts = style.figure(pictures.by_step(runs), BY_STEP) + style.figure(pictures.by_time(runs), BY_TIME)
    seen = style.figure(watched.charts(runs))
    still = watched.quiet(runs)
    zero = f'<p class="note">0 throughout: {escape("; ".join(still))}.</p>' if still else ""
    return f'<h2>Learning</h2><div class="grid">{charts}</div><h3>Watched in training</h3><div class="scroll">{seen}</div>{zero}'


def _time(runs: Sequence[Run]) -> str:
    charts = (
        style.figure(spent.sections(runs), SECTIONS)
        + style.figure(spent.step_time(runs), STEP_TIME)
        + style.figure(spent.memory(runs), MEMORY)
    )
    said = "".join(f"<li>{escape(run.name)}: {escape(goodput.sentence(run.events))}</li>" for run in runs)
    return f'<h2>Time and memory</h2><ul class="note">{said}</ul><div class="grid">{charts}</div>'


def _configs(runs: Sequence[Run]) -> str:
    """How the configs differ from each other and from the default, and each in full."""
    between, together = settings.differing(runs)
    names = [run.name for run in runs]
    told = style.table(["the runs differ in", "default", *names], between, "words") if between else ""
    if len(runs) > 1 and not between:
        told = "<p>The configs are the same.</p>"
    shared = [line[:3] for line in together]
    changed = style.table(["not the default", "default", "here"], shared, "words") if shared else ""
    full = "".join(
        f"<details><summary>{escape(run.name)}, in full</summary>"
        f"<pre>{escape(json.dumps(run.config, indent=2))}</pre></details>"
        for run in runs
    )
    return f"<h2>Config</h2>{told}{changed}{full}"


def _versions(runs: Sequence[Run]) -> str:
    """What each run ran on, and what happened to it."""
    facts = []
    for run in runs:
        devices = run.facts.get("devices", [])
        counts = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
        known = {"workdir": str(run.path), "python": run.facts.get("python"), "devices": counts}
        known |= {"processes": run.facts.get("processes"), "data hash": run.facts.get("data_hash")}
        known |= run.facts.get("versions", {})
        told = (" ".join(map(str, event.values())) for event in goodput.happened(run.events))
        known["events"] = "; ".join(told) or "none"
        facts.append({key: str(value or table.NONE) for key, value in known.items()})
    lines = (
        [key, *(known.get(key, table.NONE) for known in facts)] for key in dict.fromkeys(k for f in facts for k in f)
    )
    return f"<h2>Versions</h2>{style.table(['', *(run.name for run in runs)], lines, 'words')}"
