"""The exchange of rows: how many rounds and rows it takes, and that its buffer changes nothing but them (B13, B19)."""

import cases
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config
from moejax.errors import ConfigError
from moejax.moe import transport
from moejax.moe.inputs import Mode
from moejax.moe.routers import ROUTERS
from moejax.moe.transport.ragged import slots

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ROWS, DROPLESS = 8, Mode(True, None)


def traffic(p, mesh, moe, shards):
    """From the recorded routing: rows whose expert is on another device, most rows from one device to one, assignments of one."""
    _, kept = harness.run(p, mesh, moe, Mode(True, None, record=True))
    live = (kept.slot != np.iinfo(np.int32).max) & (kept.expert < moe.num_experts)
    groups = live.shape[0]
    here = np.broadcast_to((np.arange(groups) * shards // groups)[:, None], live.shape)
    there = kept.expert // (moe.num_experts // shards)
    pairs = np.zeros((shards, shards), int)
    np.add.at(pairs, (here[live], there[live]), 1)
    return int(pairs.sum() - np.trace(pairs)), int(pairs.max()), int(live.shape[1] * groups // shards)


@pytest.mark.parametrize("buffer", [0.3, 1.25, 8.0])
def test_rows_and_rounds_are_those_of_the_assignment(mesh_of, buffer):
    """Balanced by chance, and all tokens to one expert: as many rounds as the fullest pair of devices needs."""
    moe = cases.configure("topk-plain", orthogonality=0.0, transport="ragged", receive_buffer=buffer)
    p, mesh = harness.problem(moe, seed=7, rows=ROWS), mesh_of(expert=8)
    for q in (p, harness.all_to(p, 5)):
        actual = harness.run(q, mesh, moe, DROPLESS)
        harness.same(actual, harness.expected(q, moe, DROPLESS))
        elsewhere, most, rows = traffic(q, mesh, moe, 8)
        fits = slots(buffer, 8, rows)
        assert actual.traffic["rows_sent"] == elsewhere > 0
        assert actual.traffic["exchanges"] == 8
        assert actual.traffic["rounds"] == 8 * -(-most // fits)
    assert (actual.traffic["rounds"] > 8) == (buffer < 8)


def test_a_useless_buffer_is_refused():
    moe = config.MoE(transport="gather", receive_buffer=2.0)
    with pytest.raises(ConfigError, match="receive_buffer=2.0 is not read by transport=gather"):
        transport.check(moe, ROUTERS["topk"])
    with pytest.raises(ConfigError, match="receive_buffer=0.0: a multiple of the fair share, above 0"):
        transport.check(config.MoE(transport="ragged", receive_buffer=0.0), ROUTERS["topk"])


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """jax.lax.ragged_all_to_all as its documentation defines it, which XLA does not have for CPU; NaN where sizes disagree."""
    told = operand, input_offsets, send_sizes, output_offsets
    every, begin, sizes, into = (jax.lax.all_gather(x, axis_name) for x in told)
    me, rows = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0], dtype=jnp.int32)
    for s in range(every.shape[0]):
        nth = rows - into[s, me]
        theirs = every[s].at[nth + begin[s, me]].get(mode="clip")
        theirs = jnp.where(recv_sizes[s] == sizes[s, me], theirs, jnp.nan)
        output = jnp.where(((nth >= 0) & (nth < sizes[s, me]))[:, None], theirs, output)
    return output


@pytest.mark.parametrize("buffer", [0.3, 8.0])
def test_native_exchange(mesh_of, monkeypatch, buffer):
    """The offsets and sizes that a ragged all-to-all is given bring every row where the padded exchange does."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    moe = cases.configure("topk-plain", orthogonality=0.0, transport="ragged", receive_buffer=buffer, exchange="native")
    p = harness.problem(moe, seed=7, rows=ROWS)
    for q in (p, harness.all_to(p, 5)):
        harness.same(harness.run(q, mesh_of(expert=8), moe, DROPLESS), harness.expected(q, moe, DROPLESS))
