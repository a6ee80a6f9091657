"""Checkpoints: saved on one mesh and restored on others, bit for bit (B23), as many as asked for, by readable names."""

import dataclasses

import jax
import numpy as np
import pytest
from train import small

from moejax import config
from moejax.checkpoint.manager import Checkpoints, flatten, unflatten

OPTIONS = {
    "model.pattern": ("attention+dense", "attention+sparse"), "model.moe.shared_hidden": 8, "model.moe.sign_bias": 0.1,
    "model.kv_heads": 2, "model.moe.load_balance_overflow": 0.1, "train.clip_spike": 3.0,
}  # fmt: skip
MESHES = [{"expert": 8}, {"fsdp": 2, "expert": 4}, {"data": 8}, {}, {"expert": 2, "tensor": 2, "context": 2}]


def begin(sizes):
    return small.begin(dataclasses.replace(small.configure(**OPTIONS), mesh=config.Mesh(**sizes)))[1]


def filled(state, step):
    """The state with random numbers in every array, moments too, placed as it was."""
    rng = np.random.default_rng(step)

    def draw(x):
        value = rng.normal(size=x.shape) if x.dtype == np.float32 else rng.integers(0, 100, x.shape)
        return jax.device_put(np.asarray(value, x.dtype), x.sharding)

    return jax.tree.map(draw, state)


@pytest.mark.slow
def test_b23_any_mesh_to_any_mesh(tmp_path):
    """B23: parameters, moments, counters, routing state and the spike guard's mean bit-equal after every hop, each placed as the
    new mesh wants it."""
    state = filled(begin(MESHES[0]), 0)
    wanted = small.on_host(state)
    for hop, sizes in enumerate(MESHES[1:] + MESHES[:1], start=1):
        saver = Checkpoints(tmp_path / str(hop), config.Checkpoint())
        saver.save(hop, state)
        saver.close()
        template = begin(sizes)
        reader = Checkpoints(tmp_path / str(hop), config.Checkpoint())
        assert reader.latest() == hop
        state, _ = reader.restore(hop, template)
        reader.close()
        small.equal(state, wanted)
        assert jax.tree.structure(state) == jax.tree.structure(template)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, template)))


def test_keeps_the_newest(tmp_path):
    """Of three saves the last two stay, a step saved twice is saved once, and a fresh folder has none."""
    state = begin({})
    saver = Checkpoints(tmp_path, config.Checkpoint(keep=2))
    assert saver.latest() is None
    for step in (3, 5, 9, 9):
        saver.save(step, filled(state, step))
    saver.close()
    reader = Checkpoints(tmp_path, config.Checkpoint(keep=2))
    assert reader.latest() == 9
    for step in (5, 9):
        small.equal(reader.restore(step, state)[0], filled(state, step))
    with pytest.raises(Exception, match="3"):
        reader.restore(3, state)
    reader.close()


def test_saved_arrays_may_be_donated(tmp_path):
    """A save is of the values at the call, although the arrays are overwritten while it writes."""
    state = filled(begin({}), 1)
    wanted = small.on_host(jax.tree.map(lambda x: x.copy(), state))
    saver = Checkpoints(tmp_path, config.Checkpoint())
    saver.save(1, state)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    saver.close()
    reader = Checkpoints(tmp_path, config.Checkpoint())
    small.equal(reader.restore(1, begin({}))[0], wanted)
    reader.close()


def test_flatten_and_back():
    """Names are readable and unique, and the tree comes back whatever the order of the flat one."""
    state = begin({})
    flat = flatten(state)
    assert len(flat) == len(jax.tree.leaves(state))
    wanted = {"step", "parameters/embedding", "parameters/blocks/layers/1/channel/router/logits"}
    wanted |= {f"routing/sparse/{name}" for name in ("sign_bias", "load_balance_weight", "last_fed")}
    assert wanted <= set(flat), sorted(flat)
    back = unflatten(dict(reversed(flat.items())), state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True))
