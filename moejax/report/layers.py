"""Pictures of every sparse layer over training: load of its experts, its health, and experts that are chosen together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from moejax.report import figures
from moejax.report.history import History

COLUMNS = 4
"""Panels side by side."""
MOST = 12
"""Layers of which experts are shown one by one; of a deeper model, so many at even distances."""


def chosen(layers: int, most: int = MOST) -> list[int]:
    """All layers, or `most` of them at even distances, first and last included."""
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, most))})


def load_over_time(history: History, kind: str, name: str) -> str:
    """A panel for each of some layers: load of every expert (down) over the steps (across)."""
    fair = history.fair
    norm = figures.TwoSlopeNorm(1.0, 0.0, max(2.0, float(fair.max())))
    titles = [f"{kind} {layer}" for layer in chosen(fair.shape[1])]
    with _panels(titles, 1.5) as (figure, axes):
        images = [
            _image(own, history.step, fair[:, layer].T, cmap="PuOr_r", norm=norm)
            for own, layer in zip(axes, chosen(fair.shape[1]), strict=True)
        ]
        ticks = [0, 1, norm.vmax]
        figure.colorbar(images[0], ax=axes, label="load [fair shares]", pad=0.01, ticks=ticks, format="%.3g")
        figure.supxlabel("training step", fontsize=10)
        figure.supylabel("expert", fontsize=10)
        return figures.svg(figure, name)


def health_over_time(history: History, name: str) -> tuple[str, list[str]]:
    """A panel for each number that is watched: every layer (down) over the steps (across). And titles of those that were 0 throughout."""
    found = history.health()
    shown = {title: values for title, values in found.items() if values.any()}
    with _panels(list(shown), 2.0, columns=2) as (figure, axes):
        for own, values in zip(axes, shown.values(), strict=True):
            image = _image(own, history.step, values.T, cmap="cividis")
            figure.colorbar(image, ax=own, pad=0.02, format="%.3g")
        figure.supxlabel("training step", fontsize=10)
        figure.supylabel("layer", fontsize=10)
        return figures.svg(figure, name), [title for title in found if title not in shown]


def together(table: Float[np.ndarray, "L E E"], kind: str, name: str) -> str:
    """A panel for each of some layers: of the tokens that choose one expert (down), the share that choose another (across) as well."""
    own_load = np.einsum("lee->le", table)
    share = table / np.maximum(own_load, 1)[:, :, None]
    share[:, np.arange(share.shape[1]), np.arange(share.shape[1])] = np.nan
    layers = chosen(len(share), 8)
    top = float(np.nanmax(share[layers])) if share.shape[1] > 1 else 1.0
    with _panels([f"{kind} {layer}" for layer in layers], 1.9) as (figure, axes):
        scale = {"cmap": "cividis", "vmin": 0, "vmax": max(top, 1e-9)}
        images = [panel.imshow(share[i], interpolation="none", **scale) for panel, i in zip(axes, layers, strict=True)]
        for panel in axes:
            panel.tick_params(labelsize=7)
        figure.colorbar(images[0], ax=axes, label="share of tokens", pad=0.01, format="%.2g")
        figure.supxlabel("also chosen: expert", fontsize=10)
        figure.supylabel("expert", fontsize=10)
        return figures.svg(figure, name)


def _image(axes: Any, step: np.ndarray, values: Float[np.ndarray, "rows S"], **style: Any) -> Any:
    """Rows over steps; each column is the time up to its own step. The first row is above."""
    edges = step if len(step) > 1 else np.append(step, step + 1)
    half = (edges[-1] - edges[0]) / (2 * max(len(step) - 1, 1))
    extent = (edges[0] - half, edges[-1] + half, len(values) - 0.5, -0.5)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(figures.MaxNLocator(integer=True, nbins=3))
    axes.yaxis.set_major_locator(figures.MaxNLocator(integer=True, nbins=5))
    return axes.imshow(values, aspect="auto", interpolation="none", extent=extent, **style)


@contextlib.contextmanager
def _panels(titles: list[str], height: float, columns: int = COLUMNS) -> Iterator[tuple[Any, list[Any]]]:
    """Small axes in a grid, one a title; places left over stay empty."""
    columns = min(columns, max(len(titles), 1))
    rows = math.ceil(len(titles) / columns)
    with figures.grid(9.0, 0.6 + height * rows, rows, columns) as (figure, axes):
        flat = list(axes.flat)
        for own, title in zip(flat, titles, strict=False):
            own.set_title(title, fontsize=9)
        for left in flat[len(titles) :]:
            left.remove()
        yield figure, flat[: len(titles)]
