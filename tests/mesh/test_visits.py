"""Group-limited routing bounds the devices that a token visits, and the bound is measured."""

import cases
import harness
import numpy as np
import pytest

from moejax import config
from moejax.arrays import NOWHERE
from moejax.errors import ConfigError
from moejax.moe import visits
from moejax.moe.inputs import Mode

pytestmark = pytest.mark.usefixtures("strict_dtypes")

DEVICES, E, K = 4, 16, 4
LIMITS = [(1, 1), (4, 2), (2, 1), (8, 4)]
"""Groups and how many of them a token keeps: none, as many as devices, two devices each, two on a device."""


def by_hand(kept, shape, experts, devices):
    """Tokens by the number of different devices among their kept assignments."""
    expert, slot = (a.reshape(*shape, K) for a in (kept.expert, kept.slot))
    number = [
        len({e * devices // experts for e, s in zip(expert[m], slot[m], strict=True) if s != NOWHERE})
        for m in np.ndindex(shape)
    ]
    return np.bincount(number, minlength=min(K, devices) + 1)


@pytest.mark.parametrize(("groups", "kept"), LIMITS)
@pytest.mark.parametrize("transport", ["scatter", "ragged"])
def test_visits_are_counted_and_bounded(mesh_of, groups, kept, transport):
    """Exactly as counted from the recorded routing, with drops; never past the bound, which a router without groups passes."""
    moe = cases.configure(
        "topk-plain",
        num_experts=E,
        top_k=K,
        router_groups=groups,
        router_groups_kept=kept,
        transport=transport,
        orthogonality=0.0,
    )
    p, mode = harness.problem(moe, seed=7, rows=8), Mode(True, 1.0, record=True)
    actual, recorded = harness.run(p, mesh_of(expert=DEVICES), moe, mode)
    found = actual.traffic["visits"]
    np.testing.assert_array_equal(found, by_hand(recorded, p.valid.shape, E, DEVICES))
    bound = visits.bound(moe, DEVICES)
    assert not found[bound + 1 :].any() and found[bound] > 0
    assert (bound == min(K, DEVICES)) == (groups in (1, 8))


def test_visits_where_positions_are_cut(mesh_of):
    """Each device counts its own tokens: together all of them."""
    moe = cases.configure("topk-plain", num_experts=E, top_k=K, transport="ragged", tensor="experts", orthogonality=0.0)
    p, mode = harness.problem(moe, seed=7, rows=8), Mode(True, 1.0, record=True)
    actual, recorded = harness.run(p, mesh_of(expert=2, tensor=2, context=2), moe, mode)
    np.testing.assert_array_equal(actual.traffic["visits"], by_hand(recorded, p.valid.shape, E, DEVICES))


def test_groups_that_are_no_devices_are_refused():
    moe = config.MoE(num_experts=24, router_groups=6, router_groups_kept=2)
    visits.check(moe, 3, "mesh.expert=3")
    with pytest.raises(ConfigError, match=r"router_groups=6 with mesh.expert=4: .* a divisor or a multiple of 4"):
        visits.check(moe, 4, "mesh.expert=4")
    wide = config.MoE(num_experts=24, router_groups=4, router_groups_kept=2, hidden_classes=(4, 8))
    visits.check(wide, 1, "mesh.expert=1")
    with pytest.raises(ConfigError, match="hidden_classes"):
        visits.check(wide, 4, "mesh.expert=4")
