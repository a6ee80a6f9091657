"""A study in words and tables, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moejax.study import similarity
from moejax.study.chance import LEVEL
from moejax.study.information import LEAST

MOST = 12
"""Removals that are listed, the largest effects first."""
FEW = 6
"""Documents below which no signs are unlikely enough: 2 / 2 ** 5 is over LEVEL."""
Result = dict[str, Any]


def lines(found: Result) -> Iterator[str]:
    """All of it."""
    documents = ", ".join(f"{name} {count}" for name, count in found["documents"].items())
    yield f"{found['workdir']}, step {found['step']}, on {found['devices']}"
    yield f"{found['text']}: {found['rows']:,} rows, {found['tokens']:,} tokens; documents: {documents}"
    yield from ("", *_information(found), "", *_similarity(found["similarity"]))
    if "saturation" in found:
        yield from ("", *_saturation(found))
    for kind, own in found.get("ablation", {}).items():
        yield from ("", *_ablation(kind, own, found["documents"]))


def verdict(finding: Result) -> str:
    """What may be said of one attribute in one layer."""
    return "specialised" if finding["specialised"] else "not shown"


def rule(found: Result) -> str:
    """When something is claimed, and how often that went wrong."""
    controls = found["controls"]
    return (
        f"specialised: p of at most {LEVEL} over all {len(found['information'])} cells, and {LEAST} or more above the mean of "
        f"{found['draws']} shuffles; of {controls['studies']} studies of shuffled attributes, {controls['claiming']} claim anything"
    )


def _information(found: Result) -> Iterator[str]:
    yield "attribute    layer    NMI  95 % of documents  control   above      p  verdict"
    for own in found["information"]:
        interval = f"{own['low']:.3f} to {own['high']:.3f}"
        yield (
            f"{own['attribute']:12} {own['layer']:5} {own['nmi']:6.3f}  {interval:>17}  {own['control']:7.3f}  {own['above']:6.3f}  "
            f"{own['p']:5.3f}  {verdict(own)}"
        )
    yield rule(found)


def _similarity(found: Result) -> Iterator[str]:
    yield "experts alike, cosine     outputs: median, largest   weights: median, largest"
    for layer, (outputs, weights) in enumerate(zip(found["outputs"], found["weights"], strict=True)):
        pairs = [similarity.apart(np.array(own, np.float64)) for own in (outputs, weights)]
        if len(pairs[0]):
            numbers = [f"{np.median(own):7.3f}, {own.max():6.3f}" for own in pairs]
            yield f"layer {layer:<18} {numbers[0]:>24} {numbers[1]:>26}"
    pairs = [f"layer {layer}: {i} and {j} ({cosine:.3f})" for layer, i, j, cosine in found["twins"]]
    yield f"duplicates, from {similarity.TWINS} by outputs: {'; '.join(pairs) or 'none'}"


def _saturation(found: Result) -> Iterator[str]:
    own = found["saturation"]
    yield f"choices that step {found['earlier']} made already"
    for layer, kept in enumerate(own["kept"]):
        interval = f"{own['low'][layer]:.3f} to {own['high'][layer]:.3f}"
        yield f"layer {layer}: {kept:.3f} ({interval}); by chance {own['chance'][layer]:.3f}"


def _ablation(kind: str, found: Result, documents: dict[str, int]) -> Iterator[str]:
    """The removals that are shown to matter for a label, the largest first; and how many there are of all."""
    effect, p, labels = np.array(found["effect"], np.float64), np.array(found["p"]), list(documents)
    cells = sorted(np.argwhere(p <= LEVEL).tolist(), key=lambda cell: -abs(effect[tuple(cell)]))
    yield f"one expert {kind}, nats per byte more: {len(cells)} of {p.size} effects shown (p of at most {LEVEL} over all of them)"
    for cell in cells[:MOST]:
        layer, expert, label = cell
        low, high = (found[end][layer][expert][label] for end in ("low", "high"))
        yield f"layer {layer} expert {expert:<3} {labels[label]:14} {effect[tuple(cell)]:+.4f} ({low:+.4f} to {high:+.4f})"
    few = [name for name, count in documents.items() if count < FEW]
    if few:
        yield f"of {', '.join(few)} nothing could be shown: fewer than {FEW} documents"
    if len(cells) > MOST:
        yield f"and {len(cells) - MOST} smaller ones: see --json or --out"
