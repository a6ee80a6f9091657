"""The steps of a run: train, log, evaluate, save; go back over a spike; stop when asked. Every decision is made of numbers that all hosts
share, so they all make the same one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import sharding
from moejax.checkpoint import digests
from moejax.checkpoint.manager import Checkpoints, flatten
from moejax.data import batches
from moejax.data.pipeline import Stream, Windows, position, require_windows
from moejax.errors import DamagedError, DivergedError, PreemptedError, UserError
from moejax.train import faults, guard, hosts, metrics, recordings, state, step, watch
from moejax.train.around import Profile, Stopwatch, memory
from moejax.train.evaluate import Evaluator, StoppedError
from moejax.train.metrics import Numbers
from moejax.train.progress import Reporter
from moejax.train.sections import Sections
from moejax.train.workdir import Workdir


@dataclasses.dataclass
class Run:
    """What a run is made of. `now`, `done` and `skip` move; the rest is made once."""

    built: state.Built
    now: state.TrainState
    done: int
    """Steps made."""
    skip: Windows
    """Batches left out, by config and by going back."""
    stream: Stream
    evaluator: Evaluator
    checkpoints: Checkpoints
    files: Workdir
    reporter: Reporter
    sections: Sections
    stop: hosts.Stop
    unevaluated: bool = False
    """Whether the evaluation of step `done` was cut short by a stop."""
    rollbacks: int = 0
    last_evaluation: Numbers = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        cfg = self.built.config
        self.cfg, self.mesh = cfg, self.built.mesh
        self.rows = batches.padded_rows(cfg, self.mesh, cfg.data.batch)
        self.mine = batches.rows_of_host(self.mesh, self.rows)
        self.alarm = watch.Alarm(cfg.model.moe, self.files, self.reporter)
        self.clock, self.profile = Stopwatch(), Profile(cfg.train, self.files.path)
        self.update: Any = None

    # ---- the whole ------------------------------------------------------------------------------------------------

    def finish(self) -> Numbers:
        """Trains to the last step and evaluates all held-out rows."""
        try:
            if self.unevaluated:
                self._evaluate()
            while self.done < self.cfg.train.steps:
                self._segment()
            return self._final()
        except StoppedError:
            self._save_and_stop(unevaluated=self.done < self.cfg.train.steps)
        raise AssertionError("unreachable")

    def _segment(self) -> None:
        """Steps until the last one, or until the run goes back."""
        with contextlib.closing(self.stream.iterate(self.done, self.mine, self.skip)) as rows:
            while self.done < self.cfg.train.steps:
                with self.sections.of("step"):
                    sums = self._step(next(rows))
                if self._due(self.cfg.train.log_every) and self._spiked(self._log(sums)):
                    return
                if self._due(self.cfg.train.routing_every, last=False):
                    self.files.save_routing(f"{self.done:08d}", metrics.to_host(sums)["layers"])
                if self._due(self.cfg.train.replicas_every, last=False):
                    require_replicas(self.now, self.done)
                if self._due(self.cfg.train.eval_every, last=False) and not self._last:
                    with self.clock.paused(sums):
                        self._evaluate()
                asked = self.stop.asked()
                if self._due(self.cfg.checkpoint.every) or asked:
                    with self.clock.paused(sums):
                        if self._spiked(metrics.to_host(sums["guard"])):
                            return
                        self._save()
                self.checkpoints.check()
                if asked and not self._last:
                    self._stopped()

    @property
    def _last(self) -> bool:
        return self.done == self.cfg.train.steps

    def _due(self, every: int, last: bool = True) -> bool:
        """Whether it is time for what happens every so many steps (0 never), and at the end."""
        return (every > 0 and self.done % every == 0) or (last and self._last)

    # ---- one step -------------------------------------------------------------------------------------------------

    def _step(self, host: dict[str, np.ndarray]) -> Any:
        number = self.done + 1
        faults.before_step(self.cfg.faults, number)
        self.profile.before(number)
        batch = batches.put(host, self.mesh, self.rows)
        played = self._replayed(number)
        first = self.update is None
        if first:
            with self.sections.of("compile"):
                self.update = self._compiled(batch, *played)
        self.now, sums, recorded = self.update(self.now, batch, *played)
        self.done = number
        self._keep_routing(sums, recorded)
        self.profile.after(number, sums)
        if first:
            jax.block_until_ready(sums)
            self.clock.restart()
        return sums

    def _compiled(self, *arguments: Any) -> Any:
        """The train step; all hosts have the same program, or none goes on."""
        update: Any = step.make_train_step(self.built, self.now, replay=bool(self.cfg.train.replay))
        lowered = update.lower(self.now, *arguments)
        if jax.process_count() > 1:
            hosts.require_same({"the program of the train step": lowered.as_text()})
        return lowered.compile()

    def _replayed(self, number: int) -> list[Any]:
        """The recorded routing of a step, where the run replays one."""
        cfg = self.cfg
        if not cfg.train.replay:
            return []
        groups = self.rows // cfg.model.moe.group_rows * step.groups_of_unit(cfg)
        return [recordings.load(cfg.train.replay, number, groups, sharding.groups_sharding(self.mesh))]

    def _keep_routing(self, sums: Any, recorded: Any) -> None:
        """Routing to the disk where the run records, and its differences from what is played back held to the limit."""
        train = self.cfg.train
        if train.replay:
            recordings.require_match(metrics.to_host(sums["layers"]), train.replay_limit, self.done)
        if train.record_every and self.done % train.record_every == 0 and self.files.primary:
            recordings.save(self.files.path, self.done, recorded)

    # ---- what is said of it ---------------------------------------------------------------------------------------

    def _log(self, sums: Any) -> dict[str, Any]:
        """A line of metrics; returns the guard."""
        cfg, moe = self.cfg, self.cfg.model.moe
        with self.sections.of("step"):
            host, kept = metrics.to_host(sums), metrics.to_host(self.now.routing)
        guard.require_few(host["guard"], cfg.train, self.done)
        numbers = metrics.of_training(host, moe) | {"data/padding_rows": self.rows - cfg.data.batch}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self.files.log(self.done, finite | metrics.of_state(kept) | self.alarm.sound(kept, self.done))
        lap = self.clock.lap(self.done, cfg.data.batch * cfg.data.context)
        self.files.log(self.done, lap | memory(), "timing.jsonl")
        self.reporter.step(self.done, numbers, self.clock.tokens_per_second)
        return host["guard"]

    def _evaluate(self) -> None:
        """Some held-out rows, and how routing of the probe changed. A stop inside raises StoppedError."""
        with self.sections.of("evaluation"):
            numbers = self.evaluator.run(self.now, self.cfg.train.eval_rows, "eval", self._poll)[0]
            probe = self.evaluator.probe(self.now)
        self.last_evaluation = numbers
        numbers = (
            numbers | watch.churn(self.files.path, self.done, probe) | watch.agreement(self.cfg.train.reference, probe)
        )
        self.files.log(self.done, numbers)
        self.files.save_probe(self.done, probe)

    def _poll(self) -> bool:
        self.sections.beat()
        return self.stop.asked()

    def _final(self) -> Numbers:
        """All held-out rows, once, with the routing tables of the report."""
        with self.sections.of("evaluation"):
            numbers, sums = self.evaluator.run(self.now, None, "heldout", self._poll)
            probe = self.evaluator.probe(self.now)
        self.files.log(self.done, numbers)
        self.files.save_probe(self.done, probe)
        self.files.save_routing("heldout", sums["layers"])
        self.reporter.say(f"held-out bits per byte {numbers['heldout/bits_per_byte']:.4f} after {self.done} steps")
        return numbers

    # ---- saving, stopping, going back -----------------------------------------------------------------------------

    def _save(self, unevaluated: bool = False) -> None:
        with self.sections.of("save"), faults.saving(self.cfg.faults, self.done):
            if not _all_finite(self.now):
                raise DivergedError(
                    f"the state after step {self.done} is not finite; lower train.learning_rate or train.clip_norm"
                )
            if not hosts.agree(self.files.held()):
                raise UserError(
                    f"workdir {self.files.path} was taken over by another run while this one did not move; this one ends without saving"
                )
            extra = {"skip": list(self.skip), "unevaluated": unevaluated, "rollbacks": self.rollbacks}
            extra |= {"evaluation": self.last_evaluation}
            self.checkpoints.save(self.done, self.now, extra, self.last_evaluation)
            if self.cfg.faults.disk_full_at:
                self.checkpoints.wait()
        self.files.ledger(self.done, self.sections.seconds)

    def _save_and_stop(self, unevaluated: bool) -> None:
        self._save(unevaluated)
        self._stopped()

    def _stopped(self) -> None:
        with self.sections.of("save"):
            self.checkpoints.wait()
        self.files.event("stopped", step=self.done)
        raise PreemptedError(f"stopped and saved at step {self.done}; the same command goes on from there")

    def _spiked(self, seen: dict[str, Any]) -> bool:
        """Whether the run went back over a spike. The batches from the checkpoint to the spike are left out from now on."""
        guard.require_few(seen, self.cfg.train, self.done)
        at = int(seen["spike"])
        if not at:
            return False
        with self.sections.of("restore"):
            self.checkpoints.wait()
            before = self.checkpoints.latest()
            if before is None or self.rollbacks >= self.cfg.train.max_rollbacks:
                why = "no checkpoint to go back to" if before is None else f"gone back {self.rollbacks} times already"
                raise DivergedError(
                    f"the loss of step {at} spiked and there is {why}; lower train.learning_rate or save more often"
                )
            self.now, extra = self.checkpoints.restore(before, self.now)
        window = position(before, self.skip), position(at - 1, self.skip) + 1
        self.skip = joined(self.skip, window)
        self.rollbacks, self.done = self.rollbacks + 1, before
        self.files.truncate(before)
        self.files.event("rolled back", spike=at, to=before, left_out=list(window), skip=list(self.skip))
        self.reporter.say(
            f"the loss of step {at} spiked: back to step {before}, batches {window[0]} to {window[1] - 1} left out"
        )
        self.clock.restart()
        return True


def joined(skip: Windows, window: tuple[int, int]) -> Windows:
    """The windows with one more; those that touch become one."""
    spans = sorted([*zip(skip[::2], skip[1::2], strict=True), window])
    merged = [spans[0]]
    for first, after in spans[1:]:
        if first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(after, merged[-1][1])
        else:
            merged.append((first, after))
    found = tuple(edge for span in merged for edge in span)
    require_windows(found)
    return found


def require_replicas(now: Any, done: int) -> None:
    """Raises DamagedError, on all hosts, where devices that hold the same part of an array hold other bits (B17)."""
    parts = hosts.gathered(digests.of_parts(flatten(now)))
    apart = sorted(name for (name, _), found in parts.items() if len(found) > 1)
    if not hosts.agree(not apart):
        raise DamagedError(
            f"after step {done} devices disagree about {', '.join(apart[:3]) or 'arrays of other hosts'}: a device or a link computes "
            "wrongly. Start again on other machines; the last checkpoint may be older than the fault"
        )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    """Whether every real number of a tree is finite. A loss is of before its update, so it does not tell."""
    real = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in real]))
