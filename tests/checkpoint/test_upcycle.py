"""Dense to sparse on real Decoders: the function is the same where the surgery says so and another where it says not; moments go along."""

import numpy as np
import pytest
from checkpoint import operated
from checkpoint.operated import F, dense, sparse

from moejax.checkpoint.surgery import ADAM, restart
from moejax.checkpoint.upcycle import upcycle
from moejax.errors import ConfigError
from moejax.train import guard

SAME = 1e-5

CASES = {
    "copies": (True, {"num_experts": 4, "top_k": 2, "hidden": F}),
    "gates that add up to 2": (True, {"num_experts": 4, "top_k": 2, "hidden": F, "gate_scale": 2.0}),
    "sigmoid": (True, {"num_experts": 4, "top_k": 3, "hidden": F, "score": "sigmoid", "sign_bias": 0.01, "load_balance": 0.0}),
    "softmax after": (True, {"num_experts": 4, "top_k": 2, "hidden": F, "score": "softmax_after"}),
    "biases": (True, {"num_experts": 4, "top_k": 2, "hidden": F, "expert_bias": True}),
    "noisy": (True, {"num_experts": 4, "top_k": 2, "hidden": F, "router": "noisy_topk"}),
    "gshard": (True, {"num_experts": 4, "top_k": 2, "hidden": F, "router": "gshard"}),
    "hash": (True, {"num_experts": 4, "top_k": 2, "hidden": F, "router": "hash"}),
    "every expert": (True, {"num_experts": 4, "top_k": 4, "hidden": F, "router": "dense"}),
    "halves, every expert": (True, {"num_experts": 4, "top_k": 4, "hidden": F // 2, "router": "dense"}),
    "halves": (True, {"num_experts": 8, "top_k": 2, "hidden": F // 2}),
    "thirds, two copies chosen": (True, {"num_experts": 9, "top_k": 6, "hidden": F // 3, "gate_scale": 2.5}),
    "halves, sigmoid": (True, {"num_experts": 8, "top_k": 2, "hidden": F // 2, "score": "sigmoid"}),
    "halves of gshard": (True, {"num_experts": 8, "top_k": 2, "hidden": F // 2, "router": "gshard"}),
    "one whole": (True, {"num_experts": 2, "top_k": 2, "hidden": F // 2}),
    "switch": (False, {"num_experts": 4, "top_k": 1, "hidden": F, "router": "switch"}),
    "probabilities": (False, {"num_experts": 4, "top_k": 2, "hidden": F, "renormalize": False}),
    "independent gates": (False, {"num_experts": 4, "top_k": 2, "hidden": F, "score": "sigmoid", "renormalize": False}),
    "half of a copy": (False, {"num_experts": 8, "top_k": 3, "hidden": F // 2}),
    "halves by hash": (False, {"num_experts": 8, "top_k": 2, "hidden": F // 2, "router": "hash"}),
    "halves in groups": (
        False,
        {"num_experts": 8, "top_k": 2, "hidden": F // 4, "router_groups": 4, "router_groups_kept": 2},
    ),
    "a shared expert": (False, {"num_experts": 4, "top_k": 2, "hidden": F, "shared_hidden": 8}),
    "zero experts": (False, {"num_experts": 4, "top_k": 2, "hidden": F, "zero_experts": ("zero",)}),
    "top p": (False, {"num_experts": 4, "top_k": 2, "hidden": F, "router": "top_p"}),
    "threshold": (False, {"num_experts": 4, "top_k": 2, "hidden": F, "router": "threshold"}),
}  # fmt: skip


QUICK = ("copies", "thirds, two copies chosen", "switch")
"""Each case compiles a model: the others are left to the slow tests."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_function_at_step_0(name):
    """Logits of the new model are those of the dense one to 1e-5 where declared, and are not where not."""
    preserves, moe = CASES[name]
    source, target = dense(), sparse(**moe)
    surgery = upcycle(source.model, target.model)
    assert surgery.preserves is preserves, surgery.why
    apart, _, _ = operated.moved(source, target, surgery)
    assert (apart < SAME) is preserves, (apart, surgery.why)


def test_noise_tells_copies_apart():
    """With noise experts differ, by as much as asked, and the function is no longer promised."""
    source, target = dense(), sparse(num_experts=4, top_k=2, hidden=F)
    surgery = upcycle(source.model, target.model, noise=0.1, seed=3)
    assert not surgery.preserves
    apart, before, after = operated.moved(source, target, surgery)
    assert SAME < apart < 1
    up = after["parameters/blocks/layers/0/channel/experts/0/up"]
    old = before["parameters/blocks/layers/0/channel/mlp/gate_up"][:, :, 1]
    assert np.std(up - old[:, None]) == pytest.approx(0.1 * np.std(old), rel=0.1)
    assert (up[:, 0] != up[:, 1]).all()
    mu = after[f"{ADAM}/mu/blocks/layers/0/channel/experts/0/up"]
    assert (mu[:, 0] == mu[:, 1]).all()


def test_moments_go_along():
    """Moments are cut and copied like their weights, divided where weights were multiplied; the router's begin at 0; the count that
    corrects their bias stays, schedule and steps begin anew."""
    source, target = dense(), sparse(num_experts=8, top_k=2, hidden=F // 2, gate_scale=4.0, sign_bias=0.1)
    _, before, after = operated.moved(source, target, upcycle(source.model, target.model))
    factor = 2 / 4.0
    channel = "blocks/layers/0/channel"
    for root, power in (("parameters", 1), (f"{ADAM}/mu", -1), (f"{ADAM}/nu", -2)):
        gate_up, down = (before[f"{root}/{channel}/mlp/{name}"] for name in ("gate_up", "down"))
        for e in range(8):
            part = slice(F // 2 * (e % 2), F // 2 * (e % 2 + 1))
            gate, up, own = (after[f"{root}/{channel}/experts/0/{name}"][:, e] for name in ("gate", "up", "down"))
            np.testing.assert_array_equal(gate, gate_up[:, :, 0, part])
            np.testing.assert_array_equal(up, gate_up[:, :, 1, part])
            np.testing.assert_allclose(own, down[:, part] * np.float32(factor**power), rtol=1e-6)
        embedding = f"{root}/embedding"
        np.testing.assert_array_equal(after[embedding], before[embedding])
    assert not after[f"{ADAM}/mu/{channel}/router/logits"].any()
    router = after[f"parameters/{channel}/router/logits"]
    assert (router[..., ::2] == router[..., 1::2]).all() and (router[..., 0] != router[..., 2]).all()
    assert after[f"{ADAM}/count"] == before[f"{ADAM}/count"] == 50
    assert after["optimizer/1/2/count"] == after["step"] == 0
    assert not after["routing/sparse/sign_bias"].any() and not after["routing/sparse/last_fed"].any()


def test_without_moments_the_optimiser_begins_anew():
    source, target = dense(), sparse(num_experts=4, top_k=2, hidden=F)
    _, _, after = operated.moved(source, target, upcycle(source.model, target.model, moments=False))
    assert not any(after[path].any() for path in after if path.startswith("optimizer/"))


def test_restart_keeps_the_model():
    """The same function, moments kept, steps at 0."""
    source = sparse(num_experts=4, sign_bias=0.1)
    surgery = restart(source.model, source.model)
    apart, before, after = operated.moved(source, source, surgery)
    assert surgery.preserves and apart == 0
    differ = {path for path in after if (after[path] != before[path]).any()}
    begun = {"step", "optimizer/1/2/count", "routing/sparse/last_fed", *(f"guard/{name}" for name in guard.init())}
    assert differ == begun


REFUSED = {
    "another width": ({"model.width": 32}, "model.width as it is: 16"),
    "another rope": ({"model.rope_theta": 5e5}, "model.rope_theta"),
    "hidden that does not divide": ({"model.moe.hidden": 7}, "model.moe.hidden=24"),
    "experts that are no copies": ({"model.moe.hidden": F // 3}, "whole copies"),
    "another activation": ({"model.moe.hidden": F, "model.moe.activation": "relu"}, "activation=swiglu (relu)"),
    "no sparse layer": ({"model.pattern": ("attention+dense",)}, "make some of them sparse"),
    "another depth": ({"model.pattern": ("attention+sparse",) * 2}, "layer by layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """One line with values and remedy."""
    from train import small

    options, words = REFUSED[name]
    target = small.configure(**(operated.SPARSE | {"model.moe.num_experts": 8} | options))
    with pytest.raises(ConfigError) as caught:
        upcycle(dense().model, target.model)
    assert words in str(caught.value)
