"""The coordinate check: do activations, and what ten steps change of them, keep their size where a model grows? With rules of transfer and
without.

A quantity is the root mean square over a fixed batch of rows, of every layer apart. Its change since step 0 is what rules are about: too
small and a part does not learn, too large and it diverges (Yang et al. 2022, section D.1).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax import config, sharding
from moejax import mesh as meshes
from moejax.arrays import Batch
from moejax.bench import timing
from moejax.data import batches, prepare
from moejax.data.pipeline import Stream
from moejax.layers import context as ctx
from moejax.layers import kinds
from moejax.layers.feed_forward import Side, Sparse, activated
from moejax.models import lookup
from moejax.models.decoder import Decoder, Layer
from moejax.moe.inputs import Mode
from moejax.train import check, state, step

STEPS, SEEDS, PROBE = 10, (0, 1, 2), 4
"""Steps, seeds, and rows that no step reads."""
LIMIT = 1.5
"""Largest over smallest on a ladder that passes for the same size."""
RULES = ("mup", "none")
DEFAULT = config.Config(
    model=config.Model(repeats=2, unroll=2, moe=config.MoE(gate_scale=2.0)),
    data=config.Data(context=64),
    train=config.Train(warmup=0),
)
"""The default experiment with two layers, at its peak learning rate from the first step."""

Sizes = dict[str, dict[str, float]]
"""By quantity: `start`, `size` and `change`."""
Found = dict[str, dict[str, list[list[float]]]]
"""The same [rung of a ladder, seed]."""


def wider(model: config.Model, times: int) -> config.Model:
    """All that follows the width: heads, hidden widths, that of an expert."""
    sizes = {name: times * getattr(model, name) for name in ("width", "heads", "kv_heads", "hidden")}
    return dataclasses.replace(expert_wider(model, times), **sizes)


def expert_wider(model: config.Model, times: int) -> config.Model:
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, hidden=times * model.moe.hidden))


def more_experts(model: config.Model, times: int) -> config.Model:
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, num_experts=times * model.moe.num_experts))


LADDERS: dict[str, tuple[Callable[[config.Model, int], config.Model], tuple[int, ...]]] = {
    "width": (wider, (1, 2, 4)),
    "experts": (more_experts, (1, 2, 4, 8)),
    "expert width": (expert_wider, (1, 2, 4)),
}
"""What grows, and how many times."""


def scaled(
    cfg: config.Config, grow: Callable[[config.Model, int], config.Model], times: int, rules: str
) -> config.Config:
    """The experiment grown, its own sizes being those that were tuned."""
    model = cfg.model
    tuned = config.Transfer(
        rules, width=model.width, heads=model.heads, hidden=model.hidden, expert_hidden=model.moe.hidden
    )
    found = dataclasses.replace(cfg, model=grow(model, times), transfer=tuned)
    check.check(found)
    return found


def layers(model: Decoder) -> Iterator[Layer]:
    """In order of depth."""
    yield from model.first
    for turn in range(model.model.repeats):
        for layer in model.blocks.layers:
            yield jax.tree.map(lambda w, turn=turn: w[turn], layer)


def activations(model: Decoder, begun: Decoder, batch: Batch, at: step.Setting) -> dict[str, Array]:
    """Of the whole model embedding, final hidden vectors and logits [B, T, ...]; of every layer what mixer and channel add, router logits,
    hidden vectors of all experts, and what the router has learned: logits by the change of its weights since `begun`."""
    options, where = model.model, ctx.of_rows(batch)
    views = {name: kinds.MIXERS[name].view(options, where, None) for name in kinds.mixers(options)}
    context = ctx.Context(views, ctx.tokens_of(batch, where), at.key, at.step)
    x = lookup.embedded(model.embedding, batch.tokens, jnp.dtype(options.compute_dtype))
    found, sparse = {"embedding": x}, 0
    for number, (layer, first) in enumerate(zip(layers(model), layers(begun), strict=True)):
        y, _ = layer.mixer(layer.mixer_norm(x), context.views[layer.kind], {})
        z = layer.channel_norm(x + y)
        of_layer = (
            jax.tree.map(lambda s, i=sparse: s[i], at.routing["sparse"]) if isinstance(layer.channel, Sparse) else {}
        )
        out, _ = layer.channel(z, context, jnp.int32(number), Mode(False, None), Side(of_layer, None))
        x = x + y + out
        seen = {"mixer": y, "channel": out}
        if isinstance(layer.channel, Sparse):
            seen |= _of_sparse(layer.channel, first.channel, z)
            sparse += 1
        found |= {f"{name} {number}": value for name, value in seen.items()}
    hidden = model.final_norm(x)
    return found | {"final hidden": hidden, "logits": model.logits(hidden)}


def _of_sparse(channel: Sparse, begun: Sparse, z: Array) -> dict[str, Array]:
    own, first = (sharding.whole(c.router["logits"]) for c in (channel, begun))
    gate, up = (jax.reshard(channel.experts[0][name][...], sharding.spec(None, None, None)) for name in ("gate", "up"))
    hidden = activated(jnp.einsum("btd,edf->btef", z, gate), jnp.einsum("btd,edf->btef", z, up))
    return {"router logits": z @ own, "router learned": z @ (own - first), "expert hidden": hidden}


def measured(cfg: config.Config, training: Sequence[Batch], probe: Batch, seeds: Sequence[int]) -> list[Sizes]:
    """Of every seed and quantity: its size at step 0 and after the last batch, and the size of its change."""
    mesh = meshes.make(config.Mesh(), jax.devices()[:1])
    found = []
    with jax.set_mesh(mesh):
        built = state.build(cfg, mesh)
        look = jax.jit(lambda now, begun: _looked(built, probe, now, begun))
        update = None
        for seed in seeds:
            train = dataclasses.replace(cfg.train, seed=seed)
            now = state.create(dataclasses.replace(built, config=dataclasses.replace(cfg, train=train)))
            update = update or step.make_train_step(built, now)
            begun = jax.tree.map(jnp.copy, now.parameters)
            before = look(now, begun)
            for batch in training:
                now, _, _ = update(now, batch)
            found.append(jax.tree.map(float, _sizes(before, look(now, begun))))
    return found


def _looked(built: state.Built, probe: Batch, now: state.TrainState, begun: Any) -> dict[str, Array]:
    return activations(built.model(now.parameters), built.model(begun), probe, step.still(now))


@jax.jit
def _sizes(before: dict[str, Array], after: dict[str, Array]) -> dict[str, dict[str, Array]]:
    def rms(x: Array) -> Array:
        return jnp.sqrt(jnp.mean(jnp.square(x)))

    return {n: {"start": rms(before[n]), "size": rms(x), "change": rms(x - before[n])} for n, x in after.items()}


def climbed(
    cfg: config.Config, name: str, rules: str, rungs: Sequence[int], measure: Callable[[config.Config], list[Sizes]]
) -> Found:
    """What was measured so many times up a ladder."""
    rows = [measure(scaled(cfg, LADDERS[name][0], times, rules)) for times in rungs]
    return {
        quantity: {kind: [[float(f"{seed[quantity][kind]:.4g}") for seed in row] for row in rows] for kind in kinds_of}
        for quantity, kinds_of in rows[0][0].items()
    }


def ratio(values: Sequence[Sequence[float]]) -> float:
    """Largest over smallest mean of the seeds along a ladder."""
    means = np.mean(values, axis=1)
    return float(means.max() / means.min())


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """Every ladder with the rules and without, on text of data.source."""
    mesh, rows = meshes.make(config.Mesh(), jax.devices()[:1]), cfg.data.batch
    stream = Stream(cfg.data, prepare.ensure(cfg.data)).iterate(0, slice(0, rows))
    hosts = list(itertools.islice(stream, STEPS + 1))
    training = [batches.put(host, mesh, rows) for host in hosts[:STEPS]]
    probe = batches.put({name: value[:PROBE] for name, value in hosts[STEPS].items()}, mesh, PROBE)
    measure = functools.cache(lambda grown: measured(grown, training, probe, SEEDS))  # ladders begin at the same foot
    found = {
        name: {"times": times, **{rules: climbed(cfg, name, rules, times, measure) for rules in RULES}}
        for name, (_, times) in LADDERS.items()
    }
    return {
        "command": "python scripts/bench.py coordinates --json",
        "steps": STEPS,
        "seeds": list(SEEDS),
        "learning_rate": cfg.train.learning_rate,
        "batch": [rows, cfg.data.context],
        "foot": {"width": cfg.model.width, "experts": cfg.model.moe.num_experts, "expert_hidden": cfg.model.moe.hidden},
        "machine": timing.machine(),
        "ladders": found,
    }


def table(result: dict[str, Any]) -> str:
    """Largest over smallest along every ladder."""
    head = "".join(f"{name + ', ' + rules:>19}" for name in result["ladders"] for rules in RULES)
    lines = [
        f"{result['steps']} steps at learning rate {result['learning_rate']}, mean of {len(result['seeds'])} seeds: largest over smallest",
        f"{'size / change':20}{head}",
    ]
    for quantity in next(iter(result["ladders"].values()))[RULES[0]]:
        cells = [of[rules][quantity] for of in result["ladders"].values() for rules in RULES]
        lines.append(f"{quantity:20}" + "".join(f"{_said(cell):>19}" for cell in cells))
    return "\n".join(lines)


def _said(cell: dict[str, list[list[float]]]) -> str:
    return f"{ratio(cell['size']):.2f} / {ratio(cell['change']):.2f}"


def draw(result: dict[str, Any]) -> bytes:
    """The picture of docs/transfer.md, as PNG: what ten steps changed along every ladder, beside what they changed at its foot."""
    from moejax.report import figures  # matplotlib is an extra, and the numbers do not need it

    shown = ("mixer", "channel", "expert hidden", "router logits", "final hidden", "logits")
    with figures.grid(13.0, 7.0, len(result["ladders"]), len(shown)) as (figure, axes):
        for row, (ladder, found) in zip(axes, result["ladders"].items(), strict=True):
            for panel, quantity in zip(row, shown, strict=True):
                panel.axhspan(1 / LIMIT, LIMIT, color=figures.INK, alpha=0.15, linewidth=0)
                for i, (rules, label) in enumerate(zip(RULES, ("rules on", "rules off"), strict=True)):
                    for j, values in enumerate(of_layers(found[rules], quantity)):
                        means = np.mean(values["change"], axis=1)
                        style = figures.style_of(i) | {"marker": "o", "markersize": 3}
                        panel.plot(found["times"], means / means[0], label=None if j else label, **style)
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                panel.set_ylim(0.4, 60)
                panel.xaxis.set_major_formatter(lambda value, _: f"×{value:g}")
                panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                panel.minorticks_off()
                panel.set_xticks(found["times"])
            row[0].set_ylabel(ladder)
        for panel, quantity in zip(axes[0], shown, strict=True):
            panel.set_title(quantity, loc="left")
        axes[0][0].legend(loc="upper left")
        return figures.png(figure)


def of_layers(found: Found, quantity: str) -> list[dict[str, list[list[float]]]]:
    """A quantity of the whole model, or of each of its layers."""
    return (
        [found[quantity]]
        if quantity in found
        else [of for name, of in found.items() if name.rsplit(" ", 1)[0] == quantity]
    )
