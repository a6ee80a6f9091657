"""The train step with more and more experts at equal active FLOPs, against the dense twin's: what an equal-time comparison needs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import config
from moejax import mesh as meshes
from moejax.bench import timing
from moejax.data import batches, prepare
from moejax.data.pipeline import Stream
from moejax.errors import UserError
from moejax.train import check, state, step

LOSSES = Path("runs/experts/results.json")
"""Where configs/sweeps/experts.py was run: with it there, sparse and dense are compared at equal steps and at equal time."""
NUMBER = "heldout/bits_per_byte"
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
    result = {"rounds": rounds, "ratio": found, "machine": timing.machine()}
    if LOSSES.exists():
        result |= {"steps": cfg.train.steps} | losses(json.loads(LOSSES.read_text())["settings"])
    return result


def losses(settings: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Held-out bits per byte over seeds: of the sparse model by number of experts, of the dense twin by training steps."""
    found: dict[str, dict[str, list[float]]] = {"sparse": {}, "dense": {}}
    for row in settings:
        options = row["overrides"]
        if NUMBER in row["each"]:
            kind, key = ("dense", "train.steps") if "model.pattern" in options else ("sparse", "model.moe.num_experts")
            found[kind][str(options[key])] = row["each"][NUMBER]
    return found


def gains(result: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """What the dense twin has more than each sparse model, seed by seed, at equal steps and at equal time: there the twin trains as many
    more steps as the sparse step takes longer, between its runs straight in the logarithm of the steps. Past its longest run there is
    nothing to compare with, and no number."""
    lengths = sorted(map(int, result["dense"]))
    twins = np.asarray([result["dense"][str(n)] for n in lengths])
    found = {}
    for name, own in result["sparse"].items():
        steps = result["steps"] * max(result["ratio"][name]["median"], 1.0)
        at_time = (
            [np.interp(np.log(steps), np.log(lengths), of_seed) for of_seed in twins.T] if steps <= lengths[-1] else []
        )
        equal = result["dense"][str(result["steps"])]
        found[name] = {
            "equal steps": [float(d - s) for d, s in zip(equal, own, strict=True)],
            "equal time": [float(d - s) for d, s in zip(at_time, own, strict=True)] if at_time else [],
        }
    return found


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
    if "sparse" in result:
        lines += [
            "",
            "held-out bits per byte, and what the dense twin has more",
            "experts   sparse  equal steps       equal time",
        ]
        for name, of in gains(result).items():
            sides = (f"{np.mean(g):+.4f} ± {np.std(g, ddof=1):.4f}" if g else "– " for g in of.values())
            lines.append(f"{name:>7}   {np.mean(result['sparse'][name]):.4f}  " + "  ".join(sides))
    return "\n".join(lines)


def draw(result: dict[str, Any]) -> bytes:
    """PNG: loss against number of experts beside the dense twin's, and what sparsity gains at equal steps and at equal time."""
    if "sparse" not in result:
        raise UserError(
            f"the picture needs {LOSSES}: run configs/sweeps/experts.py with --workdir={LOSSES.parent} first"
        )
    from moejax.report import figures  # matplotlib is an extra

    with figures.panels(9.0, 3.6, (1.0, 1.0)) as (figure, (left, right)):
        _line(left, 0, result["sparse"], "sparse")
        for i, (steps, values) in enumerate(result["dense"].items()):
            left.axhline(np.mean(values), **figures.style_of(1), linewidth=1, alpha=1 - 0.2 * i)
            left.annotate(
                f"dense, {steps} steps", (1, np.mean(values)), xytext=(0, 2), textcoords="offset points", fontsize=7
            )
        left.set(ylabel="held-out bits per byte")
        for i, kind in enumerate(("equal steps", "equal time")):
            _line(right, i, {name: of[kind] for name, of in gains(result).items() if of[kind]}, kind)
        right.axhline(0, color=figures.INK, linewidth=0.8)
        right.set(ylabel="dense twin less sparse [bits per byte]")
        ticks = [int(name) for name in result["sparse"]]
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set(xlabel="experts, two of them a token")
            axes.grid(True)
            axes.legend()
        return figures.png(figure)


def _line(axes: Any, index: int, values: dict[str, list[float]], label: str) -> None:
    """Means joined, a point a seed, against the number of experts."""
    from moejax.report import figures

    style, where = figures.style_of(index), [int(name) for name in values]
    axes.plot(where, [np.mean(v) for v in values.values()], **style, linewidth=1.8, label=label)
    each = [(x, y) for x, ys in zip(where, values.values(), strict=True) for y in ys]
    axes.plot(*zip(*each, strict=True), color=style["color"], linestyle="none", marker="o", markersize=4, alpha=0.6)
