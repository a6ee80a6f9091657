"""A run, top to bottom: check, build, resume, train, evaluate, save. The same call in the same workdir resumes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moejax import config
from moejax import mesh as meshes
from moejax.checkpoint.manager import Checkpoints
from moejax.data import prepare
from moejax.data.pipeline import Rows, Stream
from moejax.errors import UserError, together
from moejax.train import check, describe, hosts, state
from moejax.train.evaluate import Evaluator
from moejax.train.metrics import Numbers
from moejax.train.progress import Reporter
from moejax.train.run import Run
from moejax.train.sections import Sections
from moejax.train.workdir import Workdir


def train(cfg: config.Config, workdir: str, *, quiet: bool = False) -> Numbers:
    """Trains to the last step and returns the numbers of the full held-out evaluation.

    Raises ConfigError before a device is touched, UserError where the workdir belongs to another run, DivergedError when numbers went
    bad, DamagedError for data or checkpoints that are not as written, PreemptedError when asked to stop by SIGINT or SIGTERM, after
    saving.
    """
    # ---- check: no device yet -------------------------------------------------------------------------------------
    check.check(cfg)
    with contextlib.ExitStack() as stack:
        sections = Sections(dataclasses.asdict(cfg.watchdog), Path(workdir).expanduser().absolute() / "stacks.txt")
        stack.callback(sections.close)
        sections.enter("init")
        stop = stack.enter_context(hosts.stop_signal())
        folder = prepare.ensure(cfg.data)
        stream, heldout = Stream(cfg.data, folder, cfg.faults), Rows(folder, "heldout", cfg.data.context)

        # ---- build ------------------------------------------------------------------------------------------------
        mesh = meshes.make(cfg.mesh)
        hosts.require_same(describe.identity(cfg, stream.rows.hash))
        files = _claim(workdir, cfg)
        stack.callback(files.close)
        sections.tell = lambda name, seconds: files.event("hung", section=name, seconds=round(seconds, 1))
        reporter = Reporter(cfg.name, cfg.train.steps, quiet=quiet or not files.primary)
        stack.callback(reporter.close)
        stack.enter_context(jax.set_mesh(mesh))
        built = state.build(cfg, mesh)
        now = state.create(built)
        files.write("run.json", describe.run(built, now, stream.rows, heldout))
        reporter.say(describe.line(cfg, mesh))

        # ---- resume -----------------------------------------------------------------------------------------------
        checkpoints = Checkpoints(files.path / "checkpoints", cfg.checkpoint, agree=hosts.agree)
        stack.callback(checkpoints.close)
        run = Run(
            built, now, 0, cfg.data.skip, stream, Evaluator(built, now, heldout), checkpoints, files, reporter, sections, stop
        )  # fmt: skip
        stack.push(_on_exit(sections, stack, files))
        with sections.of("restore"):
            _resume(run)
        sections.leave()
        sections.enter("other")
        return run.finish()


def _claim(workdir: str, cfg: config.Config) -> Workdir:
    """The folder, held by this run. Process 0 takes it; if it may not, all processes end."""
    files, refused = None, None
    try:
        files = Workdir(workdir, cfg, primary=jax.process_index() == 0)
    except Exception as error:
        refused = error
    if hosts.agree(files is not None):
        assert files is not None
        return files
    if files is not None:
        files.close()
    raise refused or UserError(f"another process could not take workdir {workdir}: its output says why")


def _resume(run: Run) -> None:
    """From the newest whole checkpoint, if there is one."""

    def tell(step: int, why: str) -> None:
        run.reporter.say(f"{why}; going back to the one before")
        run.files.event("damaged checkpoint", step=step, why=why)

    found = run.checkpoints.restore_newest(run.now, tell)
    lost = max(run.files.last_step() - (found[0] if found else 0), 0)
    if found is not None:
        step, run.now, saved = found
        extra = {"skip": run.skip, "rollbacks": 0, "unevaluated": False, "evaluation": {}} | saved
        run.done, run.skip, run.rollbacks = step, tuple(extra["skip"]), extra["rollbacks"]
        run.unevaluated, run.last_evaluation = extra["unevaluated"], extra["evaluation"]
        run.reporter.say(f"resumed at step {step}")
        run.files.event("resumed", step=step, lost_steps=lost)
    elif lost:
        run.files.event("started again", lost_steps=lost)
    run.files.truncate(run.done)


def _on_exit(sections: Sections, stack: contextlib.ExitStack, files: Workdir) -> Callable[..., None]:
    """For an ExitStack: after an error the clean-up has a time of its own, because it may wait for processes that are gone. What one
    process alone may have raised leaves no time for it: the others wait for this one."""

    def leave(kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            return
        sections.enter("exit")
        if jax.process_count() > 1 and not together(error):
            stack.pop_all()
            files.close()

    return leave
