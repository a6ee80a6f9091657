"""Saving and restoring the train state. The only file that imports orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from moejax import config

SEPARATOR = "/"


class Checkpoints:
    """The checkpoints of one run, written in the background, each complete or absent."""

    def __init__(self, folder: Path, options: config.Checkpoint):
        self._keeper = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(options.keep),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        newest = self._keeper.latest
        return None if newest is None else int(newest.step)

    def save(self, step: int, state: Any) -> None:
        """Starts a save of the state; the arrays may be donated as soon as this returns."""
        if self.latest() != step:
            self._keeper.save_async(step, flatten(state))

    def restore(self, step: int, template: Any) -> Any:
        """The state of `step`, with the structure and the shardings of `template`."""
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), flatten(template))
        return unflatten(self._keeper.load(step, wanted), template)

    def close(self) -> None:
        """Waits for saves under way; raises if one failed."""
        self._keeper.close()


def flatten(tree: Any) -> dict[str, Any]:
    """A tree as a flat dict from readable path to array: what is on disk knows no class."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=SEPARATOR): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any], template: Any) -> Any:
    """The inverse of `flatten`, into the structure of `template`."""
    return jax.tree.unflatten(jax.tree.structure(template), [flat[name] for name in flatten(template)])
