"""A run, top to bottom: check, build, resume, train, evaluate, save. The same call in the same workdir resumes."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp

from moejax import config, sharding
from moejax import mesh as meshes
from moejax.checkpoint.manager import Checkpoints
from moejax.data import batches, prepare
from moejax.data.pipeline import Rows, Stream
from moejax.errors import DivergedError, PreemptedError
from moejax.train import check, describe, metrics, recordings, state, step, watch
from moejax.train.around import Profile, Stopwatch, stop_signal
from moejax.train.evaluate import Evaluator
from moejax.train.metrics import Numbers
from moejax.train.progress import Reporter
from moejax.train.workdir import Workdir


def train(cfg: config.Config, workdir: str, *, quiet: bool = False) -> Numbers:
    """Trains to the last step and returns the numbers of the full held-out evaluation.

    Raises ConfigError before a device is touched, DivergedError when the loss is not finite, PreemptedError when
    asked to stop by SIGINT or SIGTERM, after saving.
    """
    # ---- check: no device yet -------------------------------------------------------------------------------------
    check.check(cfg)
    folder = prepare.ensure(cfg.data)
    stream, heldout = Stream(cfg.data, folder), Rows(folder, "heldout", cfg.data.context)

    # ---- build ----------------------------------------------------------------------------------------------------
    mesh = meshes.make(cfg.mesh)
    primary = jax.process_index() == 0
    files = Workdir(workdir, cfg, primary=primary)
    reporter = Reporter(cfg.name, cfg.train.steps, quiet=quiet or not primary)
    with contextlib.ExitStack() as stack:
        stack.callback(files.close)
        stack.callback(reporter.close)
        stack.enter_context(jax.set_mesh(mesh))
        built = state.build(cfg, mesh)
        now = state.create(built)
        files.write("run.json", describe.run(built, now, stream.rows, heldout))
        reporter.say(describe.line(cfg, mesh))

        # ---- resume -----------------------------------------------------------------------------------------------
        checkpoints = Checkpoints(files.path / "checkpoints", cfg.checkpoint)
        stack.callback(checkpoints.close)
        newest = checkpoints.latest()
        start = newest or 0
        if newest is not None:  # at step 0 it is what a surgery made
            now = checkpoints.restore(start, now)
            reporter.say(f"resumed at step {start}")
            files.event("resumed", step=start)
        files.truncate(start)
        return _steps(built, now, start, stream, Evaluator(built, now, heldout), checkpoints, files, reporter)


def _steps(
    built: state.Built,
    now: state.TrainState,
    start: int,
    stream: Stream,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    files: Workdir,
    reporter: Reporter,
) -> Numbers:
    """The loop itself. Time is measured between logs, less evaluation, saving and the first compilation."""
    cfg, mesh = built.config, built.mesh
    total = batches.padded_rows(cfg, mesh, cfg.data.batch)
    mine = batches.rows_of_host(mesh, total)
    update = step.make_train_step(built, now, replay=bool(cfg.train.replay))
    alarm = watch.Alarm(cfg.model.moe, files, reporter)
    clock, profile = Stopwatch(), Profile(cfg.train, files.path)
    with stop_signal() as stop, contextlib.closing(stream.iterate(start, mine)) as rows:
        for done in range(start + 1, cfg.train.steps + 1):
            profile.before(done)
            played = _replayed(cfg, done, total, mesh)
            now, sums, recorded = update(now, batches.put(next(rows), mesh, total), *played)
            _keep_routing(sums, recorded, done, cfg.train, files)
            profile.after(done, sums)
            if done == start + 1:
                jax.block_until_ready(sums)
                clock.restart()
            if done % cfg.train.log_every == 0 or done == cfg.train.steps:
                host = metrics.to_host(sums)
                numbers = metrics.of_training(host, cfg.model.moe) | {"data/padding_rows": total - cfg.data.batch}
                _require_finite(numbers, done)
                kept = metrics.to_host(now.routing)
                files.log(done, numbers | metrics.of_state(kept) | alarm.sound(kept, done))
                files.log(done, clock.lap(done, cfg.data.batch * cfg.data.context), "timing.jsonl")
                reporter.step(done, numbers, clock.tokens_per_second)
            last = done == cfg.train.steps
            if done % cfg.train.routing_every == 0:
                files.save_routing(f"{done:08d}", metrics.to_host(sums)["layers"])
            if done % cfg.train.eval_every == 0 and not last:
                with clock.paused(sums):
                    numbers = evaluator.run(now, cfg.train.eval_rows, "eval")[0]
                    files.log(done, numbers | _churn(now, done, evaluator, cfg.train, files))
            if done % cfg.checkpoint.every == 0 or last or stop.asked:
                with clock.paused(sums):
                    _require_finite({"train/loss": float(sums["nats"])}, done)
                    if not _all_finite(now):
                        raise DivergedError(
                            f"the state after step {done} is not finite; lower train.learning_rate or train.clip_norm"
                        )
                    checkpoints.save(done, now)
            if stop.asked and not last:
                files.event("stopped", step=done)
                raise PreemptedError(f"stopped and saved at step {done}; the same command goes on from there")
    return _finish(built, now, evaluator, files, reporter)


def _replayed(cfg: config.Config, done: int, rows: int, mesh: jax.sharding.Mesh) -> list[Any]:
    """The recorded routing of a step of so many rows, where the run replays one."""
    if not cfg.train.replay:
        return []
    groups = rows // cfg.model.moe.group_rows * step.groups_of_unit(cfg)
    return [recordings.load(cfg.train.replay, done, groups, sharding.groups_sharding(mesh))]


def _keep_routing(sums: Any, recorded: Any, done: int, train: config.Train, files: Workdir) -> None:
    """Routing to the disk where the run records, and its differences from what is played back held to the limit."""
    if train.replay:
        recordings.require_match(metrics.to_host(sums["layers"]), train.replay_limit, done)
    if train.record_every and done % train.record_every == 0 and files.primary:
        recordings.save(files.path, done, recorded)


def _churn(now: Any, done: int, evaluator: Evaluator, train: config.Train, files: Workdir) -> Numbers:
    """The probe's choices, kept, against those of the evaluation before and of a reference."""
    probe = evaluator.probe(now)
    numbers = watch.churn(files.path, done, probe) | watch.agreement(train.reference, probe)
    files.save_probe(done, probe)
    return numbers


def _finish(built: state.Built, now: Any, evaluator: Evaluator, files: Workdir, reporter: Reporter) -> Numbers:
    """All held-out rows, once, with the routing tables of the report."""
    numbers, sums = evaluator.run(now, None, "heldout")
    steps = built.config.train.steps
    files.log(steps, numbers)
    files.save_probe(steps, evaluator.probe(now))
    files.save_routing("heldout", sums["layers"])
    reporter.say(f"held-out bits per byte {numbers['heldout/bits_per_byte']:.4f} after {steps} steps")
    return numbers


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    """Whether every real number of a tree is finite. A loss is of before its update, so it does not tell."""
    real = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in real]))


def _require_finite(numbers: Numbers, step: int) -> None:
    if not math.isfinite(numbers["train/loss"]):
        raise DivergedError(
            f"the loss at step {step} is {numbers['train/loss']}; lower train.learning_rate or train.clip_norm"
        )
