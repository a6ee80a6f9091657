"""Routing of a run over its training steps, read off routing/: sums of every layer, and which experts the probe's tokens went to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.errors import DamagedError
from moejax.moe import diagnostics


@dataclasses.dataclass(frozen=True)
class History:
    """One kind of sparse layer: S times, L layers, E experts."""

    step: Int[np.ndarray, " S"]
    sums: dict[str, np.ndarray]
    """By name, [S, L, ...]; those that every file has."""

    @property
    def fair(self) -> Float[np.ndarray, "S L E"]:
        """Load as a multiple of the fair share; 0 where a layer has none."""
        load = self.sums["load"].astype(np.float64)
        return load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)

    def health(self) -> dict[str, Float[np.ndarray, "S L"]]:
        """What is watched of every layer, by title; what the files do not hold is left out."""
        load = self.sums["load"]
        found = {
            "largest load [fair shares]": self.fair.max(axis=-1),
            "dead experts": np.stack([diagnostics.dead(of_step) for of_step in load]).astype(np.float64),
        }
        for title, (name, whole, unit) in SHARES.items():
            if name in self.sums and whole in self.sums:
                found[title] = unit * self.sums[name] / np.maximum(self.sums[whole], 1)
        return found


SHARES = {
    "router entropy [nats]": ("entropy", "tokens", 1.0),
    "margin at the last choice": ("margin", "tokens", 1.0),
    "dropped [% of requests]": ("dropped", "requested", 100.0),
    "rerouted [% of requests]": ("rerouted", "requested", 100.0),
}
"""Sums that are shown as a share of another: title -> part, whole, unit."""


def read(folder: Path) -> dict[str, History]:
    """By kind of layer; empty where nothing was kept. Raises DamagedError."""
    each: dict[str, list[dict[str, np.ndarray]]] = {}
    for file in sorted(folder.glob("routing/[0-9]*.npz")):
        of_file: dict[str, dict[str, np.ndarray]] = {}
        for key, value in arrays(file).items():
            kind, _, name = key.rpartition(".")
            of_file.setdefault(kind, {"step": np.asarray(int(file.stem))})[name] = value
        for kind, sums in of_file.items():
            each.setdefault(kind, []).append(sums)
    return {kind: _stacked(sums) for kind, sums in each.items()}


def _stacked(sums: list[dict[str, np.ndarray]]) -> History:
    common = set.intersection(*(set(of_step) for of_step in sums)) - {"step"}
    step = np.asarray([of_step["step"] for of_step in sums], np.int64)
    return History(step, {name: np.stack([of_step[name] for of_step in sums]) for name in sorted(common)})


@dataclasses.dataclass(frozen=True)
class Probe:
    """Where the fixed held-out rows went at the last evaluation: N tokens, valid ones alone, in the order of the text."""

    experts: Int[np.ndarray, "L N K"]
    """-1 where there is none."""
    tokens: Int[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]
    rows: Int[np.ndarray, " N"]
    positions: Int[np.ndarray, " N"]


def probe(folder: Path) -> Probe | None:
    """The last one; None where there is none, or it is of a version that did not keep the tokens. Raises DamagedError."""
    files = sorted(folder.glob("routing/probe_*.npz"))
    found = arrays(files[-1]) if files else {}
    if "tokens" not in found:
        return None
    valid: Bool[np.ndarray, " N"] = found["valid"]
    order = np.lexsort((found["positions"], found["rows"]))
    order = order[valid[order]]
    facts = (found[name][order] for name in ("tokens", "labels", "rows", "positions"))
    return Probe(found["experts"][:, order], *facts)


def arrays(file: Path) -> dict[str, np.ndarray]:
    """Of an npz file, by name. Raises DamagedError."""
    try:
        with np.load(file) as found:
            return dict(found)
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise DamagedError(f"{file} cannot be read ({error}); delete it to report without it") from error
