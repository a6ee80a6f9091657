"""Recorded routing on disk, one file a step: what a run decided, for another to play back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.errors import DamagedError, DivergedError
from moejax.models.decoder import Recordings
from moejax.moe.replay import Recorded

FOLDER = "assignments"


def save(workdir: Path, step: int, recorded: Recordings) -> None:
    """assignments/STEP.npz: `KIND.NAME` -> [layers, groups, ...]."""
    (workdir / FOLDER).mkdir(exist_ok=True)
    arrays = {f"{kind}.{name}": x for kind, r in recorded.items() for name, x in jax.device_get(r)._asdict().items()}
    np.savez_compressed(workdir / FOLDER / f"{step:08d}.npz", **arrays)


def load(source: str, step: int, sharding: Any) -> Recordings:
    """The routing that a run of workdir `source` recorded at a step, placed on the mesh."""
    file = Path(source).expanduser() / FOLDER / f"{step:08d}.npz"
    try:
        with np.load(file) as arrays:
            names = {key.partition(".")[0] for key in arrays}
            found = {kind: Recorded(*(arrays[f"{kind}.{name}"] for name in Recorded._fields)) for kind in names}
    except (OSError, KeyError, ValueError) as error:
        raise DamagedError(
            f"{file} cannot be read ({error}); train.replay plays back every step of a run made with train.record_every=1"
        ) from error
    return jax.tree.map(lambda x: jax.device_put(x, sharding), found)


def require_match(layers: dict[str, dict[str, np.ndarray]], limit: float, step: int) -> None:
    """Raises DivergedError where the router would have decided more than a share `limit` of a layer's requests otherwise."""
    for kind, stats in layers.items():
        share = stats["mismatched"] / np.maximum(stats["requested"], 1)
        worst = int(np.argmax(share))
        if share[worst] > limit:
            raise DivergedError(
                f"replay at step {step}: the router of {kind} layer {worst} would have decided {share[worst]:.2%} of its "
                f"requests otherwise, more than train.replay_limit={limit:.2%}; replay the same config and data, or raise it"
            )
