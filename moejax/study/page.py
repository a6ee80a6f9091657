"""A study as parts of a page, and as a page of its own that loads nothing."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.report import pictures as shared
from moejax.report import style
from moejax.study import pictures, told

Result = dict[str, Any]


def sections(found: Result) -> list[str]:
    """What was found, a section each: what experts divide, what each is good for, how alike they are, how settled."""
    parts = [_information(found)]
    for kind in found.get("ablation", {}):
        maps = "".join(style.figure(svg) for svg in pictures.removals(found, kind))
        parts.append(f'<h2>One expert {kind}</h2><div class="grid">{maps}</div>')
    maps = "".join(style.figure(svg) for svg in pictures.alike(found))
    parts.append(f'<h2>How alike experts are</h2><div class="grid">{maps}</div>')
    if "saturation" in found:
        parts.append(f"<h2>Choices made already</h2>{style.figure(pictures.saturation(found))}")
    return parts


def write(found: Result, out: Path) -> None:
    """The page; UserError where it cannot be written."""
    title = f"Experts of {found['workdir']}, step {found['step']}"
    said = "\n".join(told.lines(found))
    body = f"<h1>{escape(title)}</h1>{''.join(sections(found))}<h2>In words</h2><pre>{escape(said)}</pre>"
    put(out, style.page(title, body).encode(), "--out")


def put(out: Path, data: bytes, flag: str) -> None:
    """Writes a file that the user named by a flag."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(data)
    except OSError as error:
        raise UserError(f"{flag}={out} cannot be written: {error.strerror}; choose another") from error


def _information(found: Result) -> str:
    head = ["attribute", "layer", "NMI", "95 % of documents", "control", "above", "p", "verdict"]
    lines = (
        [
            own["attribute"], str(own["layer"]), f"{own['nmi']:.3f}", f"{own['low']:.3f} to {own['high']:.3f}", f"{own['control']:.3f}",
            f"{own['above']:.3f}", f"{own['p']:.3f}", told.verdict(own),
        ]
        for own in found["information"]
    )  # fmt: skip
    table, note = style.table(head, lines), f'<p class="note">{escape(told.rule(found))}.</p>'
    tables = ((name, [np.array(own) for own in found["tables"][name]]) for name in found["attributes"])
    maps = "".join(
        f'<h3>{escape(name)}</h3><div class="grid">{"".join(style.figure(panel.svg) for panel in panels)}</div>'
        for name, panels in (
            (
                name,
                shared.panels(
                    f"by-{name.replace(' ', '-')}", "sparse", found["attributes"][name], own, "preferred kind"
                ),
            )
            for name, own in tables
        )
    )
    return f"<h2>What experts divide</h2>{style.figure(pictures.information(found))}{table}{note}{maps}"
