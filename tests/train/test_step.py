"""The train step: the same on every mesh and in any number of microbatches, and the loss in the log is the one differentiated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import small

from moejax import config
from moejax.train import losses, step

HARD = {
    "model.moe.router": "gshard", "model.moe.jitter": 0.1, "model.moe.transport": "scatter", "model.moe.capacity_factor": 1.0,
    "model.moe.load_balance": 1.0, "model.moe.router_z": 0.1, "train.clip_norm": 0.5, "train.epsilon": 1e-2, "model.kv_heads": 2,
}  # fmt: skip
"""Noise, drops, clipping, and coefficients so large that an error in the aux losses shows. A large epsilon keeps AdamW from
turning the rounding of a zero gradient into a full update."""

PARTS = {
    "model.pattern": ("attention+dense", "attention+sparse"), "model.moe.shared_hidden": 8, "model.moe.capacity_factor": 1.25,
    "model.moe.transport": "gather", "model.moe.router": "topk", "model.moe.jitter": 0.0,
}  # fmt: skip
"""A model of dense, sparse and shared parts. Used with groups of two rows."""

KINDS = {
    "sign": {
        "model.moe.router": "topk", "model.moe.score": "sigmoid", "model.moe.sign_bias": 0.01, "model.moe.reroute": True,
        "model.moe.load_balance_scope": "sequence",
    },
    "quantile": {
        "model.moe.router": "noisy_topk", "model.moe.quantile_bias": 1.0, "model.moe.importance": 0.5, "model.moe.order": "choice_major",
        "model.moe.allow_noncausal": True,
    },
    "parts": {
        "model.moe.router": "switch", "model.moe.top_k": 1, "model.moe.hidden_classes": (8, 16), "model.moe.latent": 8,
        "model.moe.shared_hidden": 8, "model.moe.shared_gate": True, "model.moe.zero_experts": ("identity", "constant"),
        "model.moe.zero_share": 0.2, "model.moe.load_balance_overflow": 0.02, "model.moe.transport": "gather",
        "model.moe.tensor": "experts",
    },
    "ragged": {
        "model.moe.router": "topk", "model.moe.transport": "ragged", "model.moe.receive_buffer": 0.5, "model.moe.hidden_classes": (8, 16),
    },
}  # fmt: skip
"""What keeps state, reroutes and draws; a layer of every part; an exchange of several rounds. Together with HARD."""

CROSS = {"expert": 2, "tensor": 2, "context": 2}
CASES = [
    pytest.param({"data": 2}, 4, 1, marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "expert": 2}, 1, 1, marks=pytest.mark.slow),
    pytest.param({"expert": 4}, 2, 1, marks=pytest.mark.slow),
    ({"data": 2, "fsdp": 2, "expert": 2}, 1, 1),
    ({}, 2, 1),
    pytest.param({}, 4, 2, marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "expert": 2}, 1, 2, marks=pytest.mark.slow),
    pytest.param(CROSS, 2, 2, marks=pytest.mark.slow),
]
SPREAD = [
    (CROSS, 2),
    ({"data": 2, "fsdp": 2, "expert": 2}, 1),
    ({"fsdp": 2, "expert": 2}, 2),
    ({"expert": 4}, 2),
    ({"data": 2}, 4),
]
QUICK = {("ragged", 2)}
KIND_CASES = [
    pytest.param(*how, kind, marks=[] if (kind, i) in QUICK else pytest.mark.slow if i < 2 else pytest.mark.soak)
    for kind in KINDS
    for i, how in enumerate(SPREAD)
]
BATCHES = [small.arrays(seed) for seed in range(3)]


def hard(sizes=None, microbatches=1, group_rows=1, **options):
    parts = PARTS if group_rows == 2 else {}
    cfg = small.configure(
        **HARD | parts | {"train.microbatches": microbatches, "model.moe.group_rows": group_rows} | options
    )
    return dataclasses.replace(cfg, mesh=config.Mesh(**(sizes or {})))


@pytest.mark.parametrize("sizes,microbatches,group_rows", CASES)
def test_b01_b16_mesh_and_microbatches_change_nothing(sizes, microbatches, group_rows):
    """B1, B16, B37: counts exactly, losses, gradients, norms before clipping and parameters after three steps to 1e-5, with
    noise, drops and clipping. The seeds have no margin so small that rounding decides."""
    wanted, actual = (
        small.trace(cfg, BATCHES) for cfg in (hard(group_rows=group_rows), hard(sizes, microbatches, group_rows))
    )
    assert all(n["moe/drop_rate"] > 0 and n["train/gradient_norm"] > HARD["train.clip_norm"] for n in wanted.numbers)
    small.close(actual.sums, wanted.sums)
    small.close(actual.numbers, wanted.numbers)
    small.close(actual.gradients, wanted.gradients, 2e-5)
    small.close(actual.parameters, wanted.parameters, 2e-5)


@pytest.mark.parametrize("sizes,microbatches,kind", KIND_CASES)
def test_b01_b16_of_every_kind(sizes, microbatches, kind):
    """B1, B16: the same over two steps of balancers with state, rerouting, learned noise, and of layers of every part; the
    state too, counts and biases exactly."""
    wanted, actual = (
        small.trace(c, BATCHES[:2]) for c in (hard(**KINDS[kind]), hard(sizes, microbatches, **KINDS[kind]))
    )
    assert any(n["moe/drop_rate"] + n["moe/reroute_rate"] > 0 for n in wanted.numbers)
    small.close(actual.sums, wanted.sums)
    small.close(actual.numbers, wanted.numbers)
    small.close(actual.gradients, wanted.gradients, 2e-5)
    small.close(actual.parameters, wanted.parameters, 2e-5)
    small.close(actual.routing, wanted.routing, 0 if kind == "sign" else 1e-6)


def test_b17_replicas_are_bit_equal():
    """B17: after ten steps every device that holds the same piece of an array holds the same bits."""
    run = small.build(hard({"fsdp": 2, "tensor": 2, "context": 2}, 2, **KINDS["sign"]))
    now = jax.tree.map(lambda x: x.copy(), run.start)
    with jax.set_mesh(run.built.mesh):
        for i in range(10):
            now, _, _ = run.step(now, small.place(BATCHES[i % 3], run.built.mesh))
    shared = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(now):
        pieces = {}
        for shard in leaf.addressable_shards:
            pieces.setdefault(str(shard.index), []).append(np.asarray(shard.data).tobytes())
        shared += max(map(len, pieces.values())) > 1
        assert all(len(set(copies)) == 1 for copies in pieces.values()), path
    assert shared > 10


def test_b02_padding_changes_nothing():
    """B2: eight more rows and eight more positions, full of invalid tokens, leave counts, losses and gradients as they are."""
    more = small.arrays(9, 2 * small.B, small.T + 8)
    wide = {key: value.copy() for key, value in more.items()}
    wide["valid"][:], wide["segments"][:, small.T :] = False, 0
    for key, value in BATCHES[0].items():
        if key != "row_ids":
            wide[key][: small.B, : small.T] = value
    wanted, actual = small.trace(hard(), BATCHES[:1]), small.trace(hard(), [wide])
    small.close(actual.sums, wanted.sums, 2e-6)
    small.close(actual.gradients, wanted.gradients, 5e-6)
    small.close(actual.parameters, wanted.parameters, 5e-6)


def test_b02_nothing_valid():
    """A batch without a valid token has loss and gradient zero, not NaN."""
    blank = BATCHES[0] | {"valid": np.zeros((small.B, small.T), bool)}
    trace = small.trace(hard(), [blank])
    assert trace.numbers[0]["train/loss"] == 0 and trace.numbers[0]["train/gradient_norm"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trace.parameters))


@pytest.mark.parametrize("microbatches,options", [(1, {}), (2, {"model.moe.load_balance_scope": "microbatch"})])
def test_b12_the_logged_loss_is_the_differentiated_one(microbatches, options):
    """B12: the slope of the logged train/loss along the gradient of the router, and of the rest, is that gradient's norm. Steps
    are so small that no choice flips, so large that the loss's float32 rounding is 0.05 % of them, and two cancel the curvature."""
    cfg = hard(microbatches=microbatches, **{"model.kv_heads": 1} | options)
    base = small.trace(cfg, BATCHES[:1])
    start = small.on_host(small.build(cfg).start.parameters)
    is_router = lambda path: "router" in jax.tree_util.keystr(path)  # noqa: E731
    for part in (is_router, lambda path: not is_router(path)):
        slope = jax.tree_util.tree_map_with_path(
            lambda p, g, part=part: g if part(p) else np.zeros_like(g), base.gradients
        )
        norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in jax.tree.leaves(slope)))

        def along(size, slope=slope, norm=norm):
            scale = np.float32(size / norm)
            moved = jax.tree.map(lambda p, d: p + scale * d, start, slope)
            trace = small.trace(cfg, BATCHES[:1], moved)
            for key, value in base.sums[0]["layers"]["sparse"].items():
                if value.dtype.kind == "i":
                    np.testing.assert_array_equal(
                        trace.sums[0]["layers"]["sparse"][key], value, err_msg="a choice flipped"
                    )
            return trace.numbers[0]["train/loss"]

        h = 4e-3
        central = lambda h, along=along: (along(h) - along(-h)) / (2 * h)  # noqa: E731
        slope_of_log = (4 * central(h) - central(2 * h)) / 3
        assert slope_of_log == pytest.approx(norm, rel=2e-3)


LOSSES = ("load_balance", "router_z", "importance", "smooth_load", "score_variance", "orthogonality")


def test_b08_coefficients_are_linear():
    """B8: doubling a coefficient doubles what it adds to the gradients of the router's heads and of the experts; zero adds
    nothing, and all only add. The slope of the objective by the sums is pulled back through the model, compiled once."""
    on = {f"model.moe.{name}": 0.5 for name in LOSSES}
    cfg = small.configure(**on | {"model.moe.router": "noisy_topk"})
    built, start = small.begin(cfg)
    batch, is_real = small.place(BATCHES[0], built.mesh), lambda x: jnp.issubdtype(x.dtype, jnp.floating)

    def sums_of(parameters, batch):
        return step.sums_of(built, parameters, batch, step.setting(built, start), step.training_mode(cfg))[0]

    def real_sums(parameters, batch):
        return [x for x in jax.tree.leaves(sums_of(parameters, batch)) if is_real(x)]

    def pull(parameters, batch, slope):
        channel = jax.vjp(lambda p: real_sums(p, batch), parameters)[1](slope)[0]["blocks"]["layers"][0]["channel"]
        return channel["router"], channel["experts"]

    with jax.set_mesh(built.mesh):
        leaves, structure = jax.tree.flatten(small.quick_jit(sums_of)(start.parameters, batch))
        pull = small.quick_jit(pull)

        def gradient(name="loss", **coefficients):
            moe = dataclasses.replace(cfg.model.moe, **dict.fromkeys(LOSSES, 0.0) | coefficients)

            def objective(real):
                real = iter(real)
                sums = jax.tree.unflatten(structure, [next(real) if is_real(x) else x for x in leaves])
                return losses.objective(sums, start.routing, dataclasses.replace(cfg.model, moe=moe))[1][name]

            slope = small.quick_jit(jax.grad(objective))([x for x in leaves if is_real(x)])
            return jax.tree.map(lambda x: np.asarray(x, np.float64), pull(start.parameters, batch, slope))

        def added(**coefficients):
            return jax.tree.map(np.subtract, gradient(**coefficients), none)

        none, task = gradient(), gradient("cross_entropy")
        alone = {name: added(**{name: 0.5}) for name in LOSSES}
        double = {name: added(**{name: 1.0}) for name in LOSSES}
        together = added(**dict.fromkeys(LOSSES, 0.5))
    small.close(none, task, 1e-6)
    for name in LOSSES:
        touched = alone[name][1][0]["down"] if name == "orthogonality" else alone[name][0]["logits"]
        assert np.abs(touched).max() > 1e-5, name
        scale = jax.tree.map(np.abs, none)
        for a, b, c in zip(*map(jax.tree.leaves, (double[name], alone[name], scale)), strict=True):
            np.testing.assert_allclose(a, 2 * b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-6 * c.max(), err_msg=name)
    small.close(together, jax.tree.map(lambda *each: sum(each), *alone.values()), 1e-4)


def test_every_mesh_starts_from_the_same_parameters():
    """Initial parameters are bit-equal on any mesh, in a model with dense, sparse and shared parts."""
    wanted = small.begin(hard(group_rows=2))[1]
    actual = small.create(hard({"data": 2, "fsdp": 2, "expert": 2}, group_rows=2))
    small.equal(actual.parameters, wanted.parameters)
    small.equal(actual.optimizer, wanted.optimizer)
