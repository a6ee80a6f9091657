"""The whole sparse block, router to combined output, against other ways to compute the same thing, in turn within one run.

    dense        the dense twin of equal active FLOPs
    ragged_dot   this library with lax.ragged_dot as its grouped matmul
    hf           Hugging Face's Qwen3-MoE block with each of its backends for experts (bench/peer_hf.py)

The last two have processes of their own, which wait while another is timed. All of them get the same weights, in the compute type, and
inputs; before anything is timed, their outputs are compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import config
from moejax import mesh as meshes
from moejax.bench import timing
from moejax.bench.layer import NO_SIDE, SKEWS, context_of, inputs, lean
from moejax.bench.peer import Peer
from moejax.errors import UserError
from moejax.layers.feed_forward import Dense, Sparse
from moejax.moe.inputs import Mode

PEERS = {
    "ragged_dot": ("peer_ragged_dot.py", "it runs this library with another kernel"),
    "hf": ("peer_hf.py", "--torch must name an interpreter that has torch and transformers; install them apart"),
}
"""What runs in a process of its own: its blocks, and what is to be done where it fails."""
AGAINST = ("dense", *PEERS)
DEFAULT = config.Config(
    data=config.Data(batch=4, context=1024),
    model=config.Model(width=512, moe=config.MoE(num_experts=32, top_k=4, hidden=256)),
)
"""4,096 tokens of width 512, 32 experts of width 256, 4 a token."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference between two outputs, as a share of the largest entry, that is still the same function."""
MODE = Mode(training=True, capacity_factor=None)


def run(
    cfg: config.Config, rounds: int, against: tuple[str, ...] = AGAINST[:2], torch: str | None = None
) -> dict[str, Any]:
    """Median, 10th and 90th percentile in ms, forward and forward + backward, for each skew; ratios of medians to this library."""
    if "hf" in against and torch is None:
        raise UserError(
            "--against=hf needs --torch=PYTHON, an interpreter that has torch and transformers; install them apart"
        )
    mesh = meshes.make(config.Mesh(), jax.devices()[:1])
    versions: dict[str, Any] = {}
    with jax.set_mesh(mesh):
        rows = [_case(cfg, skew, rounds, against, torch, versions) for skew in SKEWS]
    moe = cfg.model.moe
    shape = {
        "tokens": cfg.data.batch * cfg.data.context,
        "width": cfg.model.width,
        "experts": moe.num_experts,
        "top_k": moe.top_k,
        "expert_hidden": moe.hidden,
        "dtype": cfg.model.compute_dtype,
        "kernel": moe.kernel,
    }
    return {"shape": shape, "rounds": rounds, "machine": timing.machine(), "peers": versions, "rows": rows}


def _case(
    cfg: config.Config, skew: str, rounds: int, against: tuple[str, ...], torch: str | None, versions: dict[str, Any]
) -> dict[str, Any]:
    """One skew: everything timed in turn. Into `versions` goes what each peer says of itself."""
    sparse = drawn(cfg.model, skew)
    calls = _named("moejax", functions(sparse, cfg))
    if "dense" in against:
        twin = dataclasses.replace(cfg.model, hidden=cfg.model.moe.top_k * cfg.model.moe.hidden)
        calls |= _named("dense", functions(Dense(twin, rngs=nnx.Rngs(1)), cfg))
    y, load = np.float32(calls["moejax forward"]()), _loads(sparse, cfg)
    arrays = arguments(sparse, inputs(cfg), inputs(cfg, seed=3))
    settings = {"config": config.to_dict(cfg), "skew": skew, "dtype": cfg.model.compute_dtype}
    clocks: dict[str, Callable[[], float]] = {}
    with contextlib.ExitStack() as stack:
        for name in (name for name in PEERS if name in against):
            python = torch if name == "hf" else sys.executable
            peer = stack.enter_context(Peer(python, *PEERS[name], arrays, settings))
            for block in peer.names:
                _same(block, peer.output(block), y, cfg)
            clocks |= peer.clocks()
            versions[name] = peer.versions
        own = timing.samples(calls, rounds, clocks)
    result: dict[str, Any] = {"skew": skew, "max_load_over_mean": round(float(load.max() / load.mean()), 3)}
    return result | {kind: _summary(own, kind) for kind in ("forward", "both")}


def drawn(model: config.Model, skew: str) -> Sparse:
    """The sparse layer, seed 0, with a skewed router."""
    sparse = Sparse(model, rngs=nnx.Rngs(0))
    lean(sparse, skew)
    return sparse


def functions(block: nnx.Module, cfg: config.Config) -> dict[str, Callable[[], Any]]:
    """The block's output, and its gradients of parameters and input, on the bench's inputs and cotangents."""
    x, dy, context = inputs(cfg), inputs(cfg, seed=3), context_of(cfg)
    block = _held(block, cfg.model.compute_dtype)

    def forward(block: nnx.Module, x: jax.Array) -> jax.Array:
        return block(x, context, jnp.int32(0), MODE, NO_SIDE)[0]

    def value(block: nnx.Module, x: jax.Array) -> jax.Array:
        return jnp.sum(forward(block, x).astype(jnp.float32) * dy.astype(jnp.float32))

    one, both = jax.jit(forward), jax.jit(jax.grad(value, argnums=(0, 1)))
    return {"forward": lambda: one(block, x), "both": lambda: both(block, x)}


def _held(block: nnx.Module, dtype: str) -> nnx.Module:
    """The block with its matrices in the type they are multiplied in, as a peer holds its own; a router stays as it is."""

    def of(path: tuple, w: jax.Array) -> jax.Array:
        return w if "router" in jax.tree_util.keystr(path) else w.astype(dtype)

    return jax.tree_util.tree_map_with_path(of, block)


def _named(who: str, calls: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    return {f"{who} {kind}": call for kind, call in calls.items()}


def _loads(sparse: Sparse, cfg: config.Config) -> np.ndarray:
    """Assignments of each expert, [E]."""
    return np.asarray(sparse(inputs(cfg), context_of(cfg), jnp.int32(0), MODE, NO_SIDE)[1]["sums"]["load"]).sum(0)


def arguments(sparse: Sparse, x: jax.Array, dy: jax.Array) -> dict[str, np.ndarray]:
    """What a peer is handed: fp32, in this library's layouts."""
    own = {name: np.asarray(w[...]) for name, w in sparse.experts[0].items()}
    return {
        "x": np.float32(x),
        "dy": np.float32(dy),
        "router": np.asarray(sparse.router["logits"][...]),
        "top_k": np.int32(sparse.moe.top_k),
        **own,
    }


def _same(name: str, actual: np.ndarray, wanted: np.ndarray, cfg: config.Config) -> None:
    """Most tokens alike: in bfloat16 some are routed elsewhere, because a peer's logits are rounded."""
    apart = np.abs(actual - wanted).max(axis=-1) / np.abs(wanted).max()
    share = float((apart > TOLERANCE[cfg.model.compute_dtype]).mean())
    allowed = 0.0 if cfg.model.compute_dtype == "float32" else 0.1
    if share > allowed:
        raise UserError(f"{name} computes something else: {100 * share:.1f} % of tokens differ from this library's")


def _summary(seconds: dict[str, list[float]], kind: str) -> dict[str, Any]:
    """ms of everything timed under this kind, and medians over this library's."""
    mine = {
        name.removesuffix(f" {kind}"): np.asarray(s) * 1e3 for name, s in seconds.items() if name.endswith(f" {kind}")
    }
    times = {
        name: {q: round(float(np.percentile(s, p)), 3) for q, p in (("median", 50), ("low", 10), ("high", 90))}
        for name, s in mine.items()
    }
    over = {name: round(float(np.median(s / mine["moejax"])), 3) for name, s in mine.items() if name != "moejax"}
    return {"ms": times, "over_moejax": over}


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    parts = [result["shape"], result["machine"], *result["peers"].values()]
    lines = [", ".join(f"{k} {v}" for k, v in part.items()) for part in parts]
    lines.append(f"{result['rounds']} rounds in turn; ms, median (10 to 90 %), and how many times this library's")
    for row in result["rows"]:
        for kind, label in (("forward", "forward"), ("both", "forward and backward")):
            lines.append(f"{row['skew']}, max load {row['max_load_over_mean']} times the mean, {label}")
            for name, t in row[kind]["ms"].items():
                ratio = row[kind]["over_moejax"].get(name)
                cells = f"{t['median']:9.2f} ({t['low']:.2f} to {t['high']:.2f})"
                lines.append(f"    {name:16} {cells:32} {'' if ratio is None else f'{ratio:.2f}x'}")
    return "\n".join(lines)
