"""Recorded routing on disk, one file a step: what a run decided, for another to play back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.arrays import NOWHERE
from moejax.errors import DamagedError, DivergedError
from moejax.models.decoder import Recordings
from moejax.moe.replay import Recorded

FOLDER = "assignments"


def save(workdir: Path, step: int, recorded: Recordings) -> None:
    """assignments/STEP.npz: `KIND.NAME` -> [layers, groups, ...]."""
    (workdir / FOLDER).mkdir(exist_ok=True)
    arrays = {f"{kind}.{name}": x for kind, r in recorded.items() for name, x in jax.device_get(r)._asdict().items()}
    np.savez_compressed(workdir / FOLDER / f"{step:08d}.npz", **arrays)


def load(source: str, step: int, groups: int, sharding: Any) -> Recordings:
    """The routing that a run of workdir `source` recorded at a step, placed on the mesh, where a batch has so many groups: another
    mesh may pad it with more or fewer rows."""
    file = Path(source).expanduser() / FOLDER / f"{step:08d}.npz"
    try:
        with open(file, "rb") as opened, np.load(opened) as arrays:
            names = {key.partition(".")[0] for key in arrays}
            found = {kind: Recorded(*(arrays[f"{kind}.{name}"] for name in Recorded._fields)) for kind in names}
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise DamagedError(
            f"{file} cannot be read ({error}); train.replay plays back every step of a run made with train.record_every=1"
        ) from error
    for recorded in found.values():
        if recorded.asked[:, groups:].any():
            raise DamagedError(
                f"{file} holds the routing of {recorded.asked.shape[1]} groups where this run has {groups}; replay with the same "
                f"data.batch, data.context and groups"
            )
    return {
        kind: Recorded(*(jax.device_put(x, sharding) for x in _fit(recorded, groups)))
        for kind, recorded in found.items()
    }


def _fit(recorded: Recorded, groups: int) -> list[np.ndarray]:
    """Groups of padding cut off or added."""
    blank = Recorded(0, 0, 0, False, NOWHERE, 0, 0.0)

    def fit(x: np.ndarray, value: bool | float | int) -> np.ndarray:
        missing = max(groups - x.shape[1], 0)
        return np.pad(x[:, :groups], ((0, 0), (0, missing), (0, 0)), constant_values=value)

    return [fit(x, value) for x, value in zip(recorded, blank, strict=True)]


def require_match(layers: dict[str, dict[str, np.ndarray]], limit: float, step: int) -> None:
    """Raises DivergedError where the router would have decided more than a share `limit` of a layer's requests otherwise."""
    for kind, stats in layers.items():
        share = np.minimum(stats["mismatched"] / np.maximum(stats["requested"], 1), 1)
        worst = int(np.argmax(share))
        if share[worst] > limit:
            raise DivergedError(
                f"replay at step {step}: the router of {kind} layer {worst} would have decided {share[worst]:.2%} of its "
                f"requests otherwise, more than train.replay_limit={limit:.2%}; replay the same config and data, or raise it"
            )
