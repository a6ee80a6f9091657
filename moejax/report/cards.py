"""Measured lines and pictures of docs/routers.md and docs/balancers.md, from the JSON of the benches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from moejax.report import figures

Row = dict[str, Any]
Result = dict[str, Any]
PICTURES = "pictures/routers"
BLOCK = re.compile(r"<!-- (card [\w]+|table|balancers|steps) -->(?:.*?<!-- end -->)?", re.DOTALL)


def fill(text: str, result: Result) -> str:
    """The page with what stands behind each marker made new. Raises KeyError for a card without a row."""

    def block(match: re.Match[str]) -> str:
        what, _, name = match[1].partition(" ")
        if what == "steps":
            return f"<!-- steps -->{result['experiment']['steps']}<!-- end -->"
        tables = {"table": table, "balancers": balancers}
        body = card(name, result["rows"][name]) if what == "card" else tables[what](result)
        return f"<!-- {match[1]} -->\n\n{body}\n\n<!-- end -->"

    return BLOCK.sub(block, text)


def card(name: str, row: Row) -> str:
    """One line of numbers and the picture."""
    return f"{sentence(row)}\n\n![{name}: load of every expert, and training curve]({PICTURES}/{name}.png)"


def sentence(row: Row) -> str:
    """What was measured of one router, and with which options."""
    options = ", ".join(f"`{key}={value}`" for key, value in row["options"].items()) or "defaults"
    return (
        f"*Measured:* {row['bits_per_byte']:.3f} bits per byte; {row['requests_per_token']:.2f} requests a token, "
        f"{100 * row['drop_rate']:.1f} % dropped; MaxVio {row['max_violation']:.2f}; {row['dead']} dead experts of "
        f"{sum(len(layer) for layer in row['load'])}. *Options:* {options}."
    )


def table(result: Result) -> str:
    """All routers in one table, the best loss first; what sees the future is marked and comes last."""
    lines = [
        "| router | bits per byte | requests a token | dropped | MaxVio | entropy [nats] |",
        "|---|---|---|---|---|---|",
    ]
    rows = sorted(result["rows"].items(), key=lambda item: (leaks(item[1]), item[1]["bits_per_byte"]))
    for name, row in rows:
        lines.append(
            f"| {name}{' (sees the future)' if leaks(row) else ''} | {row['bits_per_byte']:.3f} | {row['requests_per_token']:.2f} | "
            f"{100 * row['drop_rate']:.1f} % | {row['max_violation']:.2f} | {row['entropy']:.2f} |"
        )
    return "\n".join(lines)


def balancers(result: Result) -> str:
    """All balancers in one table; a dash for what was not measured."""
    lines = [
        "| balancer | steps until even | MaxVio, first to last | bits per byte | MaxVio in the experiment | step (10 to 90 %) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        skewed, found, cost = row["skewed"], row.get("experiment"), row.get("overhead")
        steps = "not" if skewed["steps"] is None else str(skewed["steps"])
        moved = f"{skewed['first']:.2f} to {skewed['last']:.2f}" if "first" in skewed else skewed["note"]
        learned = f"{found['bits_per_byte']:.3f} | {found['max_violation']:.2f}" if found else "– | –"
        paid = f"{cost['median']:.3f} ({cost['low']:.3f} to {cost['high']:.3f})" if cost else "–"
        lines.append(f"| {name} | {steps} | {moved} | {learned} | {paid} |")
    return "\n".join(lines)


def leaks(row: Row) -> bool:
    """Whether the run had to allow what is not causal."""
    return bool(row["options"].get("allow_noncausal"))


def pictures(result: Result, folder: Path) -> None:
    """One small picture a router: load in fair shares, and its training curve beside that of topk."""
    folder.mkdir(parents=True, exist_ok=True)
    base = result["rows"]["topk"]["curve"]
    for name, row in result["rows"].items():
        (folder / f"{name}.png").write_bytes(picture(name, row, base))


def picture(name: str, row: Row, base: list[list[float]]) -> bytes:
    """PNG of one card."""
    load = np.asarray(row["load"])
    fair = load * load.shape[1]
    with figures.panels(6.4, 1.7, (1.3, 1.0)) as (figure, (left, right)):
        norm = figures.TwoSlopeNorm(1.0, 0.0, max(2.0, fair.max()))
        image = left.imshow(fair, aspect="auto", interpolation="none", cmap="PuOr_r", norm=norm)
        left.set(xlabel="expert", ylabel="layer", yticks=range(len(load)))
        figure.colorbar(image, ax=left, pad=0.02, ticks=[0, 1, norm.vmax], format="%.2g", label="load")
        for i, (label, curve) in enumerate({name: row["curve"], "topk": base}.items()):
            right.plot(*np.asarray(curve).T, **figures.style_of(i), linewidth=1.4, label=label)
        right.set(xlabel="step", ylabel="bits per byte")
        right.grid(True)
        right.legend(fontsize=7)
        return figures.png(figure)
