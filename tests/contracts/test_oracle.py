"""Who guards the guard: the oracle's gradients against its own finite differences, and its meaning on tiny hand-made cases."""

import dataclasses

import numpy as np
import oracle
import pytest
from oracle import Draws, Spec
from oracle_cases import CASES, problem, routed, run


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_differences(name, seed):
    """Of the task and every balancer at once, noise frozen, in two directions for every array; nothing where invalid."""
    spec, epsilon = CASES[name], 1e-6
    valid, arrays, rest = problem(spec, seed)
    rest["parts"] = [None, oracle.sequences(valid.shape)][seed]
    _, y, sums, gradients = run(valid, arrays, spec, **rest)
    assert set(gradients) == {key for key, a in arrays.items() if a is not None}
    assert sums["requested"] == sums["routed"] + sums["rerouted"] + sums["dropped"] > 0
    assert sums["rerouted"] > 0 or not spec.reroute
    assert not y[~valid].any() and not gradients["x"][~valid].any()
    rng = np.random.default_rng(1)
    for key, gradient in gradients.items():
        assert np.abs(gradient).max() > 0
        for _ in range(2):
            direction = rng.normal(size=gradient.shape)
            ahead, behind = (
                run(valid, arrays | {key: arrays[key] + step * direction}, spec, **rest)[0]
                for step in (epsilon, -epsilon)
            )
            assert (ahead - behind) / (2 * epsilon) == pytest.approx(
                (gradient * direction).sum(), rel=1e-5, abs=1e-7
            ), key


def test_every_router_has_a_case():
    assert {spec.router for spec in CASES.values()} == {*oracle.CHOOSE, "expert_choice", "soft"}
    assert {spec.score for spec in CASES.values()} == set(oracle.SCORES) - {"relu"}


# ---- choices and gates ----------------------------------------------------------------------------------------------


def test_ties_go_to_the_lower_id_and_bias_only_selects():
    routing, sums, table = routed([[1.0, 1, 1, 0]], Spec(4, 2, "topk", "sigmoid"))
    assert table("expert") == [[0, 1]] and sums["margin"] == 0
    routing, sums, table = routed([[1.0, 1, 1, 0]], Spec(4, 2, "topk", "sigmoid", False), bias=[0, 0, 0.5, 0.3])
    one = 1 / (1 + np.exp(-1))
    assert table("expert") == [[2, 3]] and sums["margin"] == pytest.approx(0.5 + 0.3 - one)
    assert routing.gate == pytest.approx([one, 0.5])


def test_scores_by_hand():
    """Two of three, logits log 1, log 2, log 3: every score as a fraction."""
    logits, gate = [np.log([1.0, 2, 3])], {}
    for score in ("softmax", "softmax_after", "sigmoid", "sqrt_softplus"):
        for renormalize in (True, False):
            gate[score, renormalize] = routed(logits, Spec(3, 2, "topk", score, renormalize))[0].gate
    assert gate["softmax", True] == pytest.approx([3 / 5, 2 / 5])
    assert gate["softmax", False] == pytest.approx([3 / 6, 2 / 6])
    assert gate["softmax_after", False] == pytest.approx([3 / 5, 2 / 5])
    assert gate["sigmoid", False] == pytest.approx([3 / 4, 2 / 3])
    assert gate["sigmoid", True] == pytest.approx([9 / 17, 8 / 17])
    assert gate["sqrt_softplus", False] == pytest.approx(np.sqrt(np.log([4, 3])))
    assert routed(logits, Spec(3, 2, "topk", "sigmoid"))[0].distribution[0, 0] == pytest.approx(
        np.array([6, 8, 9]) / 23
    )


def test_gshard_asks_for_the_second_by_chance():
    """Gates 3/4 and 1/4: the second is wanted when 2/4 > u, and always without noise; both gates count it."""
    for uniform, wanted in ((0.4, True), (0.6, False), (None, True)):
        draws = None if uniform is None else Draws(np.full((1, 1, 1), uniform))
        routing, sums, table = routed([np.log([3.0, 1])], Spec(2, 2, "gshard", scale=2.0), draws=draws)
        assert routing.asked.tolist() == [True, wanted] and sums["requested"] == 1 + wanted
        assert routing.gate == pytest.approx([1.5, 0.5])


def test_warm_up_leaves_later_choices_out():
    routing, sums, table = routed([[3.0, 2, 1]], Spec(3, 2, "topk", k_now=1))
    assert table("expert") == [[0, 1]] and routing.asked.tolist() == [True, False]
    assert routing.gate[0] == 1 and table("slot") == [[0, -1]]
    assert sums["margin"] == 1, "of the K-th choice still"


def test_group_limit_and_dropout():
    """Parts (5,0) (3,3) (4,1) (0,0) are worth 5, 6, 5, 0: the second and, of the tie, the first stay. Then the best three."""
    spec = Spec(8, 3, "topk", router_groups=4, groups_kept=2)
    assert routed([[5.0, 0, 3, 3, 4, 1, 0, 0]], spec)[2]("expert") == [[0, 2, 3]]
    assert routed([[5.0, 0, 3, 3, 4, 1, 0, 0]], Spec(8, 3, "topk"))[2]("expert") == [[0, 4, 2]]
    draws = Draws(dropout=np.array([[[0.05, 0.1, 0.9]]]))
    assert routed([[3.0, 2, 1]], Spec(3, 1, "topk", dropout=0.1), draws=draws)[2]("expert") == [[1]]
    assert routed([[3.0, 2, 1]], Spec(3, 1, "topk", dropout=0.1))[2]("expert") == [[0]]


def test_sinkhorn_balances_what_prefers_one():
    """Four tokens prefer expert 0 by 3, 2, 1 and 1/2: the two that least do go to expert 1. An invalid one changes nothing."""
    logits, valid = np.array([[3.0, 0], [2, 0], [1, 0], [0.5, 0], [9, 0]]), np.array([True] * 4 + [False])
    pi = oracle.selection(logits, valid, Spec(2, 1, "topk", sinkhorn=200))
    assert np.exp(pi[:4]).sum(axis=1) == pytest.approx(np.ones(4))
    assert np.exp(pi[:4]).sum(axis=0) == pytest.approx(np.full(2, 2))
    assert pi.argmax(axis=1).tolist() == [0, 0, 1, 1, 0]
    assert routed(logits[:4], Spec(2, 1, "topk", sinkhorn=200))[2]("expert") == [[0], [0], [1], [1]]


def test_top_p():
    """Probabilities .5 .3 .15 .05: mass before the fourth is .95, so top_p .9 wants three, of which one exceeds K = 2."""
    logits = [np.log([0.3, 0.5, 0.05, 0.15])]
    routing, sums, table = routed(logits, Spec(4, 2, "top_p", top_p=0.9, scale=2))
    assert table("expert") == [[1, 0]] and routing.asked.all() and routing.excess.tolist() == [[1]]
    assert routing.gate == pytest.approx([1.0, 0.6]) and sums["margin"] == pytest.approx(np.log(2))
    assert (sums["requested"], sums["routed"], sums["dropped_width"], sums["dropped"]) == (3, 2, 1, 1)
    routing, sums, _ = routed(logits, Spec(4, 2, "top_p", top_p=0.4))
    assert routing.asked.tolist() == [True, False] and sums["margin"] == pytest.approx(np.log(5 / 3))


def test_threshold_and_relu():
    """Scores 1/2 against .4 .6 .2 .5: experts 2 and 0 are candidates. Logits -1 2 0 1/2: experts 1 and 3 are."""
    for k, expert, asked, excess in ((1, [2], [True], 1), (3, [2, 0, 3], [True, True, False], 0)):
        routing, sums, table = routed([[0.0] * 4], Spec(4, k, "threshold"), threshold=np.array([0.4, 0.6, 0.2, 0.5]))
        assert (table("expert"), routing.asked.tolist(), sums["dropped_width"]) == ([expert], asked, excess)
        assert routing.gate == pytest.approx(0.5) and sums["margin"] == 0
    routing, sums, table = routed([[-1, 2, 0.25, 0.5], [-1, -2, -3, -4]], Spec(4, 2, "relu", scale=3))
    assert table("expert")[0] == [1, 3] and routing.asked.tolist() == [True, True, False, False]
    assert routing.gate[:2] == pytest.approx([6, 1.5]) and sums["margin"] == 1.25
    assert (sums["dropped_width"], sums["unserved"], sums["tokens"]) == (1, 1, 2)
    assert routing.distribution[0].tolist() == [pytest.approx(np.array([0, 8, 1, 2]) / 11), [0, 0, 0, 0]]


def test_hash_is_pinned():
    """The mixer against published values of Murmur3; ranks computed once with 32-bit arithmetic."""
    assert [oracle.mix32(n) for n in (0, 1, 2**32 - 1)] == [0, 0x514E28B7, 0x81F16F39]
    assert oracle.hash_ranks(7, 1, 4) == [2205871, 7149658, 6996794, 16490318]
    assert oracle.hash_ranks(65, 3, 4) == [9276599, 9604990, 15064495, 8947245]
    routing, _, table = routed(np.zeros((2, 4)), Spec(4, 2, "hash"), ids=np.array([[65, 7]]), layer=3)
    assert table("expert")[0] == [2, 1] and (routing.gate == 0.5).all()
    by_position = routed(np.zeros((8, 4)), Spec(4, 2, "hash", hash_by="position"), layer=1)[2]("expert")
    assert by_position[7] == [3, 1]


def test_random_and_noise():
    """`random` takes the largest numbers. noisy_topk adds the normal quantile times softplus: at u = 1/2 nothing."""
    draws = Draws(np.array([[[0.2, 0.9, 0.5]]]))
    assert routed([[3.0, 2, 1]], Spec(3, 2, "random"), draws=draws)[2]("expert") == [[1, 2]]
    assert oracle.normal([0.5, 0.8413447460685429]) == pytest.approx([0, 1])
    draws, spread = Draws(np.array([[[0.5, 0.8413447460685429, 0.5]]])), np.full((1, 1, 3), np.log(np.e - 1))
    routing, sums, table = routed([[1.5, 1, 0]], Spec(3, 2, "noisy_topk"), draws=draws, spread=spread)
    assert table("expert") == [[1, 0]] and routing.gate == pytest.approx(oracle.softmax(np.array([2, 1.5])))
    assert sums["margin"] == pytest.approx(1.5)
    assert routed([[1.5, 1, 0]], Spec(3, 2, "noisy_topk"), spread=spread)[2]("expert") == [[0, 1]]


def test_smooth_load_is_a_probability():
    """The share of fresh numbers of one column, on a fine grid, for which that column is among the K best."""
    rng = np.random.default_rng(0)
    spec, (logits, spread, noise) = Spec(4, 2, "noisy_topk"), rng.normal(size=(3, 4))
    for e, p in enumerate(oracle.smooth_load(logits, spread, noise, spec)[0]):
        drawn = np.tile(logits + noise * np.log1p(np.exp(spread)), (2000, 1))
        drawn[:, e] = logits[e] + oracle.normal((np.arange(2000) + 0.5) / 2000) * np.log1p(np.exp(spread[e]))
        assert np.mean([e in np.argsort(-row)[:2] for row in drawn]) == pytest.approx(p, abs=1e-3)


# ---- places ----------------------------------------------------------------------------------------------------------


def test_capacity_is_exact():
    assert oracle.capacity(Spec(4, 2, "topk", factor=1.1), 20) == 11, "22 requests over 2, which floats put above 11"
    assert [oracle.capacity(Spec(4, 2, "topk", factor=f), 3) for f in (0.5, 1.0, 9.0, None)] == [1, 2, 3, 3]
    assert oracle.capacity(Spec(2, 1, "topk", factor=1.0, zero=("zero", "zero")), 8) == 4, "a share of the real experts"


def test_choice_major():
    """One place an expert. The first token wants 0 then 1, the second 1 then 0: by position the first gets both."""
    logits = [[2.0, 1, 0], [1, 2, 0]]
    for order, slots in (("position", [[0, 0], [-1, -1]]), ("choice_major", [[0, -1], [0, -1]])):
        assert routed(logits, Spec(3, 2, "topk", factor=0.75, order=order))[2]("slot") == slots


def test_priority():
    """Three tokens want expert 0's one place: the second and third by most probability, and of the two the earlier."""
    spec = Spec(2, 1, "switch", renormalize=False, factor=0.5)
    for order, slots in (("position", [[0], [-1], [-1]]), ("priority", [[-1], [0], [-1]])):
        assert routed([[1.0, 0], [3, 0], [3, 0]], dataclasses.replace(spec, order=order))[2]("slot") == slots


def test_rerouting():
    """Two places an expert; all three tokens want 0 then 1. The first two fill both.

    The third's first choice goes to 2. Its second may not go there as well, although 2 has room: it is dropped.
    Its gates are normalised over what it ended with: experts 2 and 1.
    """
    routing, sums, table = routed([[3.0, 2, 1]] * 3, Spec(3, 2, "topk", factor=1.0, reroute=True))
    assert table("expert") == [[0, 1], [0, 1], [2, 1]] and table("original") == [[0, 1]] * 3
    assert table("slot") == [[0, 0], [1, 1], [0, -1]]
    assert table("rerouted") == [[False] * 2] * 2 + [[True, False]]
    assert routing.gate[4:] == pytest.approx(oracle.softmax(np.array([1.0, 2])))
    assert [sums[name] for name in ("requested", "routed", "rerouted", "dropped")] == [6, 4, 1, 1]
    assert sums["requests"].tolist() == [3, 3, 0] and sums["load"].tolist() == [2, 2, 1]


def test_rerouting_goes_to_what_is_not_wanted_but_never_to_a_dropped_column():
    """One place an expert, the second choice not wanted yet: who loses 0 may take its own second choice, unless dropped."""
    spec, logits = Spec(3, 2, "topk", factor=0.75, reroute=True, k_now=1, dropout=0.1), [[3.0, 2, 1]] * 2
    assert routed(logits, spec)[2]("expert") == [[0, 1], [1, 1]]
    draws = Draws(dropout=np.array([[[1.0, 1, 1], [1, 0, 0]]]))
    assert routed(logits, spec, draws=draws)[2]("slot") == [[0, -1], [-1, -1]]


def test_b05_rerouting_serves_everybody_where_there_is_room():
    """Two places, five experts, four tokens of two choices: 2 * (5 - 2 + 1) > 2 * (4 - 1)."""
    lost = 0
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=(4, 5)) + [2, 1, 0, 0, 0]
        assert routed(logits, Spec(5, 2, "topk", factor=1.25, reroute=True))[1]["dropped"] == 0
        lost += routed(logits, Spec(5, 2, "topk", factor=1.25))[1]["dropped"]
    assert lost > 0


def test_expert_choice_leaves_a_token_unserved():
    """One place an expert: expert 0 takes the first token, expert 1 the third; the second, whom 0 likes less, gets none."""
    routing, sums, _ = routed([[2.0, 0], [1, 0], [0, 2]], Spec(2, 1, "expert_choice", factor=0.5))
    assert sorted(zip(routing.position, routing.expert, routing.slot, strict=True)) == [(0, 0, 0), (2, 1, 0)]
    assert (sums["requested"], sums["routed"], sums["dropped"], sums["unserved"]) == (2, 2, 0, 1)
    assert routing.gate == pytest.approx(1 / (1 + np.exp(-2)))


# ---- outputs, sums and losses ----------------------------------------------------------------------------------------


def test_dense_by_hand():
    """The sum of p_e expert_e, an expert being (silu(x gate) * x up) down."""
    valid, w, _ = problem(Spec(3, 3, "dense"))
    logits = w["x"] @ w["router"]
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    gate, up = np.moveaxis(np.einsum("btd,edhf->btehf", w["x"], w["gate_up"]), 3, 0)
    outputs = np.einsum("btef,efd->bted", gate / (1 + np.exp(-gate)) * up, w["down"])
    y = np.einsum("bte,bted->btd", p, outputs)
    assert run(valid, w, Spec(3, 3, "dense"))[1][valid] == pytest.approx(y[valid])


def test_zero_computation_columns_by_hand():
    """Gate 3/7 times the first vector, x, nothing, the second vector; twice each, though a real expert has one place."""
    spec = Spec(1, 1, "topk", renormalize=False, factor=0.1, zero=("constant", "identity", "zero", "constant"))
    x, router = np.tile(np.eye(4), (1, 2, 1)), np.log(np.eye(4, 5, k=1) * 2 + 1)
    w = {"x": x, "router": router, "gate_up": np.ones((1, 4, 2, 1)), "down": np.ones((1, 1, 4))}
    w["constant"] = np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    _, y, sums, _ = run(np.ones((1, 8), bool), w, spec)
    each = np.stack([w["constant"][0], x[0, 1], np.zeros(4), w["constant"][1]])
    assert y[0] == pytest.approx(np.tile(3 / 7 * each, (2, 1))) and sums["load"].tolist() == [0, 2, 2, 2, 2]


def test_soft_by_hand():
    """Equal logits: a slot holds the mean of the valid tokens, a token gets the mean of the slots. One token: all hold it."""
    spec = Spec(3, 3, "soft", slots=2)
    _, w, _ = problem(spec)

    def experts(x):
        return np.stack([oracle.expert(x, *pair) for pair in zip(w["gate_up"], w["down"], strict=True)])

    valid = np.array([[True] * 4 + [False] * 2, [False] * 6])
    _, y, sums, _ = run(valid, w | {"router": np.zeros((3, 6))}, spec)
    assert y[valid] == pytest.approx(np.tile(experts(w["x"][0, :4].mean(axis=0)).mean(axis=0), (4, 1)))
    assert (sums["tokens"], sums["requested"], sums["routed"], sums["unserved"]) == (4, 6, 6, 0)
    assert sums["load"].tolist() == [2, 2, 2] and not y[~valid].any()
    valid[0, :3] = False
    share = oracle.softmax(w["x"][0, 3] @ w["router"]).reshape(3, 2).sum(axis=1)
    assert run(valid, w, spec)[1][0, 3] == pytest.approx(share @ experts(w["x"][0, 3]))


def test_sums_by_hand():
    """Equal logits log 2 of four experts, two tokens of which one is valid."""
    logits, spec = np.full((1, 2, 4), np.log(2)), Spec(4, 2, "topk", factor=1.0)
    valid = np.array([[True, False]])
    routing = oracle.route(logits, valid, spec)
    sums = oracle.statistics(logits, valid, routing, spec)
    assert sums["squared_logsumexp"] == pytest.approx(np.log(8) ** 2)
    assert sums["squared_logit"] == pytest.approx(4 * np.log(2) ** 2)
    assert (sums["entropy"], sums["confidence"]) == pytest.approx((np.log(4), 0.25))
    assert sums["importance"].tolist() == [0.5, 0.5, 0, 0] and sums["probability"].tolist() == [0.25] * 4
    assert (sums["tokens"], sums["requested"], sums["unserved"], sums["load"].tolist()) == (1, 2, 0, [1, 1, 0, 0])


def test_load_balance_and_its_parts():
    """Two rows collapse on opposite experts: balanced over both, not over each. A row without a valid token is no part."""
    logits = np.array([[[20.0, 0]] * 3, [[0, 20.0]] * 3, [[20.0, 0]] * 3])
    valid, spec = np.array([[True] * 3, [True] * 3, [False] * 3]), Spec(2, 1, "switch", renormalize=False)
    routing = oracle.route(logits, valid, spec)
    sums = oracle.statistics(logits, valid, routing, spec)
    assert oracle.load_balance(sums) == oracle.load_balance(sums, spec) == pytest.approx(1)
    assert oracle.load_balance_parts(logits, valid, routing, spec, [list(np.ndindex(valid.shape))]) == pytest.approx(1)
    assert oracle.load_balance_parts(logits, valid, routing, spec, oracle.sequences((3, 3))) == pytest.approx(2)
    sums = {"requests": np.array([3, 3, 2]), "probability": np.array([3, 3, 2.0]), "tokens": 8}
    spec = Spec(2, 1, "topk", zero=("zero",), zero_share=0.25)
    assert oracle.targets(spec) == pytest.approx([0.375, 0.375, 0.25])
    assert oracle.load_balance(sums, spec) == pytest.approx(1)
    assert oracle.load_balance(sums) == pytest.approx(3 * (9 + 9 + 4) / 64)
    assert oracle.importance({"importance": np.array([3, 3, 2.0])}, spec) == 0
    assert oracle.importance({"importance": np.array([1.0, 3])}, Spec(2, 1, "topk")) == 0.25
