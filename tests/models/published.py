"""Published checkpoints in the decoder, for tests: loaded, run, and asked for routing and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import config, sharding
from moejax import mesh as meshes
from moejax.arrays import Batch
from moejax.checkpoint.hugging_face.published import load
from moejax.checkpoint.manager import flatten, unflatten
from moejax.models.decoder import Decoder, empty_cache
from moejax.moe.inputs import Mode
from moejax.train import losses, routing, state


def one_device():
    return meshes.make(config.Mesh(), jax.devices()[:1])


def configured(model, **mesh):
    """A config of this model, on any data."""
    base = config.Config()
    data = dataclasses.replace(base.data, context=40, batch=8)
    return dataclasses.replace(base, model=model, data=data, mesh=dataclasses.replace(base.mesh, **mesh))


@functools.cache
def leaves(model):
    """Path of the train state -> shape and type, of parameters and of what is published beside them."""
    with jax.set_mesh(one_device()):
        parameters = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(Decoder(model, rngs=nnx.Rngs(0)))))
        kept = jax.eval_shape(lambda: routing.init(model))
    kept = {kind: {n: x for n, x in s.items() if n == "selection_bias"} for kind, s in kept.items()}
    return flatten({"parameters": parameters, "routing": kept})


class Loaded:
    """A model with its weights, by path of the train state, on a mesh; `cut` is the config's section of it."""

    def __init__(self, model, flat, mesh=None, cut=None):
        self.mesh, self.model, self.flat = mesh or one_device(), model, flat
        self.place(flat, cut or {})

    @classmethod
    def read(cls, folder, **options):
        """A published folder."""
        return cls(*load(folder, leaves), **options)

    def place(self, flat, cut):
        """The arrays in the shards of the mesh."""
        self.config = configured(self.model, **cut)
        with jax.set_mesh(self.mesh):
            self.built = state.build(self.config, self.mesh)
            kept = routing.init(self.model)
        own = {"parameters": self.built.shardings}
        found = unflatten({n: x for n, x in flat.items() if n.startswith("parameters")}, own)
        self.parameters = jax.tree.map(jax.device_put, found["parameters"], self.built.shardings)
        bias = flat.get("routing/sparse/selection_bias")
        if bias is not None:
            kept["sparse"]["selection_bias"] = jnp.asarray(bias)
        self.routing = jax.device_put(kept, sharding.replicated(self.mesh))

    def batch(self, tokens, mask):
        """Rows of one document each, padding after it."""
        put = lambda a: jax.device_put(a, sharding.batch_sharding(self.mesh, a.ndim))  # noqa: E731
        targets = np.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
        segments, ids = mask.astype(np.int32), np.arange(len(tokens), dtype=np.int32)
        return Batch(put(tokens), put(targets), put(segments), put(mask), put(np.zeros_like(tokens)), put(ids))

    def run(self, tokens, mask):
        """Logits of the valid positions, and every sparse layer's experts and gates, [layers, tokens, K]."""
        mode = Mode(training=False, capacity_factor=None, record=True)

        def forward(parameters, batch):
            model = self.built.model(parameters)
            hidden, outcomes, _ = model(batch, jax.random.key(0), mode, self.routing, jnp.int32(0))
            return model.logits(hidden), outcomes["sparse"]["recorded"]

        with jax.set_mesh(self.mesh):
            logits, recorded = jax.jit(forward)(self.parameters, self.batch(tokens, mask))
        k = self.model.moe.top_k
        expert = np.asarray(recorded.expert).reshape(-1, *tokens.shape, k)
        return np.asarray(logits)[mask], expert[:, mask]

    def decode(self, tokens, pieces):
        """Logits of whole rows, from pieces of these sizes one after another."""
        mode = Mode(training=False, capacity_factor=None)

        def forward(parameters, batch, cache):
            model = self.built.model(parameters)
            hidden, cache = model.decode(batch, jax.random.key(0), mode, self.routing, jnp.int32(0), cache)
            return model.logits(hidden), cache

        step, found, done = jax.jit(forward, donate_argnums=2), [], 0
        with jax.set_mesh(self.mesh):
            cache = empty_cache(self.model, *tokens.shape)
            for size in pieces:
                part = tokens[:, done : done + size]
                logits, cache = step(self.parameters, self.batch(part, np.ones(part.shape, bool)), cache)
                found.append(np.asarray(logits))
                done += size
        return np.concatenate(found, axis=1)

    def gradients(self, tokens, mask):
        """Of the mean next-token cross-entropy, with the loss, by path."""
        mode = Mode(training=False, capacity_factor=None)
        scored = mask & np.concatenate([mask[:, 1:], np.zeros_like(mask[:, :1])], axis=1)
        batch = self.batch(tokens, mask)
        counted = jax.device_put(scored, sharding.batch_sharding(self.mesh))

        def loss(parameters, batch, counted):
            model = self.built.model(parameters)
            hidden, *_ = model(batch, jax.random.key(0), mode, self.routing, jnp.int32(0))
            nats = losses.vocabulary_nats(hidden, model.unembedding[...], batch.targets, self.model.loss_chunk)
            return jnp.sum(jnp.where(counted, nats, 0)) / scored.sum()

        with jax.set_mesh(self.mesh):
            value, found = jax.jit(jax.value_and_grad(loss))(self.parameters, batch, counted)
        return float(value), {f"parameters/{path}": np.asarray(g) for path, g in flatten(found).items()}
