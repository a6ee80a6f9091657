"""The train step with more and more experts at equal active FLOPs, against the dense twin's: what an equal-time comparison needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from moejax import config
from moejax import mesh as meshes
from moejax.bench import timing
from moejax.data import batches, prepare
from moejax.data.pipeline import Stream
from moejax.train import check, state, step

EXPERTS = (2, 4, 8, 16, 32, 64)
DENSE, ONE = "dense", "1"


def settings(cfg: config.Config) -> dict[str, config.Config]:
    """By number of experts: a token visits as many hidden units in all of them, and in the dense twin."""
    moe, active = cfg.model.moe, cfg.model.moe.top_k * cfg.model.moe.hidden
    dense = dataclasses.replace(cfg.model, pattern=("attention+dense",), hidden=active)
    single = dataclasses.replace(moe, num_experts=1, top_k=1, hidden=active, gate_scale=1.0, renormalize=False)
    made = {str(e): dataclasses.replace(moe, num_experts=e) for e in EXPERTS if e >= moe.top_k}
    models = {DENSE: dense} | {n: dataclasses.replace(cfg.model, moe=m) for n, m in ({ONE: single} | made).items()}
    return {name: dataclasses.replace(cfg, model=model) for name, model in models.items()}


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """Milliseconds, and the ratio to the dense twin's step round by round: median, 10th and 90th percentile. Routing is that of the first
    batches of training, one after another: nearly balanced, as a fresh router is."""
    mesh = meshes.make(config.Mesh(), jax.devices()[:1])
    rows = Stream(cfg.data, prepare.ensure(cfg.data))
    with jax.set_mesh(mesh):
        batch = batches.put(next(iter(rows.iterate(0, slice(0, cfg.data.batch)))), mesh, cfg.data.batch)
        calls = {name: _step(of, mesh, batch) for name, of in settings(cfg).items()}
        found = timing.ratios(calls, DENSE, rounds)
    return {"rounds": rounds, "ratio": found, "machine": timing.machine()}


def _step(cfg: config.Config, mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """One training step after another, the state donated as in a run."""
    check.check(cfg)
    built = state.build(cfg, mesh)
    held = [state.create(built)]
    update = step.make_train_step(built, held[0])

    def call() -> Any:
        held[0], sums, _ = update(held[0], batch)
        return sums["nats"]

    return call


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    lines = [f"{result['rounds']} rounds in turn; step over that of the dense twin", "experts  median  10 to 90 %"]
    for name, ratio in result["ratio"].items():
        lines.append(f"{name:>7}  {ratio['median']:6.3f}  {ratio['low']:.3f} to {ratio['high']:.3f}")
    return "\n".join(lines)
