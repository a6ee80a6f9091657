"""Rules of transfer: the table by hand, one for nothing, what they do to initial values and to a step, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from train import small

from moejax import config, mesh
from moejax.errors import ConfigError
from moejax.layers import transfer
from moejax.train import check, optimizer, state

ON = {"transfer.rules": "mup", "transfer.width": 4, "transfer.heads": 1, "transfer.expert_hidden": 4}
"""Of the small model, of width 16 with 2 heads and experts of width 8: 4, 2 and 2 times as much."""
EVERYTHING = {
    "model.pattern": ("latent+sparse", "attention+dense"), "model.latent.query_rank": 8, "model.attention.bias": True,
    "model.attention.norm": "head", "model.attention.sinks": True, "model.further": 1, "model.moe.latent": 8,
    "model.moe.shared_hidden": 8, "model.moe.shared_gate": True, "model.moe.zero_experts": ("constant",),
    "model.moe.router_bias": True, "model.moe.expert_bias": True, "model.moe.router": "noisy_topk",
}  # fmt: skip


def factors(cfg):
    return state.factors(cfg, mesh.make(config.Mesh(), jax.devices()[:1]))


def by_name(tree):
    """Factors by the last names of the path."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(k, "key", k)) for k in path[-2:]): value for path, value in found}


def test_the_table_by_hand():
    """Initial standard deviations beside 1 / sqrt(fan_in), and learning rates."""
    initial, rates = map(by_name, factors(small.configure(**ON)))
    wanted = {
        "embedding": (1, 1), "final_norm/scale": (1, 1), "mixer_norm/scale": (1, 1), "channel_norm/scale": (1, 1),
        "mixer/query": (1, 1 / 4), "mixer/key": (1, 1 / 4), "mixer/value": (1, 1 / 4), "mixer/out": (1, 1 / 2),
        "router/logits": (1, 1 / 4), "0/up": (1, 1 / 4), "0/gate": (1, 1 / 4), "0/down": (1, 1 / 2),
        "unembedding": (1 / 2, 1 / 4),
    }  # fmt: skip
    assert {name: (initial[name], rates[name]) for name in initial} == wanted


def test_vectors_that_stand_for_tokens_keep_their_size():
    """Constants of zero-computation experts are drawn with 1 / sqrt(D); what stands beside an embedding must not shrink with it."""
    initial, rates = map(by_name, factors(small.configure(**ON, **{"model.moe.zero_experts": ("constant",)})))
    assert (initial["channel/constants"], rates["channel/constants"]) == (2, 1)


def test_every_size_reaches_what_it_feeds():
    cfg = small.configure(**EVERYTHING)
    paths = {
        "width": "latent_down", "heads": "mixer/out", "hidden": "mlp/down", "expert_hidden": "0/down",
        "shared_hidden": "shared/down", "expert_latent": "0/up", "latent_rank": "latent_up", "query_rank": "query_up",
    }  # fmt: skip
    assert paths.keys() == transfer.SIZES.keys() == {f.name for f in dataclasses.fields(config.Transfer)} - {"rules"}
    for name, path in paths.items():
        half = dataclasses.replace(cfg, transfer=config.Transfer("mup", **{name: _own(cfg.model, name) // 2}))
        check.check(half)
        _, rates = map(by_name, factors(half))
        assert {value for key, value in rates.items() if key.endswith(path)} == {0.5}, name


def _own(part, name):
    for step in transfer.SIZES[name]:
        part = getattr(part, step)
    return part


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["small", "everything"])
def test_at_the_tuned_size_every_factor_is_one(options):
    cfg = small.configure(**options, **{"transfer.rules": "mup", "transfer.width": 16})
    for tree in factors(cfg):
        assert set(jax.tree.leaves(tree)) == {1.0}


def test_more_experts_change_nothing():
    """The number of experts has no factor: an expert is as wide as before, and a token visits as many."""
    assert factors(small.configure(**ON)) == factors(small.configure(**ON, **{"model.moe.num_experts": 64}))


def test_without_rules_there_are_no_factors():
    assert factors(small.configure(**{"transfer.width": 4})) == (None, None)


def test_what_is_trained_is_an_ordinary_model():
    """No rule multiplies in the forward pass, so a checkpoint is published and evaluated like any other: the module is the same."""
    on, off = (_build(small.configure(**options)) for options in (ON, {}))
    assert on.graph == off.graph and on.initial is not None and off.initial is None
    moments = [jax.eval_shape(built.transform.init, state.abstract(built)) for built in (on, off)]
    assert jax.tree.structure(moments[0]) == jax.tree.structure(moments[1])


def _build(cfg):
    on = mesh.make(cfg.mesh, jax.devices()[: math.prod(mesh.shape(cfg.mesh))])
    with jax.set_mesh(on):
        return state.build(cfg, on)


def test_the_tuned_model_need_not_fit_the_mesh():
    """Its width of 3 cannot be cut in eight."""
    cfg = small.configure(**{"mesh.fsdp": 2, "mesh.expert": 4, "transfer.rules": "mup", "transfer.width": 3})
    check.check(cfg)
    assert by_name(_build(cfg).initial)["unembedding"] == (16 / 3) ** -0.5


@pytest.mark.slow
def test_initial_values():
    """The same draws, the unembedding halved."""
    on, off = (small.create(small.configure(**options)).parameters for options in (ON, {}))
    np.testing.assert_array_equal(on["unembedding"], off["unembedding"] / 2)
    del on["unembedding"], off["unembedding"]
    jax.tree.map(np.testing.assert_array_equal, on, off)


def test_a_step():
    """Adam's part is scaled, after its moments; decay is not, so a weight forgets by the schedule alone."""
    train = config.Train(warmup=0, weight_decay=0.1, clip_norm=1e9)
    parameters = {"a": jnp.full(3, 2.0), "b": jnp.full(3, 2.0), "v": jnp.full(3, 2.0)}
    slopes = {"a": jnp.full(3, 5.0), "b": jnp.full(3, 5.0), "v": jnp.full(3, 5.0)}
    decay, rates = {"a": True, "b": True, "v": False}, {"a": 1.0, "b": 0.25, "v": 0.25}
    made = {}
    for name, given in (("on", rates), ("off", None)):
        transform = optimizer.make(train, decay, given)
        made[name], moments = jax.jit(transform.update)(slopes, jax.jit(transform.init)(parameters), parameters)
        made[f"{name} moments"] = moments
    rate = train.learning_rate
    np.testing.assert_allclose(made["on"]["a"], made["off"]["a"])
    np.testing.assert_allclose(made["off"]["a"], -rate * (1 + 0.1 * 2), rtol=1e-6)
    np.testing.assert_allclose(made["on"]["b"], -rate * (0.25 + 0.1 * 2), rtol=1e-6)
    np.testing.assert_allclose(made["on"]["v"], -rate * 0.25, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, made["on moments"], made["off moments"])


def test_without_factors_the_optimiser_is_adamw():
    train, tree = config.Train(warmup=0), {"a": jnp.arange(3.0), "v": jnp.ones(2)}
    ours = optimizer.make(train, {"a": True, "v": False})
    adamw = optax.adamw(optimizer.schedule(train), 0.9, 0.98, 1e-8, weight_decay=0.1, mask={"a": True, "v": False})
    theirs = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    ours, theirs = (jax.jit(t.update)(tree, jax.jit(t.init)(tree), tree) for t in (ours, theirs))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_every_parameter_has_a_role():
    with jax.set_mesh(mesh.make(config.Mesh(), jax.devices()[:1])):
        model = small.configure(**EVERYTHING).model
        variables = nnx.state(jax.eval_shape(lambda: state.Decoder(model, rngs=nnx.Rngs(0))))
    roles = {v.get_metadata("role") for _, v in nnx.to_flat_state(variables)}
    assert roles == transfer.RULES["mup"].keys()


WRONG = [
    ({"transfer.rules": "mu_p"}, ["transfer.rules='mu_p'", "did you mean mup?"]),
    ({"transfer.rules": "x"}, ["transfer.rules='x'", "choose one of none, mup"]),
    ({"transfer.rules": "mup"}, ["changes nothing", "set transfer.width"]),
    ({"transfer.width": -1}, ["transfer.width=-1", "model.width=16"]),
    ({**ON, "transfer.shared_hidden": 8}, ["transfer.shared_hidden=8", "model.moe.shared_hidden=0", "0 for"]),
    (
        {**ON, "model.moe.hidden_classes": (4, 8)},
        ["transfer.expert_hidden=4", "hidden_classes=(4, 8)", "leave it at 0"],
    ),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[" ".join(said) for _, said in WRONG])
def test_what_is_refused(options, said):
    with pytest.raises(ConfigError) as error:
        check.check(small.configure(**options))
    assert all(part in str(error.value) for part in said), error.value
