"""What these tests ask of moejax, in one place: published files in and out, and what a decoder with such weights computes."""

import jax
import jax.numpy as jnp
import numpy as np
from train import small

from moejax import config, mesh
from moejax.checkpoint.manager import flatten, unflatten
from moejax.moe import noise
from moejax.moe.inputs import Mode
from moejax.train import losses, routing, state


def load(folder):
    """(config.Model, {path in the train state: float32 array}) of a folder in a family's published form."""
    from moejax.checkpoint import hugging_face

    return hugging_face.load(folder)


def save(folder, model, flat, family):
    """The inverse of `load`, as a model of that family in bfloat16."""
    from moejax.checkpoint import hugging_face

    hugging_face.save(folder, model, flat, family=family)


def answers(model, flat, tokens, lengths):
    """{"logits": [N, V] of the N valid positions, row by row; "experts": [sparse layers, N, K], each token's in rising order}."""
    built, parameters, kept = _begin(model, flat, tokens.shape)
    host = _rows(tokens, lengths)

    def run(parameters, kept, batch):
        decoder = built.model(parameters)
        mode = Mode(training=False, capacity_factor=None, record=True)
        hidden, outcomes = decoder(batch, noise.step_key(0, jnp.int32(0)), mode, kept, jnp.int32(0))
        return jnp.einsum("btd,dv->btv", hidden, decoder.unembedding[...]), outcomes["sparse"]["recorded"].expert

    with jax.set_mesh(built.mesh):
        logits, experts = small.on_host(small.quick_jit(run)(parameters, kept, small.place(host, built.mesh)))
    valid = host["valid"]
    experts = experts.reshape(len(experts), *tokens.shape, model.moe.top_k)[:, valid]
    return {"logits": logits[valid], "experts": np.sort(experts, axis=-1)}


def gradients(model, flat, tokens, lengths):
    """(mean cross-entropy of the valid next tokens, {path in the train state: its gradient})."""
    built, parameters, kept = _begin(model, flat, tokens.shape)
    host = _rows(tokens, lengths)
    counts = np.pad(host["valid"][:, 1:], ((0, 0), (0, 1)))

    def loss(parameters, kept, batch):
        decoder = built.model(parameters)
        mode = Mode(training=False, capacity_factor=None)
        hidden, _ = decoder(batch, noise.step_key(0, jnp.int32(0)), mode, kept, jnp.int32(0))
        nats = losses.vocabulary_nats(hidden, decoder.unembedding[...], batch.targets, model.loss_chunk)
        return jnp.sum(jnp.where(counts, nats, 0)) / counts.sum()

    with jax.set_mesh(built.mesh):
        differentiate = small.quick_jit(jax.value_and_grad(loss))
        value, found = small.on_host(differentiate(parameters, kept, small.place(host, built.mesh)))
    return value, flatten({"parameters": found})


def _begin(model, flat, shape):
    """(built, parameters, routing state) on one device, made of all the arrays of `flat`."""
    rows, context = shape
    cfg = config.Config(model=model, data=config.Data(batch=rows, context=context))
    on = mesh.make(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(on):
        built = state.build(cfg, on)
        template = {"parameters": built.shardings, "routing": routing.init(model)}
        own = {name: x for name, x in flatten(template).items() if name.startswith("routing/")}
        assert not flat.keys() - flatten(template).keys()
        tree = unflatten(own | flat, template)
        return built, jax.tree.map(jax.device_put, tree["parameters"], built.shardings), tree["routing"]


def _rows(tokens, lengths):
    """The arrays of a batch of one document a row, padded on the right."""
    rows, context = tokens.shape
    valid = np.arange(context) < np.asarray(lengths)[:, None]
    tokens, segments = tokens.astype(np.int32), valid.astype(np.int32)
    return {
        "tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "segments": segments, "valid": valid, "labels": 0 * segments,
        "row_ids": np.arange(rows, dtype=np.int32),
    }  # fmt: skip
