"""How alike experts are, what they are good for and which choices were made before, on made-up numbers with known answers."""

import numpy as np
import pytest
from train import small

from moejax.study import ablation, chance, saturation, similarity

WIDTH, HIDDEN = 6, 5


def channel(rng, experts=4, hidden=HIDDEN, **extra):
    shapes = {"gate": (WIDTH, hidden), "up": (WIDTH, hidden), "down": (hidden, WIDTH)}
    return {"experts": {0: {k: rng.normal(size=(experts, *s)).astype(np.float32) for k, s in shapes.items()}}, **extra}


def test_experts_in_another_order_are_the_same():
    """Expert 1 is expert 0 with its hidden units in another order, expert 3 is twice expert 2: twins by outputs and by weights, where
    the plain cosine of weights sees no likeness in the first pair."""
    rng = np.random.default_rng(0)
    own = channel(rng)
    weights, order = own["experts"][0], np.roll(np.arange(HIDDEN), 2)
    weights["gate"][1], weights["up"][1] = weights["gate"][0][:, order], weights["up"][0][:, order]
    weights["down"][1] = weights["down"][0][order]
    weights["gate"][3], weights["up"][3], weights["down"][3] = (
        weights["gate"][2],
        weights["up"][2],
        2 * weights["down"][2],
    )
    moe = small.configure().model.moe
    x = rng.normal(size=(50, WIDTH)).astype(np.float32)
    outputs = similarity.outputs(own, x, moe)
    for cosine in (similarity.by_outputs(outputs), similarity.by_weights(own)):
        assert [pair[:2] for pair in sorted(similarity.twins(cosine, 0.999))] == [(0, 1), (2, 3)]
        assert (
            np.allclose(cosine, cosine.T) and np.allclose(cosine.diagonal(), 1) and len(similarity.apart(cosine)) == 6
        )
        assert abs(cosine[0, 2]) < 0.5
    flat = weights["up"][:2].reshape(2, -1)
    assert flat[0] @ flat[1] / np.square(flat[0]).sum() < 0.5
    silu = x @ weights["gate"][2] / (1 + np.exp(-x @ weights["gate"][2]))
    np.testing.assert_allclose(outputs[2], silu * (x @ weights["up"][2]) @ weights["down"][2], rtol=1e-4, atol=1e-4)


def test_widths_latents_and_silence():
    """Experts of two widths are compared, through the projection into a latent width; one that says nothing is like no other."""
    rng = np.random.default_rng(1)
    own = channel(rng, 2, into=rng.normal(size=(3, WIDTH)).astype(np.float32))
    own["experts"][1] = channel(rng, 2, 3)["experts"][0]
    narrow, wide = own["experts"][1], own["experts"][0]
    for name in ("gate", "up"):
        wide[name][1] = np.concatenate([narrow[name][0], np.zeros((WIDTH, 2))], axis=1)
    wide["down"][1, :3] = narrow["down"][0]
    narrow["down"][1] = 0
    moe = small.configure(**{"model.moe.hidden_classes": (HIDDEN, 3)}).model.moe
    outputs = similarity.outputs(own, rng.normal(size=(20, 3)).astype(np.float32), moe)
    for cosine in (similarity.by_outputs(outputs), similarity.by_weights(own)):
        assert similarity.twins(cosine)[0][:2] == (1, 2) and not cosine[3].any()


def test_layers_in_order_of_depth():
    cfg = small.configure(**{"model.first": ("attention+sparse",), "model.repeats": 2, "model.unroll": 2})
    _, start = small.begin(cfg)
    found = similarity.of_layers(start.parameters, cfg.model)
    blocks = np.asarray(start.parameters["blocks"]["layers"][0]["channel"]["experts"][0]["up"])
    wanted = [np.asarray(start.parameters["first"][0]["channel"]["experts"][0]["up"]), *blocks]
    assert len(found) == 3
    for own, up in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(own["experts"][0]["up"], up)


def test_effects_of_removals():
    """Thirty documents of three labels, one of them without text: removal 1 costs the first label 0.1 nats per byte in every document,
    removal 2 either sign; only the first is shown, and its interval holds 0.1."""
    rng = np.random.default_rng(0)
    labels, sizes = np.arange(30) % 2, rng.integers(50, 500, 30)
    base = rng.normal(2, 1, 30) * sizes
    costs = np.stack([base, base + np.where(labels == 0, 0.1 + 0.02 * rng.normal(size=30), 0) * sizes])
    costs = np.concatenate([costs, base + rng.normal(size=(1, 30)) * 0.05 * sizes])
    found = ablation.effects(costs, base, sizes, labels, 3)
    assert found["effect"].shape == (3, 3) and np.isnan(found["effect"][:, 2]).all() and (found["p"][:, 2] == 1).all()
    assert (found["p"] <= chance.LEVEL).tolist() == [[False] * 3, [True, False, False], [False] * 3]
    assert found["low"][1, 0] < 0.1 < found["high"][1, 0] and found["effect"][1, 0] == pytest.approx(0.1, abs=0.02)
    assert (found["effect"][0, :2] == 0).all() and (found["low"][0, :2] == 0).all() and found["effect"][1, 1] == 0


def test_removals_go_layer_by_layer():
    asked = ablation.removed(lambda layer, expert: np.array([layer, expert], np.float64), 2, 3)
    assert asked.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_choices_made_before():
    """Kept by hand, in one layer five of eight, in the other all; chance from the loads; documents weigh by their tokens."""
    of = np.array([0, 0, 0, 1])
    before = np.array([[[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 1]] * 4])
    after = np.array([[[1, 0], [0, 2], [0, 1], [3, 2]], [[1, 0]] * 4])
    drawn = chance.weights(np.array([0, 0]), 200, np.random.default_rng(0))
    found = saturation.kept(before, after, of, drawn, 4)
    assert found["kept"].tolist() == [0.625, 1.0] and found["low"][1] == found["high"][1] == 1
    assert 0 <= found["low"][0] < 0.625 < found["high"][0] <= 1
    # Loads of layer 0, by expert: before 2, 2, 2, 2 of 4 tokens; after 3, 2, 2, 1.
    assert found["chance"].tolist() == [0.5 * (0.75 + 0.5 + 0.5 + 0.25) / 2, 1.0]
