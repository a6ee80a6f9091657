"""Every router's statistics over valid tokens only, at their ends; tables of labels and of experts that meet; the smooth load."""

import battery
import cases
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.arrays import NOWHERE
from moejax.moe import stats
from moejax.moe.records import Routed
from moejax.moe.routers import ROUTERS

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize("router", ROUTERS)
def test_sums_equal_the_oracles(router):
    """Large logits with all tokens valid: integers exactly, reals to 1e-5. No token: every sum is exactly zero."""
    moe = cases.CONFIGS[cases.first(router)]
    inputs = battery.draw(moe, seed=5)
    scale = 1 if router == "threshold" else 8  # sigmoids of large logits tie in fp32
    large = inputs._replace(logits=scale * inputs.logits, valid=np.ones_like(inputs.valid))
    battery.check_oracle(moe, large)
    result = battery.call(moe, inputs._replace(valid=np.zeros_like(inputs.valid)))
    for name, value in result.sums.items():
        assert not value.any(), name
    assert all(np.isfinite(loss) for loss in result.losses.values())
    sums = battery.call(moe, large).sums
    assert sums["tokens"] == battery.GROUPS * battery.SIZE
    assert sums["requests"].sum() + sums["dropped_width"] == sums["requested"]
    assert sums["load"].sum() == sums["routed"] + sums["rerouted"]


def test_margin_is_zero_where_all_are_chosen():
    moe = cases.CONFIGS["topk-all"]
    assert battery.call(moe, battery.draw(moe)).sums["margin"] == 0


def table(seed=1, groups=3, size=5, k=2, width=4):
    """A Routed of any choices, some without a place, as NumPy and as arrays."""
    rng, shape = np.random.default_rng(seed), (groups, size * k)
    token = np.repeat(np.arange(size), k)[None].repeat(groups, 0)
    expert = rng.integers(0, width, shape)
    slot = np.where(rng.random(shape) < 0.6, 0, NOWHERE)
    asked = slot == 0
    routed = Routed(token, expert, expert, asked, slot, np.zeros((groups, size)), np.zeros((groups, size)), None)
    i32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.int32), routed)
    return routed, i32._replace(asked=jnp.asarray(asked), margin=jnp.zeros((groups, size), jnp.float32))


def test_label_table():
    """Kept assignments by label and expert; dropped ones count nowhere."""
    routed, arrays = table()
    labels = np.random.default_rng(2).integers(0, 3, (3, 5))
    wanted = np.zeros((3, 4), int)
    for g, a in np.argwhere(routed.slot == 0):
        wanted[labels[g, routed.token[g, a]], routed.expert[g, a]] += 1
    np.testing.assert_array_equal(stats.label_table(arrays, jnp.asarray(labels, jnp.int32), 3, 4), wanted)
    assert 0 < wanted.sum() < routed.slot.size


def test_coactivation():
    """Tokens, not assignments: of both experts of a pair, and of the one on the diagonal; a token that has an expert twice counts once."""
    routed, arrays = table()
    wanted = np.zeros((4, 4), int)
    for g in range(3):
        for s in range(5):
            met = {routed.expert[g, a] for a in np.flatnonzero((routed.token[g] == s) & (routed.slot[g] == 0))}
            for x in met:
                for y in met:
                    wanted[x, y] += 1
    np.testing.assert_array_equal(stats.coactivation(arrays, jnp.ones((3, 5), bool), 4), wanted)
    assert np.diag(wanted).sum() < wanted.sum()


@pytest.mark.parametrize("case", ["noisy_topk", "noisy_topk-biased"])
def test_smooth_load_is_the_share_of_fresh_noise_that_is_chosen(case):
    """One token many times over, the noise of one column on a fine grid in each block: how often that column is among the K."""
    biased = {"sign_bias": 0.001, "router_dropout": 0.1} if case.endswith("biased") else {}
    moe = cases.configure("noisy_topk", reroute=False, smooth_load=0.1, **biased)
    one = battery.draw(moe, seed=4)
    logits, spread, noise = one.logits[3, 0], one.spread[3, 0], one.noise[3, 0]
    state = {name: harness.f32(np.arange(v.size) % 3 / 4) for name, v in one.state.items()}
    width, shape = logits.size, one.valid.shape
    fine = one.valid.size
    hidden = None if one.hidden is None else np.broadcast_to(np.arange(width) == width - 1, (*shape, width))
    everywhere = np.ones((*shape, 1), np.float32)
    same = one._replace(
        logits=everywhere * logits, spread=everywhere * spread, noise=everywhere * noise, hidden=hidden, state=state,
        valid=np.ones(shape, bool),
    )  # fmt: skip
    expected = battery.call(moe, same).sums["expected_load"] / fine
    for column in range(width):
        drawn = same.noise.copy()
        drawn[..., column] = (np.arange(fine).reshape(shape) + 0.5) / fine
        chosen = battery.call(moe, same._replace(noise=drawn)).sums["requests"][column] / fine
        assert chosen == pytest.approx(expected[column], abs=2e-3), column
    assert expected.max() > 0.1 and (expected[-1] == 0) == bool(biased)
