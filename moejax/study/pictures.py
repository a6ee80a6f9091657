"""Pictures of a study, as SVG or PNG: what experts divide, what each is good for, how alike they are, how settled."""

from __future__ import annotations

from typing import Any

import numpy as np

from moejax.report import figures
from moejax.study.chance import LEVEL

Result = dict[str, Any]
DARK = 0.55
"""Share of the colour scale from which writing on it is dark."""


def information(found: Result) -> str:
    """NMI above the control by attribute and layer; a star where it is claimed."""
    height = 1.2 + 0.3 * len(found["attributes"])
    with figures.drawing(5.2, height) as (figure, axes):
        _information(axes, found)
        return figures.svg(figure, "information")


def overview(found: Result) -> bytes:
    """The information, the effect of removing each expert on each label, and how alike experts are: one row, as a PNG."""
    removals = next(iter(found.get("ablation", {}).items()), None)
    width, widths = (8.0, [1.1, 1.0]) if removals is None else (11.5, [1.1, 1.2, 1.0])
    with figures.panels(width, 3.2, widths) as (figure, axes):
        _information(axes[0], found)
        if removals is not None:
            layer = int(np.argmax(np.nanmax(np.array(removals[1]["effect"], np.float64), axis=(1, 2))))
            _removal(figure, axes[1], removals[0], removals[1], layer, list(found["documents"]))
        cosines = np.array(found["similarity"]["outputs"][-1], np.float64)
        _alike(figure, axes[-1], cosines, f"outputs alike, layer {len(found['similarity']['outputs']) - 1}")
        return figures.png(figure)


def removals(found: Result, kind: str) -> list[str]:
    """A map of every layer: nats per byte more without each expert, by label; a star where that is shown."""
    own, labels = found["ablation"][kind], list(found["documents"])
    made = []
    for layer in range(len(own["effect"])):
        with figures.drawing(5.2, 1.2 + 0.28 * len(labels)) as (figure, axes):
            _removal(figure, axes, kind, own, layer, labels)
            made.append(figures.svg(figure, f"{kind}-{layer}"))
    return made


def alike(found: Result) -> list[str]:
    """Two maps of every layer: cosine of outputs, and of weights."""
    made = []
    for name in ("outputs", "weights"):
        for layer, own in enumerate(found["similarity"][name]):
            with figures.drawing(3.4, 2.8) as (figure, axes):
                _alike(figure, axes, np.array(own, np.float64), f"layer {layer}, by {name}")
                made.append(figures.svg(figure, f"alike-{name}-{layer}"))
    return made


def saturation(found: Result) -> str:
    """Share of choices that the earlier checkpoint made already, by layer, beside chance."""
    own = {name: np.array(values) for name, values in found["saturation"].items()}
    with figures.drawing(5.2, 2.6) as (figure, axes):
        layers = np.arange(len(own["kept"]))
        ends = np.maximum([own["kept"] - own["low"], own["high"] - own["kept"]], 0)
        axes.errorbar(
            layers, own["kept"], ends, label="kept, 95 % of documents", **figures.style_of(0), marker="o", capsize=3
        )
        axes.plot(layers, own["chance"], label="by chance", **figures.style_of(1))
        axes.set(xlabel="sparse layer", ylabel=f"choices of step {found['earlier']}", ylim=(0, 1))
        axes.xaxis.set_major_locator(figures.MaxNLocator(integer=True))
        figures.legend(figure, axes, 2)
        return figures.svg(figure, "saturation")


def _information(axes: Any, found: Result) -> None:
    names = list(found["attributes"])
    layers = 1 + max(own["layer"] for own in found["information"])
    above, claimed = np.zeros((len(names), layers)), np.zeros((len(names), layers), bool)
    for own in found["information"]:
        cell = names.index(own["attribute"]), own["layer"]
        above[cell], claimed[cell] = own["above"], own["specialised"]
    top = max(above.max(), 1e-9)
    axes.imshow(above, aspect="auto", interpolation="none", cmap="cividis", vmin=0, vmax=top)
    axes.set(title="NMI above the control (* claimed)", xlabel="sparse layer")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(layers))
    if layers <= 12:
        for i, j in np.ndindex(above.shape):
            ink = "black" if above[i, j] > DARK * top else "white"
            axes.text(
                j,
                i,
                f"{above[i, j]:.2f}{'*' if claimed[i, j] else ''}",
                ha="center",
                va="center",
                color=ink,
                fontsize=8,
            )


def _removal(figure: Any, axes: Any, kind: str, own: Result, layer: int, labels: list[str]) -> None:
    effect, p = (np.array(own[name][layer], np.float64).T for name in ("effect", "p"))
    top = max(float(np.nanmax(np.abs(np.array(own["effect"], np.float64)))), 1e-9)
    image = axes.imshow(
        effect, aspect="auto", interpolation="none", cmap="PuOr_r", norm=figures.TwoSlopeNorm(0, -top, top)
    )
    for i, j in np.argwhere(p <= LEVEL):
        axes.text(
            j,
            i,
            "*",
            ha="center",
            va="center",
            color="white" if abs(effect[i, j]) > DARK * top else "black",
            fontsize=8,
        )
    axes.set(title=f"layer {layer}, one expert {kind} (* shown)", xlabel="expert")
    axes.set_yticks(range(len(labels)), labels)
    _ids(axes.set_xticks, effect.shape[1])
    figure.colorbar(image, ax=axes, label="nats per byte more", pad=0.02)


def _alike(figure: Any, axes: Any, cosine: np.ndarray, title: str) -> None:
    image = axes.imshow(cosine, interpolation="none", cmap="PuOr_r", norm=figures.TwoSlopeNorm(0, -1, 1))
    axes.set(title=title, xlabel="expert")
    _ids(axes.set_xticks, len(cosine))
    _ids(axes.set_yticks, len(cosine))
    figure.colorbar(image, ax=axes, label="cosine", pad=0.02)


def _ids(put: Any, number: int) -> None:
    every = -(-number // 12)
    put(range(0, number, every), [str(i) for i in range(0, number, every)], fontsize=8)
