"""Why experts compete: Jacobs, Jordan, Nowlan and Hinton 1991 on a task of four subtasks, in a quarter of a minute on a CPU.

Example: python examples/jacobs_1991.py --seeds=0,1,2 --out=jacobs.png

A case lies near one of four places in a plane, which tells, not always surely, which of four linear maps leads from its other
inputs to its outputs. Four linear experts and a linear gate see all inputs. Trained on the error of their blend, experts make
up for each other's errors, and few subtasks have an expert that is right alone; trained on the competitive likelihood, each
subtask has one. Over ten seeds: 11 of 40 subtasks solved by one expert, against 38; the blends are about equally good.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Array, Float, Int

from moejax import cli
from moejax.errors import UserError
from moejax.moe import jacobs

SEEDS = flags.DEFINE_list("seeds", [str(seed) for seed in range(10)], "seeds, each with a task and a start of its own")
STEPS = flags.DEFINE_integer("steps", 4000, "steps of Adam on all cases", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "file of the picture (.png); none is drawn without")
JSON = flags.DEFINE_bool("json", False, "print the numbers as JSON and nothing else")

SUBTASKS = 4
ALONE = 1.5
"""Error, in variances of the noise, below which an expert has solved a subtask."""
LOSSES = {"averaged error": jacobs.averaged_error, "competitive likelihood": jacobs.competitive_nats}
Loss = Callable[[Array, Array, Array], Array]


class Cases(NamedTuple):
    """The inputs of a case are its place in the plane, four more numbers, and 1."""

    inputs: Float[Array, "N D"]
    target: Float[Array, "N O"]
    """With noise of variance 1."""
    subtask: Int[np.ndarray, " N"]


class Outcome(NamedTuple):
    """Errors are means per output in variances of the noise: 1 is perfect."""

    blend: float
    """Error of the outputs averaged by the gate."""
    alone: list[float]
    """Of each subtask, the error of the one expert that is best on it."""
    solved: int
    """Subtasks that an expert solves alone."""


class Mixture(NamedTuple):
    """What a gate and its experts give."""

    gate_logits: Float[Array, "N E"]
    outputs: Float[Array, "N E O"]


def cases(seed: int, count: int = 1024, others: int = 4, outputs: int = 2) -> Cases:
    rng = np.random.default_rng(seed)
    subtask = rng.integers(0, SUBTASKS, count)
    angle = 2 * np.pi * subtask / SUBTASKS
    place = np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.5 * rng.normal(size=(count, 2))
    rest = rng.normal(size=(count, others))
    maps = 3 * rng.normal(size=(SUBTASKS, outputs, others))
    target = np.einsum("noi,ni->no", maps[subtask], rest) + rng.normal(size=(count, outputs))
    inputs = np.concatenate([place, rest, np.ones((count, 1))], axis=1)
    return Cases(jnp.asarray(inputs, jnp.float32), jnp.asarray(target, jnp.float32), subtask)


def mixture(parameters: dict[str, Array], inputs: Float[Array, "N D"]) -> Mixture:
    return Mixture(inputs @ parameters["gate"], jnp.einsum("nd,edo->neo", inputs, parameters["experts"]))


def train(loss: Loss, task: Cases, seed: int, steps: int) -> Mixture:
    """Four experts from small random weights; what they give after so many steps."""
    D, O = task.inputs.shape[1], task.target.shape[1]
    keys = jax.random.split(jax.random.key(seed))
    start = {
        "experts": 0.1 * jax.random.normal(keys[0], (SUBTASKS, D, O)),
        "gate": 0.1 * jax.random.normal(keys[1], (D, SUBTASKS)),
    }
    adam = optax.adam(0.02)
    slope = jax.grad(lambda p: loss(*mixture(p, task.inputs), task.target).mean())

    def step(carry, _):
        parameters, moments = carry
        updates, moments = adam.update(slope(parameters), moments)
        return (optax.apply_updates(parameters, updates), moments), None

    (parameters, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))((start, adam.init(start)))
    return mixture(parameters, task.inputs)


def outcome(found: Mixture, task: Cases) -> Outcome:
    gates = np.asarray(jax.nn.softmax(found.gate_logits), np.float64)
    outputs, target = np.asarray(found.outputs, np.float64), np.asarray(task.target, np.float64)
    blend = np.mean((target - np.einsum("ne,neo->no", gates, outputs)) ** 2)
    error = np.mean((target[:, None] - outputs) ** 2, axis=2)
    alone = [float(error[task.subtask == s].mean(axis=0).min()) for s in range(SUBTASKS)]
    return Outcome(float(blend), alone, sum(e < ALONE for e in alone))


def draw(task: Cases, first: dict[str, Mixture], found: dict[str, list[Outcome]], out: str) -> None:
    """Who is in charge where, for the first seed, and how good the best expert of each subtask is alone, for all."""
    from moejax.report import figures  # matplotlib is an extra, and the numbers do not need it

    inks = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in figures.COLOURS[:SUBTASKS]]) / 255
    with figures.panels(10.0, 3.4, [1.0, 1.0, 0.8]) as (figure, axes):
        for panel, (name, mixed) in zip(axes, first.items(), strict=False):
            gates = np.asarray(jax.nn.softmax(mixed.gate_logits))
            panel.scatter(*np.asarray(task.inputs[:, :2]).T, c=gates @ inks, s=6)
            panel.set(title=name, xlabel="place in the plane", aspect="equal")
        for i, results in enumerate(found.values()):
            for place, r in zip(np.linspace(-0.3, 0.3, len(results)), results, strict=True):
                axes[-1].scatter([i + place] * SUBTASKS, r.alone, s=14, color=figures.INK)
        axes[-1].axhline(ALONE, linewidth=0.8, linestyle=":", color=figures.INK)
        axes[-1].set(yscale="log", ylabel="error of its best expert alone", title="every subtask of every seed")
        axes[-1].set_xticks(range(len(found)), [name.split()[0] for name in found])
        axes[-1].set_xlim(-0.5, len(found) - 0.5)
        axes[-1].set_yticks([1, 10, 100], ["1", "10", "100"])
        axes[-1].minorticks_off()
        try:
            Path(out).expanduser().write_bytes(figures.png(figure))
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error.strerror}; choose another file") from error


def main() -> None:
    if not all(seed.isdigit() for seed in SEEDS.value):
        raise UserError(f"--seeds={','.join(SEEDS.value)}: whole numbers with commas between; for example --seeds=0,1")
    seeds = [int(seed) for seed in SEEDS.value]
    tasks = {seed: cases(seed) for seed in seeds}
    mixtures = {name: [train(f, tasks[s], s, STEPS.value) for s in seeds] for name, f in LOSSES.items()}
    found = {name: [outcome(m, tasks[s]) for s, m in zip(seeds, of, strict=True)] for name, of in mixtures.items()}
    if JSON.value:
        print(json.dumps({name: [r._asdict() for r in of] for name, of in found.items()}))
    else:
        print(f"{'trained on':24}{'seed':>6}{'blend':>9}{'solved':>8}   best expert alone, by subtask")
        for name, of in found.items():
            for seed, r in zip(seeds, of, strict=True):
                shown = " ".join(f"{error:8.2f}" for error in r.alone)
                print(f"{name:24}{seed:6}{r.blend:9.2f}{r.solved:6}/{SUBTASKS}   {shown}")
    if OUT.value is not None:
        draw(tasks[seeds[0]], {name: of[0] for name, of in mixtures.items()}, found, OUT.value)


if __name__ == "__main__":
    cli.run(main)
