"""Decoding with a cache: what a whole row gives, token by token, whoever the neighbours are (B36)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.published import one_device
from train import small

from moejax import sharding
from moejax.arrays import Batch
from moejax.errors import ConfigError, UserError
from moejax.models import generate
from moejax.models.decoder import empty_cache
from moejax.models.generate import Generator, Sampling, Sizes
from moejax.moe.inputs import Mode
from moejax.train import state

B, T = 4, 24
KINDS = {
    "plain": {},
    "local": {
        "model.pattern": ("local+sparse", "attention+dense"), "model.local.window": 5, "model.moe.router_bias": True,
        "model.local.sinks": True, "model.local.bias": True,
        "model.attention.sinks": True, "model.attention.out_bias": True, "model.attention.norm": "head",
        "model.rope.scaling": "yarn", "model.rope.factor": 8.0, "model.rope.original_context": 16, "model.rope.truncate": False,
    },
    "chunks": {
        "model.pattern": ("local+sparse", "attention+sparse"), "model.local.chunk": 7, "model.local.norm": "l2",
        "model.attention.rotary": False, "model.attention.temperature": 0.3, "model.attention.temperature_positions": 4,
        "model.rope.interleaved": True, "model.moe.gate_at": "input", "model.moe.renormalize": False, "model.moe.score": "sigmoid",
        "model.rope.scaling": "llama3", "model.rope.factor": 4.0, "model.rope.original_context": 16,
    },
    "latent": {
        "model.first": ("latent+dense", "latent+sparse"), "model.pattern": ("latent+sparse",), "model.latent.query_rank": 12,
        "model.moe.selection_bias": True, "model.moe.score": "sigmoid", "model.rope.interleaved": True, "model.moe.shared_hidden": 8,
    },
    "whole": {
        "model.first": ("attention+sparse",), "model.attention.norm": "whole", "model.rope.fraction": 0.5,
        "model.moe.expert_bias": True, "model.moe.router": "hash", "model.moe.hash_by": "position",
    },
}  # fmt: skip


def built_of(mesh, **options):
    cfg = small.configure(**{"model.moe.capacity_factor": None, "data.context": T} | options)
    with jax.set_mesh(mesh):
        built = state.build(cfg, mesh)
        start = state.create(built)
    return built, shaken(start.parameters), start.routing


def shaken(parameters):
    """Nothing is 0 or 1: a bias or scale left out would show."""
    key = iter(jax.random.split(jax.random.key(7), len(jax.tree.leaves(parameters))))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(key), p.shape, out_sharding=p.sharding), parameters)


def batch_of(mesh, tokens, valid):
    rows, place = np.arange(len(tokens), dtype=np.int32), sharding.batch_sharding(mesh)
    put = lambda a: jax.device_put(a, place)  # noqa: E731
    row_ids = jax.device_put(rows, sharding.batch_sharding(mesh, 1))
    ones = np.ones(tokens.shape, np.int32)
    return Batch(put(tokens), put(tokens), put(ones), put(valid), put(ones), row_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_tokens_give_the_whole_row(kind):
    """Hidden vectors of every position, over windows, pieces and temperatures, to 1e-5: a piece of 5, one of 4, then one by one."""
    mesh = one_device()
    built, parameters, routing = built_of(mesh, **KINDS[kind])
    routing = jax.tree.map(lambda r: r + 0.05 if r.dtype == jnp.float32 else r, routing)
    tokens = np.random.default_rng(0).integers(0, 88, (B, T)).astype(np.int32)
    valid = np.ones((B, T), bool)
    key, mode, step = jax.random.key(0), Mode(False, None), jnp.int32(3)
    with jax.set_mesh(mesh):
        whole = jax.jit(lambda p, b: built.model(p)(b, key, mode, routing, step)[0])
        wanted = np.asarray(whole(parameters, batch_of(mesh, tokens, valid)))
        decode = jax.jit(lambda p, b, cache: built.model(p).decode(b, key, mode, routing, step, cache))
        cache, found, done = empty_cache(built.config.model, B, T + 3), [], 0
        for size in (5, 4, *[1] * (T - 9)):
            part = batch_of(mesh, tokens[:, done : done + size], valid[:, done : done + size])
            hidden, cache = decode(parameters, part, cache)
            found.append(np.asarray(hidden))
            done += size
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, rtol=0, atol=1e-5)
    assert np.abs(wanted).max() > 0.5


@pytest.fixture(scope="module")
def talker():
    mesh = one_device()
    built, parameters, routing = built_of(mesh, **KINDS["local"])
    return Generator(built.config.model, built.model, mesh, Sizes(B, 32, 8)), parameters, routing


def said(talker, prompts, tokens=10, **options):
    generator, parameters, routing = talker
    return np.stack(list(generator.stream(parameters, routing, 3, prompts, tokens, **options)), axis=1)


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [7, 7, 7]]


def test_b36_neighbours_change_nothing(talker):
    """Each prompt alone, in another company and in another order of arrival says the same, greedy; and so do draws in its own row."""
    together = said(talker, PROMPTS)
    assert together.shape == (4, 10)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(said(talker, [prompt])[0], together[row])
    np.testing.assert_array_equal(said(talker, PROMPTS[::-1])[::-1], together)
    warm = Sampling(temperature=1.0, seed=1)
    np.testing.assert_array_equal(said(talker, PROMPTS[:2], sampling=warm), said(talker, PROMPTS, sampling=warm)[:2])
    assert (said(talker, PROMPTS, sampling=warm) != together).any()


def test_greedy_is_the_argmax_of_the_whole_row(talker):
    """Every token is the most likely after all before it, by the model without a cache."""
    generator, parameters, routing = talker
    prompt, answer = PROMPTS[2], said(talker, [PROMPTS[2]], 8)[0]
    row = np.zeros((B, T), np.int32)
    row[:, : len(prompt) + 8] = np.concatenate([prompt, answer])
    with jax.set_mesh(generator.mesh):
        model = generator._build(parameters)
        mode = Mode(False, None)
        hidden, *_ = model(
            batch_of(generator.mesh, row, np.ones(row.shape, bool)), jax.random.key(0), mode, routing, jnp.int32(3)
        )
        best = np.asarray(jnp.argmax(model.logits(hidden), axis=-1))[0]
    np.testing.assert_array_equal(best[len(prompt) - 1 : len(prompt) + 7], answer)


def test_stop_and_sizes(talker):
    """A sequence that meets a stop token ends with -1; others go on. What does not fit is refused with the remedy."""
    answers = said(talker, PROMPTS)
    stop = int(answers[0, 4])
    ended = said(talker, PROMPTS, stop=[stop])
    for row, answer in enumerate(answers):
        end = np.flatnonzero(answer == stop)
        end = end[0] if len(end) else len(answer)
        np.testing.assert_array_equal(ended[row, :end], answer[: min(end, ended.shape[1])])
        assert (ended[row, end:] == -1).all()
    for prompts, tokens in (([], 1), (PROMPTS * 2, 1), ([[1] * 30], 3), ([[]], 1)):
        with pytest.raises(UserError, match="between 1 and 4 prompts"):
            said(talker, prompts, tokens)


def test_sampling_keeps_what_it_should():
    """top_k and top_p against a plain sort, and a temperature that goes to zero is greedy."""
    mesh = one_device()
    logits = np.random.default_rng(1).normal(size=(6, 20)).astype(np.float32)
    with jax.set_mesh(mesh):
        for top_k, top_p in ((3, 1.0), (0, 0.6), (7, 0.5), (1, 0.1)):
            found = np.isfinite(generate.kept(jnp.asarray(logits), Sampling(1.0, top_k, top_p)))
            for row, keeps in zip(logits, found, strict=True):
                order = np.argsort(-row)[: top_k or 20]
                p = np.exp(row[order] - row.max())
                p /= p.sum()
                number = 1 + np.sum(np.cumsum(p)[:-1] < top_p) if top_p < 1 else len(order)
                assert set(np.flatnonzero(keeps)) == set(order[:number])
        place = jnp.zeros(6, jnp.int32)
        cold = generate.draw(jnp.asarray(logits), place, Sampling(1e-4))
        np.testing.assert_array_equal(cold, logits.argmax(1))
        rows = jnp.broadcast_to(jnp.asarray(logits[:1]), (4000, 20))
        drawn = np.asarray(generate.draw(rows, jnp.zeros(4000, jnp.int32), Sampling(1.0)))
    share = np.bincount(drawn, minlength=20) / 4000
    np.testing.assert_allclose(share, np.exp(logits[0]) / np.exp(logits[0]).sum(), atol=0.03)


@pytest.mark.parametrize(
    "options,said",
    [
        (
            {
                "model.moe.router": "random",
                "model.moe.score": "constant",
                "model.moe.load_balance": 0.0,
                "model.moe.router_z": 0.0,
            },
            "random",
        ),
        ({"model.moe.group_rows": 2}, "rows decode alone"),
        ({"model.moe.group_window": 4}, "rows decode alone"),
    ],
)
def test_what_cannot_decode_is_refused(options, said):
    """With the values and the remedy, before anything is compiled."""
    cfg = small.configure(**{"model.moe.capacity_factor": None} | options)
    with pytest.raises(ConfigError, match=said):
        generate.check(cfg.model, one_device(), Sizes(2, 8, 4))
