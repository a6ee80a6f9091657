"""Two tiny Decoders and a surgery between them: states filled with numbers, and logits at step 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from train import small

from moejax import mesh, sharding
from moejax.checkpoint.manager import flatten, unflatten
from moejax.checkpoint.surgery import ADAM
from moejax.models.decoder import Decoder
from moejax.moe import noise
from moejax.moe.inputs import Mode
from moejax.moe.routers import ROUTERS
from moejax.train import guard, routing, state

WIDTH, F = 16, 24
DENSE = {"model.pattern": ("attention+dense",), "model.repeats": 2, "model.hidden": F, "model.unroll": 1}
SPARSE = DENSE | {"model.pattern": ("attention+sparse",)}


def sparse(**moe):
    """A sparse twin of the dense model, with options of model.moe."""
    return small.configure(**(SPARSE | {f"model.moe.{name}": value for name, value in moe.items()}))


def dense():
    return small.configure(**DENSE)


@functools.cache
def start(cfg):
    """(built, state of step 0 on the host). Drawn by NumPy, so that nothing is compiled: matrices normal, scales 1, biases 0."""
    on = mesh.make(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(on):
        built = state.build(cfg, on)
        shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(Decoder(cfg.model, rngs=nnx.Rngs(0)))))
        moments = jax.eval_shape(built.transform.init, shapes)
    rng = np.random.default_rng(1)
    values = {path: _drawn(path, x.shape, rng) for path, x in flatten(shapes).items()}
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), moments)
    kept = jax.tree.map(np.asarray, routing.init(cfg.model))
    return built, state.TrainState(
        np.zeros((), np.int32), unflatten(values, shapes), zeros, kept, jax.tree.map(np.asarray, guard.init())
    )


def _drawn(path, shape, rng):
    if "norm" in path or path.endswith("_bias"):
        return np.full(shape, "norm" in path, np.float32)
    return (rng.normal(size=shape) / np.sqrt(shape[-1 if "embedding" in path else 1])).astype(np.float32)


def host(state):
    """A state as a flat dict on the host."""
    return {path: np.asarray(leaf) for path, leaf in flatten(state).items()}


def flat(cfg):
    """The state of step 0."""
    return host(start(cfg)[1])


def trained(cfg, seed=7):
    """The same with other numbers in every array: positive second moments, counters above 0, small biases."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        if x.dtype != np.float32:
            return np.full_like(x, 50)
        if path.startswith("routing/"):
            return x + rng.uniform(-0.05, 0.05, x.shape).astype(np.float32)
        spread = np.std(x) or 1.0
        return (x + 0.1 * spread * (np.abs if "/nu/" in path else np.asarray)(rng.normal(size=x.shape))).astype(
            np.float32
        )

    return {path: draw(path, x) for path, x in flat(cfg).items()}


@functools.cache
def _forward(cfg):
    built, _ = start(cfg)
    factor = cfg.model.moe.capacity_factor if ROUTERS[cfg.model.moe.router].bounded else None

    def logits(parameters, kept, batch):
        model = built.model(parameters)
        hidden, *_ = model(batch, noise.step_key(0, jnp.int32(0)), Mode(False, factor), kept, jnp.int32(0))
        return hidden @ model.unembedding[...]

    with jax.set_mesh(built.mesh):
        return small.quick_jit(logits)


def put(cfg, values):
    """A flat state as a TrainState on the mesh, moments where their parameters are."""
    built, begun = start(cfg)
    where = flatten(built.shardings)
    whole = sharding.replicated(built.mesh)

    def placed(path, x):
        parameter = path.removeprefix("parameters/").removeprefix(f"{ADAM}/mu/").removeprefix(f"{ADAM}/nu/")
        return jax.device_put(x, where.get(parameter, whole))

    return unflatten({path: placed(path, x) for path, x in values.items()}, begun)


def logits(cfg, values):
    """f32[B, T, V] of a flat state, at evaluation and without drops."""
    built, now = start(cfg)[0], put(cfg, values)
    with jax.set_mesh(built.mesh):
        rows = small.arrays(0)
        rows["valid"] = np.ones_like(rows["valid"])  # experts do nothing for what is not valid, a dense layer does
        batch = small.place(rows, built.mesh)
        return np.asarray(_forward(cfg)(now.parameters, now.routing, batch))


def moved(source, target, surgery):
    """(relative difference of the logits, the source's state, the new state)."""
    before = trained(source)
    after = surgery(before, flat(target))
    old, new = logits(source, before), logits(target, after)
    return float(np.abs(new - old).max() / np.abs(old).max()), before, after
