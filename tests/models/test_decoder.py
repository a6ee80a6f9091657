"""The decoder: nothing looks ahead or across documents, a dense model equals a slow NumPy one, sums come in order of depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from train import small

from moejax.models.depth import by_kind, of_layers
from moejax.moe import noise
from moejax.moe.inputs import Mode
from moejax.train import state

SPARSE = {
    "model.pattern": ("attention+dense", "attention+sparse"), "model.repeats": 2, "model.moe.router": "gshard",
    "model.moe.jitter": 0.1, "model.moe.transport": "scatter", "model.moe.capacity_factor": 1.0,
}  # fmt: skip


@functools.cache
def forward(cfg, training=True):
    """(function of parameters and host arrays -> hidden vectors and sums on the host, parameters)."""
    built, start = small.begin(cfg)
    mode = Mode(training, cfg.model.moe.capacity_factor)

    def run(parameters, batch):
        hidden, outcomes, _ = built.model(parameters)(
            batch, noise.step_key(0, jnp.int32(0)), mode, start.routing, start.step
        )
        return hidden, {kind: jax.tree.map(lambda s: jnp.sum(s, axis=1), o["sums"]) for kind, o in outcomes.items()}

    with jax.set_mesh(built.mesh):
        compiled = small.quick_jit(run)

    def call(host, parameters=start.parameters):
        with jax.set_mesh(built.mesh):
            return small.on_host(compiled(parameters, small.place(host, built.mesh)))

    return call, start.parameters


def test_b03_the_future_changes_nothing():
    """B3: other tokens from position t on change no hidden vector before t, exactly, with drops and noise; and change some at t."""
    call, _ = forward(small.configure(**SPARSE))
    host, other = small.arrays(0), small.arrays(1)
    hidden, sums = call(host)
    assert sums["sparse"]["dropped"].sum() > 0
    for t in (1, 7, 15):
        changed = host | {"tokens": np.concatenate([host["tokens"][:, :t], other["tokens"][:, t:]], axis=1)}
        moved, _ = call(changed)
        assert moved[:, :t].tobytes() == hidden[:, :t].tobytes()
        assert (moved[:, t] != hidden[:, t]).any(axis=-1).all()


def test_attention_never_crosses_documents():
    """Another first document leaves every later vector of the row bit-equal; without the boundary it does not."""
    call, _ = forward(small.configure(**{"model.moe.num_experts": 8}))
    host = small.arrays(0)
    host["segments"] = np.where(np.arange(small.T) < 6, 1, 2).astype(np.int32)[None].repeat(small.B, 0)
    changed = host | {"tokens": np.where(host["segments"] == 1, (host["tokens"] + 1) % 256, host["tokens"])}
    (hidden, _), (moved, _) = call(host), call(changed)
    assert moved[:, 6:].tobytes() == hidden[:, 6:].tobytes()
    assert (moved[:, :6] != hidden[:, :6]).any()
    one = {"segments": np.ones_like(host["segments"])}
    assert (call(host | one)[0][:, 6:] != call(changed | one)[0][:, 6:]).any(axis=(1, 2)).all()


def test_rows_are_apart():
    """A row's vectors do not depend on its neighbours (groups of one row)."""
    call, _ = forward(small.configure(**SPARSE))
    host, other = small.arrays(0), small.arrays(1)
    mixed = {name: np.concatenate([host[name][:3], other[name][3:]]) for name in host}
    np.testing.assert_array_equal(call(mixed)[0][:3], call(host)[0][:3])


# ---- the slow twin ---------------------------------------------------------------------------------------------------


def norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def rotated(x, theta):
    """x [T, d]: pairs (i, i + d/2) turned by position * theta^(-2i/d)."""
    positions, d = x.shape
    out = np.zeros_like(x)
    for t in range(positions):
        for i in range(d // 2):
            angle = t * theta ** (-2 * i / d)
            a, b = x[t, i], x[t, i + d // 2]
            out[t, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, i + d // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def attention(x, p, segments, model):
    """One row [T, D], head by head; each key and value head serves heads / kv_heads neighbouring query heads."""
    y = np.zeros_like(x)
    for h in range(model.heads):
        kv = h // (model.heads // model.kv_heads)
        q, k = rotated(x @ p["query"][:, h], model.rope_theta), rotated(x @ p["key"][:, kv], model.rope_theta)
        v = x @ p["value"][:, kv]
        for t in range(len(x)):
            seen = [s for s in range(t + 1) if segments[s] == segments[t]]
            scores = np.array([q[t] @ k[s] for s in seen]) / np.sqrt(model.head_dim)
            weights = np.exp(scores - scores.max())
            y[t] += sum(w * v[s] for w, s in zip(weights / weights.sum(), seen, strict=True)) @ p["out"][h]
    return y


def swiglu(x, p):
    gate, up = x @ p["gate_up"][:, 0], x @ p["gate_up"][:, 1]
    return (gate / (1 + np.exp(-gate)) * up) @ p["down"]


def reference(parameters, host, model):
    """Final hidden vectors of a dense model in float64."""
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)
    rows = []
    for tokens, segments in zip(host["tokens"], host["segments"], strict=True):
        x = parameters["embedding"][tokens]
        for repeat in range(model.repeats):
            for i in range(len(model.pattern)):
                p = jax.tree.map(lambda w: w[repeat], parameters["blocks"]["layers"][i])
                x = x + attention(norm(x, p["mixer_norm"]["scale"], model.norm_epsilon), p["mixer"], segments, model)
                x = x + swiglu(norm(x, p["channel_norm"]["scale"], model.norm_epsilon), p["channel"]["mlp"])
        rows.append(norm(x, parameters["final_norm"]["scale"], model.norm_epsilon))
    return np.stack(rows)


def test_dense_decoder_matches_numpy():
    """RMSNorm, rotary positions, grouped-query attention, SwiGLU and the order of layers, to 1e-5; scales are not all one."""
    options = {
        "model.pattern": ("attention+dense", "attention+dense"),
        "model.repeats": 2,
        "model.heads": 4,
        "model.kv_heads": 2,
    }
    cfg = small.configure(**options | {"model.norm_epsilon": 0.1, "model.rope_theta": 100.0})
    call, parameters = forward(cfg)
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda x: jax.device_put(x * rng.uniform(0.5, 1.5, x.shape).astype(np.float32), x.sharding), parameters
    )
    hidden, sums = call(small.arrays(0), parameters)
    assert sums == {}
    small.close(hidden, reference(parameters, small.arrays(0), cfg.model))


# ---- layers in order -------------------------------------------------------------------------------------------------


def test_by_kind_orders_by_depth():
    """Two sparse layers in a block of three, repeated: the sums lie as the layers do."""
    at = lambda *depths: {"n": jnp.asarray(depths, jnp.int32)}  # noqa: E731
    found = by_kind(["sparse", "dense", "sparse"], [at(0, 3, 6), {}, at(2, 5, 8)])
    assert list(found) == ["sparse"]
    np.testing.assert_array_equal(found["sparse"]["n"], [0, 2, 3, 5, 6, 8])


def test_of_layers_is_the_inverse():
    """State and recordings reach the layers that they are of; layers of other kinds get what is missing."""
    channels = ["sparse", "dense", "sparse"]
    stacked = {"sparse": {"n": jnp.asarray([0, 2, 3, 5, 6, 8], jnp.int32)}}
    found = of_layers(channels, stacked, {})
    assert found[1] == {}
    np.testing.assert_array_equal(found[0]["n"], [0, 3, 6])
    np.testing.assert_array_equal(found[2]["n"], [2, 5, 8])
    assert of_layers(channels, None) == [None] * 3 and of_layers(channels, {}, {}) == [{}] * 3
    again = by_kind(channels, of_layers(channels, stacked, {}))
    np.testing.assert_array_equal(again["sparse"]["n"], stacked["sparse"]["n"])


def test_state_reaches_its_layer():
    """A bias for expert 7 in one layer's state: all tokens of that layer choose it, and of no other."""
    cfg = small.configure(
        **{"model.pattern": ("attention+sparse",) * 2, "model.repeats": 2, "model.moe.sign_bias": 0.1}
    )
    built, start = small.begin(cfg)
    batch = small.place(small.arrays(0), built.mesh)
    with jax.set_mesh(built.mesh):

        @small.quick_jit
        def chosen(bias):
            routing = {"sparse": start.routing["sparse"] | {"sign_bias": bias}}
            key = noise.step_key(0, jnp.int32(0))
            outcomes = built.model(start.parameters)(batch, key, Mode(False, None), routing, start.step).outcomes
            return outcomes["sparse"]["sums"]["requests"][:, 0, 7]

        for depth in range(4):
            bias = np.zeros((4, 8), np.float32)
            bias[depth, 7] = 50
            everybody = np.asarray(chosen(bias)) == small.arrays(0)["valid"].sum()
            assert np.flatnonzero(everybody).tolist() == [depth]


def test_sums_follow_the_layers():
    """A layer whose router is zero sends all first choices to expert 0: its sums are where the layer is."""
    cfg = small.configure(**{"model.pattern": ("attention+sparse", "attention+sparse"), "model.repeats": 2})
    call, parameters = forward(cfg, False)
    for depth in range(4):
        changed = small.on_host(parameters)
        router = changed["blocks"]["layers"][depth % 2]["channel"]["router"]["logits"].copy()
        router[depth // 2] = 0
        changed["blocks"]["layers"][depth % 2]["channel"] = changed["blocks"]["layers"][depth % 2]["channel"] | {
            "router": {"logits": router}
        }
        changed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), changed, parameters)
        _, sums = call(small.arrays(0), changed)
        valid = small.arrays(0)["valid"].sum()
        assert [i for i in range(4) if sums["sparse"]["load"][i, 0] == valid] == [depth]


def test_unroll_changes_nothing():
    """Two blocks in one turn of the scan: the same vectors and counts."""
    (hidden, sums), (hidden_, sums_) = (
        forward(small.configure(**SPARSE | {"model.unroll": n}))[0](small.arrays(0)) for n in (1, 2)
    )
    small.close([hidden_, sums_], [hidden, sums], 2e-6)


def test_b34_parameter_counts_by_hand():
    """B34: all parameters, and those one token meets: of eight experts, two. Biases are state and count nowhere."""
    cfg = small.configure(**SPARSE | {"model.moe.shared_hidden": 4, "model.moe.sign_bias": 0.1})
    built, start = small.begin(cfg)
    d, attention_ = 16, 2 * (16 * 2 * 8) + 2 * (16 * 1 * 8)
    dense = attention_ + 2 * d + 3 * d * 24
    expert, shared, router = 3 * d * 8, 3 * d * 4, d * 8
    sparse = attention_ + 2 * d + router + shared
    outside = 2 * 264 * d + d
    total, active = state.count_parameters(built, start.parameters)
    assert total == outside + 2 * (dense + sparse + 8 * expert)
    assert active == outside + 2 * (dense + sparse + 2 * expert)


def test_b34_parameter_counts_of_every_part():
    """B34: two widths, a latent width, a gated shared expert, constants, a second head of the router."""
    cfg = small.configure(**{
        "model.moe.router": "noisy_topk", "model.moe.hidden_classes": (8, 16), "model.moe.latent": 4, "model.moe.shared_hidden": 4,
        "model.moe.shared_gate": True, "model.moe.zero_experts": ("constant", "zero", "constant"),
    })  # fmt: skip
    built, start = small.begin(cfg)
    d, latent = 16, 4
    outside = 2 * 264 * d + d + 2 * (16 * 2 * 8) + 2 * (16 * 1 * 8) + 2 * d
    rest = 2 * d * 11 + 2 * d * latent + 2 * d + 3 * d * 4 + d
    experts = 4 * 3 * latent * 8 + 4 * 3 * latent * 16
    total, active = state.count_parameters(built, start.parameters)
    assert total == outside + rest + experts and active == outside + rest + experts * 2 // 8
