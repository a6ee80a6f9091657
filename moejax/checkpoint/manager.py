"""Saving and restoring the train state. The only file that imports orbax.

What orbax leaves open is closed here: a save that is refused or fails is an error at once or at the next call, a state is saved with
a digest of each array, and restored arrays are held to them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from moejax import config
from moejax.checkpoint import digests
from moejax.errors import DamagedError, SaveError, UserError

SEPARATOR = "/"
FORMAT = 1
"""Of what is written beside the arrays."""
Extra = dict[str, Any]
"""JSON that is saved with a state: what a run must remember that is no array."""


class Checkpoints:
    """The checkpoints of one run, written in the background, each complete or absent."""

    def __init__(self, folder: Path, options: config.Checkpoint, *, agree: Callable[[bool], bool] = bool):
        """`agree` is true where its argument is on every host: all restore the same step, or none does."""
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(options.keep)]
        if options.keep_every:
            kept.append(policies.EveryNSteps(options.keep_every))
        if options.keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda found: -found[options.best],
                    n=options.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._keeper = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
        )
        self._folder, self._agree, self._best = folder.absolute(), agree, options.best if options.keep_best else ""
        self._pending: tuple[int, Any] | None = None
        self._failed = False

    def steps(self) -> list[int]:
        """Of the complete checkpoints, in order."""
        return [int(c.step) for c in self._keeper.checkpoints]

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, extra: Extra | None = None, metrics: dict[str, float] | None = None) -> None:
        """Starts a save of the state; the arrays may be donated as soon as this returns. Waits for the save before, and raises if that
        one failed.

        Args:
          extra: JSON that `restore` gives back.
          metrics: numbers to keep the best by; needed where the options keep the best.
        """
        self.wait()
        if self.latest() == step:
            return
        flat = flatten(state)
        beside = {"format": FORMAT, "digests": digests.of(flat), "extra": extra or {}}
        beside |= {"hash": _hash(beside)}
        ranked = {self._best: metrics[self._best]} if self._best and metrics else None
        try:
            response = self._keeper.save_async(step, flat, custom_metadata=beside, metrics=ranked)
        except Exception as error:
            raise self._unwritten(step, error) from error
        if response is None:
            raise SaveError(
                f"the checkpoint of step {step} was refused: {self._folder} holds later steps {self.steps()}"
            )
        self._pending = step, response

    def wait(self) -> None:
        """Until nothing is being written; raises what the last save failed of."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            raise self._unwritten(step, error) from error

    def _unwritten(self, step: int, error: Exception) -> SaveError:
        self._failed = True
        return SaveError(
            f"the checkpoint of step {step} could not be written to {self._folder} ({_line(error)}); the ones before it are whole "
            f"({[s for s in self.steps() if s != step]}): make room or mend the disk, and run the same command again"
        )

    def check(self) -> None:
        """Raises what a save failed of if it has ended; does not wait."""
        if self._pending is not None and not self._keeper.is_saving_in_progress():
            self.wait()

    def restore(self, step: int, template: Any) -> tuple[Any, Extra]:
        """The state of `step` with the structure and the shardings of `template`, and what was saved beside it. Waits for a save that
        this one began.

        Raises DamagedError where the files cannot be read as written, or an array is not the one that was saved.
        """
        wanted = _structs(template)
        beside = self._beside(step, wanted)
        return unflatten(self._held(step, wanted, beside["digests"]), template), beside["extra"]

    def restore_part(self, step: int, template: Any) -> Any:
        """Those arrays of the state of `step` that `template`, a part of its tree, has, with the shardings that it has; the others are
        not read. Raises as `restore` does."""
        wanted = _structs(template)
        saved = self._beside(step, wanted, part=True)["digests"]
        asked = {name: wanted.get(name, ocp.PLACEHOLDER) for name in {**saved, **wanted}}
        return unflatten(self._held(step, asked, {name: saved.get(name) for name in wanted}), template)

    def _held(self, step: int, asked: dict[str, Any], saved: dict[str, str]) -> dict[str, Any]:
        """The arrays that have a digest in `saved`, which they are held to."""
        flat, reason = None, "another host could not read it"
        try:
            flat = self._keeper.load(step, asked)
        except (jax.errors.JaxRuntimeError, MemoryError):  # too little memory is no damage
            raise
        except Exception as error:  # what damage surfaces as depends on the file
            reason = _line(error)
        if not self._agree(flat is not None):
            raise DamagedError(f"checkpoint {step} in {self._folder} cannot be read: {reason}")
        assert flat is not None
        flat = {name: flat[name] for name in saved}
        apart = digests.differing(flat, saved)
        if apart:
            raise DamagedError(
                f"checkpoint {step} in {self._folder} is not as it was saved: {len(apart)} of {len(flat)} arrays differ ({apart[0]}, ...)"
            )
        return flat

    def _beside(self, step: int, asked: dict[str, Any], part: bool = False) -> dict[str, Any]:
        """What was saved beside the arrays. A state of other arrays than asked for, or with `part` without one of them, is no damage:
        UserError."""
        self.wait()
        wanted = {name: (x.shape, str(x.dtype)) for name, x in asked.items()}
        found, saved, reason = None, {}, "another host could not read it"
        try:
            described = self._keeper.metadata(step)
            found = cast(dict[str, Any], described.custom_metadata)
            saved = {name: (tuple(a.shape), str(np.dtype(a.dtype))) for name, a in _leaves(described).items()}
        except Exception as error:  # as above
            reason = _line(error)
        if not self._agree(bool(found) and found.get("hash") == _hash(found)):
            raise DamagedError(f"checkpoint {step} in {self._folder} has no readable metadata: {reason}")
        assert found is not None
        apart = sorted(n for n in {*wanted, *(() if part else saved)} if wanted.get(n) != saved.get(n))
        if apart and set(saved) == set(found["digests"]):
            raise UserError(
                f"checkpoint {step} in {self._folder} is of another model or version: {len(apart)} arrays differ, as {apart[0]} (saved "
                f"{saved.get(apart[0], 'not at all')}, wanted {wanted.get(apart[0], 'not at all')}); give its config, or another --workdir"
            )
        return found

    def restore_newest(self, template: Any, tell: Callable[[int, str], None]) -> tuple[int, Any, Extra] | None:
        """The newest checkpoint that is whole: step, state, extra. None where there is none at all.

        A damaged one is told and put aside into `damaged/`, where it can be looked at. Raises DamagedError if all are.
        """
        found = self.steps()
        for step in reversed(found):
            try:
                return step, *self.restore(step, template)
            except DamagedError as error:
                tell(step, str(error))
                self.put_aside(step)
        if found:
            raise DamagedError(
                f"none of the checkpoints {found} in {self._folder} is whole; they are in {self._aside} now: restore a copy of one, or "
                "choose another --workdir"
            )
        return None

    @property
    def _aside(self) -> Path:
        return self._folder.parent / "damaged"

    def put_aside(self, step: int) -> None:
        """Moves a checkpoint out of the way of later saves."""
        if jax.process_index() == 0:
            self._aside.mkdir(exist_ok=True)
            target = self._aside / str(step)
            if target.exists():
                shutil.rmtree(target)
            shutil.move(self._folder / str(step), target)
        self._agree(True)
        self._keeper.reload()

    def forget_after(self, step: int) -> None:
        """Deletes checkpoints of later steps: a run that went back would be refused to save them again."""
        self.wait()
        for later in [s for s in self.steps() if s > step]:
            self._keeper.delete(later)

    def shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of every array of a checkpoint; nothing is read. Raises DamagedError."""
        try:
            leaves = _leaves(self._keeper.metadata(step))
        except Exception as error:  # what damage surfaces as depends on the file
            raise DamagedError(f"checkpoint {step} in {self._folder} cannot be read: {_line(error)}") from error
        return {name: jax.ShapeDtypeStruct(tuple(a.shape), np.dtype(a.dtype)) for name, a in leaves.items()}

    def load_arrays(self, step: int, names: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
        """Arrays of a checkpoint as saved, whole on this host, those whose path is asked for; held to their digests."""
        try:
            described = self._keeper.metadata(step)
            every, saved = _leaves(described), cast(dict[str, Any], described.custom_metadata)["digests"]
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            asked = {
                name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) if names(name) else ocp.PLACEHOLDER
                for name, a in every.items()
            }
            loaded = self._keeper.load(step, asked)
        except Exception as error:  # what damage surfaces as depends on the file
            raise DamagedError(f"checkpoint {step} in {self._folder} cannot be read: {_line(error)}") from error
        flat = {name: loaded[name] for name in every if names(name)}
        apart = digests.differing(flat, {name: saved[name] for name in flat})
        if apart:
            raise DamagedError(
                f"checkpoint {step} in {self._folder} is not as it was saved: {len(apart)} of {len(flat)} arrays differ ({apart[0]}, ...)"
            )
        return {name: np.asarray(a) for name, a in flat.items()}

    def close(self) -> None:
        """Waits for a save under way; raises if it failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._keeper.close()  # raises once more what a save failed of


def _hash(beside: dict[str, Any]) -> str:
    """Of what is saved beside the arrays, without the hash itself."""
    told = {name: value for name, value in beside.items() if name != "hash"}
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


def _leaves(described: Any) -> dict[str, Any]:
    return dict(described.metadata)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _structs(template: Any) -> dict[str, Any]:
    flat = flatten(template)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in flat.items()}


def flatten(tree: Any) -> dict[str, Any]:
    """A tree as a flat dict from readable path to array: what is on disk knows no class."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=SEPARATOR): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any], template: Any) -> Any:
    """The inverse of `flatten`, into the structure of `template`."""
    return jax.tree.unflatten(jax.tree.structure(template), [flat[name] for name in flatten(template)])
