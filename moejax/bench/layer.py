"""The sparse layer against its dense twin of equal active FLOPs, and against its own matmuls alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import config, sharding
from moejax import mesh as meshes
from moejax.bench import timing
from moejax.kernels.activations import activated
from moejax.layers import context as ctx
from moejax.layers.feed_forward import Dense, Side, Sparse
from moejax.moe.inputs import Mode, Tokens

NO_SIDE = Side({}, None)
SKEWS: dict[str, Callable[[int], np.ndarray]] = {
    "balanced": lambda experts: np.zeros(experts),
    "zipf": lambda experts: -1.2 * np.log(np.arange(1, experts + 1)),
    "adversarial": lambda experts: np.where(np.arange(experts) < 2, 50.0, 0.0),
}
"""What is added to the router's logits: nothing, Zipf's law of exponent 1.2, or two experts that take all."""


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """Median, 10th and 90th percentile in ms, forward and forward + backward, for each skew; ratios of medians."""
    mesh = meshes.make(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        rows = [_case(cfg, mesh, name, rounds) for name in SKEWS]
    model = cfg.model
    shape = {
        "tokens": cfg.data.batch * cfg.data.context,
        "width": model.width,
        "experts": model.moe.num_experts,
        "top_k": model.moe.top_k,
        "expert_hidden": model.moe.hidden,
        "dense_hidden": model.moe.top_k * model.moe.hidden,
        "dtype": model.compute_dtype,
        "transport": model.moe.transport,
        "kernel": model.moe.kernel,
    }
    return {"shape": shape, "rounds": rounds, "machine": timing.machine(), "rows": rows}


def _case(cfg: config.Config, mesh: jax.sharding.Mesh, skew: str, rounds: int) -> dict[str, Any]:
    """One skew: all six functions timed in turn."""
    model = dataclasses.replace(cfg.model, hidden=cfg.model.moe.top_k * cfg.model.moe.hidden)
    sparse, dense = Sparse(model, rngs=nnx.Rngs(0)), Dense(model, rngs=nnx.Rngs(1))
    lean(sparse, skew)
    x = inputs(cfg)
    context, mode = context_of(cfg), Mode(training=True, capacity_factor=model.moe.capacity_factor)

    def layer(module: nnx.Module, x: jax.Array) -> jax.Array:
        return module(x, context, jnp.int32(0), mode, NO_SIDE)[0]

    calls = {
        "sparse": _pair(layer, sparse, x),
        "dense": _pair(layer, dense, x),
        "matmuls": _pair(_matmuls, *_even_rows(cfg, model)),
    }
    flat = {f"{name} {kind}": call for name, pair in calls.items() for kind, call in pair.items()}
    times = timing.interleaved(flat, rounds)
    load = np.asarray(sparse(x, context, jnp.int32(0), mode, NO_SIDE)[1]["sums"]["load"]).sum(0)
    result: dict[str, Any] = {"skew": skew, "max_load_over_mean": float(load.max() / load.mean())}
    for kind in ("forward", "both"):
        ms = {name: times[f"{name} {kind}"] for name in calls}
        result[kind] = {
            **{name: {q: round(1e3 * v, 3) for q, v in dataclasses.asdict(t).items()} for name, t in ms.items()},
            "sparse_over_dense": round(ms["sparse"].median / ms["dense"].median, 3),
            "outside_matmuls": round(1 - ms["matmuls"].median / ms["sparse"].median, 3),
        }
    return result


def lean(sparse: Sparse, skew: str) -> None:
    """Gives the router a skew: the weight of feature 0, which `inputs` holds at 1, so that the layer is run as it is."""
    constant = (jnp.arange(sparse.router["logits"].shape[0]) == 0)[:, None]
    carried = jnp.asarray(SKEWS[skew](sparse.moe.num_experts), jnp.float32)[None, :]
    weight = sparse.router["logits"]
    weight[...] = jnp.where(constant, carried, weight[...])


def inputs(cfg: config.Config, seed: int = 2) -> jax.Array:
    """Normal vectors [B, T, D] in the compute type, with a constant feature."""
    x = jax.random.normal(jax.random.key(seed), (cfg.data.batch, cfg.data.context, cfg.model.width))
    return vectors(x.at[..., 0].set(1.0).astype(cfg.model.compute_dtype))


def vectors(x: jax.Array) -> jax.Array:
    """Activations [B, T, D] as a layer of the step is given them."""
    return jax.reshard(x, sharding.spec("batch", "position", None))


def placed(tree: Any) -> Any:
    """What is known of tokens, with a leading batch dimension, as a layer of the step is given it."""
    return jax.tree.map(lambda x: jax.reshard(x, sharding.spec("batch", *(None,) * (x.ndim - 1))), tree)


def _pair(function: Callable, parameters: Any, x: jax.Array) -> dict[str, Callable[[], Any]]:
    """The function, and it with the gradients of parameters and input."""
    forward = jax.jit(function)
    both = jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(function(p, x).astype(jnp.float32)), argnums=(0, 1)))
    return {"forward": lambda: forward(parameters, x), "both": lambda: both(parameters, x)}


def _matmuls(weights: tuple[jax.Array, ...], rows: jax.Array) -> jax.Array:
    """The experts' useful FLOPs and nothing else, as one batched matmul of even groups."""
    gate, up, down = weights
    h = (jnp.einsum("erd,edf->erf", rows, w) for w in (gate, up))
    return jnp.einsum("erf,efd->erd", activated(*h), down)


def _even_rows(cfg: config.Config, model: config.Model) -> tuple[tuple[jax.Array, ...], jax.Array]:
    e, d, f = model.moe.num_experts, model.width, model.moe.hidden
    rows = cfg.data.batch * cfg.data.context * model.moe.top_k // e
    shapes = (e, d, f), (e, d, f), (e, f, d), (e, rows, d)
    keys = jax.random.split(jax.random.key(3), len(shapes))
    *weights, x = (jax.random.normal(k, s).astype(model.compute_dtype) for k, s in zip(keys, shapes, strict=True))
    return tuple(weights), x


def context_of(cfg: config.Config) -> ctx.Context:
    """What a layer may look at, all tokens valid."""
    shape = cfg.data.batch, cfg.data.context
    ids, rows = jnp.zeros(shape, jnp.int32), jnp.arange(shape[0], dtype=jnp.int32)
    tokens = placed(Tokens(jnp.ones(shape, bool), ids, rows, ids))
    return ctx.Context({}, tokens, jax.random.key(0), jnp.int32(0))


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    lines = [", ".join(f"{k} {v}" for k, v in result[part].items()) for part in ("shape", "machine")]
    lines.append(f"{result['rounds']} rounds in turn; ms, median (10 to 90 %)")
    columns = (f"{name:>20}" for name in ("sparse", "dense twin", "matmuls alone"))
    lines.append(f"{'routing':12} {'load':>6} {'':9} {' '.join(columns)}  sparse/dense  outside matmuls")
    for row in result["rows"]:
        for kind, label in (("forward", "forward"), ("both", "fwd+bwd")):
            r = row[kind]
            cells = (
                f"{r[n]['median']:.2f} ({r[n]['low']:.2f}-{r[n]['high']:.2f})" for n in ("sparse", "dense", "matmuls")
            )
            lines.append(
                f"{row['skew']:12} {row['max_load_over_mean']:5.1f}x {label:9} "
                + " ".join(f"{c:>20}" for c in cells)
                + f"  {r['sparse_over_dense']:11.2f}x  {100 * r['outside_matmuls']:12.0f} %"
            )
    return "\n".join(lines)
