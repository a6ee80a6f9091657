"""Modules that predict further tokens: which token meets which, what is counted, and the same answer on several meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import small

from moejax.models import further
from moejax.moe.inputs import Mode
from moejax.train import losses, metrics, step

OPTIONS = {
    "model.further": 2, "model.first": ("attention+sparse",), "model.moe.capacity_factor": None, "model.further_weight": 0.5,
    "model.moe.sign_bias": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def run():
    """Config, model and start on one device."""
    cfg = small.configure(**OPTIONS)
    return cfg, *small.begin(cfg)


def documents(rows=4, positions=16, seed=0):
    """Rows of documents of different lengths, and padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 80, (rows, positions)).astype(np.int32)
    segments = np.cumsum(rng.random((rows, positions)) < 0.25, axis=1).astype(np.int32) + 1
    segments[0, 11:] = 0
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1))).astype(np.int32)
    valid = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1))) & (segments > 0)
    return {
        "tokens": tokens, "targets": targets, "segments": segments, "valid": valid, "labels": np.zeros_like(tokens),
        "row_ids": np.arange(rows, dtype=np.int32),
    }  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_a_module_reads_and_predicts(run, depth):
    """At i it reads token i + k and predicts token i + k + 1, valid where all of them lie in one document."""
    host, (_, built, _) = documents(), run
    with jax.set_mesh(built.mesh):
        found = jax.tree.map(np.asarray, further.of_depth(small.place(host, built.mesh), depth))
    tokens, segments = host["tokens"], host["segments"]
    for b, t in np.ndindex(tokens.shape):
        end = t + depth + 1
        whole = end < tokens.shape[1] and len(set(segments[b, t : end + 1])) == 1 and segments[b, t] > 0
        assert found.valid[b, t] == whole
        if whole:
            assert found.tokens[b, t] == tokens[b, t + depth] and found.targets[b, t] == tokens[b, end]


def test_a_damaged_token_between_leaves_out(run):
    """Where the token in between cannot be read, no module past it has a valid position, though both ends are there."""
    host, (_, built, _) = documents(), run
    host["segments"][:], host["valid"][:] = 1, True
    host["valid"][:, 8:10] = False  # token 10 and those that would predict it
    with jax.set_mesh(built.mesh):
        valid = np.asarray(further.of_depth(small.place(host, built.mesh), 3).valid)
    assert not valid[:, 5:10].any() and valid[:, :5].all() and valid[:, 10:13].all()


def test_the_loss_counts_them(run):
    """The loss is the cross-entropy plus weight times the mean over modules of theirs; each from its hidden vectors by plain NumPy."""
    cfg, built, start = run
    host, mode = documents(), Mode(training=True, capacity_factor=None)
    at = step.setting(built, start)

    def both(parameters, batch):
        found = built.model(parameters)(batch, at.key, mode, at.routing, at.step)
        sums, _ = step.sums_of(built, parameters, batch, at, mode)
        return [h for h, _ in found.further], [own for _, own in found.further], sums

    with jax.set_mesh(built.mesh):
        hidden, own, sums = jax.tree.map(
            np.asarray, small.quick_jit(both)(start.parameters, small.place(host, built.mesh))
        )
    weight = np.asarray(start.parameters["unembedding"], np.float64)
    wanted = []
    for h, batch in zip(hidden, own, strict=True):
        logits = h.astype(np.float64) @ weight
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nats = log_z - np.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        assert 0 < batch.valid.sum() < host["valid"].sum()
        wanted.append(nats[batch.valid].mean())
    loss, parts = losses.objective(jax.tree.map(jnp.asarray, sums), start.routing, cfg.model)
    np.testing.assert_allclose(parts["further"], np.mean(wanted), rtol=1e-5)
    rest = float(parts["cross_entropy"]) + 0.01 * float(parts["load_balance"]) + 0.001 * float(parts["router_z"])
    np.testing.assert_allclose(loss, rest + 0.5 * float(parts["further"]), rtol=1e-5)
    heldout = metrics.of_evaluation(sums | {"label_nats": [], "label_targets": []}, cfg.model.moe, (), "heldout")
    np.testing.assert_allclose([heldout[f"heldout/further_loss/{k}"] for k in (1, 2)], wanted, rtol=1e-5)
    layers = cfg.model.repeats * len(cfg.model.pattern) + 3
    assert sums["layers"]["sparse"]["load"].shape[0] == layers == start.routing["sparse"]["sign_bias"].shape[0]
    assert sums["layers"]["sparse"]["tokens"].tolist() == [host["valid"].sum()] * (layers - 2) + [
        b.valid.sum() for b in own
    ]


def test_no_module_sees_what_it_predicts(run):
    """Another token at place p changes hidden vectors of module k from position p - k on, not before; the main model's from p on."""
    _, built, start = run
    host, mode, p = documents(), Mode(False, None), 9
    host["segments"][:] = 1
    other = dict(host, tokens=host["tokens"].copy(), targets=host["targets"].copy())
    other["tokens"][:, p] = other["targets"][:, p - 1] = 81

    def hidden(parameters, batch):
        found = built.model(parameters)(batch, jax.random.key(0), mode, start.routing, jnp.int32(0))
        return [found.hidden, *(h for h, _ in found.further)]

    with jax.set_mesh(built.mesh):
        compiled = small.quick_jit(hidden)
        one, two = (compiled(start.parameters, small.place(rows, built.mesh)) for rows in (host, other))
    for k, (a, b) in enumerate(zip(one, two, strict=True)):
        apart = np.abs(np.asarray(a) - np.asarray(b)).max(axis=(0, 2))
        assert (apart[: p - k] == 0).all() and apart[p - k] > 1e-4
