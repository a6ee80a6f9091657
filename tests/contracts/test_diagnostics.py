"""Diagnostics of routing: each formula against a loop over its definition, and what was planted is found."""

import math

import numpy as np
import pytest

from moejax.moe import diagnostics
from moejax.report import specialisation

E = 32
OF_LOAD = ("max_violation", "gini", "load_entropy", "effective_experts")


def loads(dtype=np.int32):
    """Skewed loads of five layers over seven experts, the last layer without any; some experts are dead."""
    load = (np.random.default_rng(0).gamma(0.5, 40, (5, 7))).astype(dtype)
    load[1, 2:5] = 0
    load[-1] = 0
    return load


def loop_max_violation(load, targets):
    total = sum(load)
    return max(n / (t * total) - 1 for n, t in zip(load, targets, strict=True)) if total else 0


def loop_gini(load):
    return sum(abs(a - b) for a in load for b in load) / (2 * len(load) * sum(load)) if sum(load) else 0


def loop_entropy(load):
    return -sum(n / sum(load) * math.log(n / sum(load)) for n in load if n)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_load_formulas_against_loops(dtype):
    load = loads(dtype)
    rows = [[float(n) for n in row] for row in load]
    targets = np.random.default_rng(1).dirichlet(np.ones(7))
    expected = {
        "max_violation": [loop_max_violation(row, [1 / 7] * 7) for row in rows],
        "gini": [loop_gini(row) for row in rows],
        "load_entropy": [loop_entropy(row) for row in rows],
        "effective_experts": [math.exp(loop_entropy(row)) for row in rows],
    }
    for name in OF_LOAD:
        found = getattr(diagnostics, name)(load)
        np.testing.assert_allclose(found, expected[name], rtol=1e-12, err_msg=name)
        assert found.dtype == np.float64
    skewed = [loop_max_violation(row, targets) for row in rows]
    np.testing.assert_allclose(diagnostics.max_violation(load, targets), skewed, rtol=1e-12)
    assert diagnostics.dead(load).tolist() == [sum(n == 0 for n in row) for row in rows]


def test_load_formulas_at_their_ends():
    even, one_hot = np.full((1, 8), 5), np.eye(8, dtype=int)[:1] * 40
    ends = {"max_violation": (0, 7), "gini": (0, 7 / 8), "load_entropy": (math.log(8), 0), "effective_experts": (8, 1)}
    for name, (at_even, at_one_hot) in ends.items():
        formula = getattr(diagnostics, name)
        assert formula(even)[0] == pytest.approx(at_even, abs=1e-12), name
        assert formula(one_hot)[0] == pytest.approx(at_one_hot, abs=1e-12), name
    assert (diagnostics.dead(even)[0], diagnostics.dead(one_hot)[0]) == (0, 7)


def test_violation_is_measured_against_the_targets():
    targets = np.array([0.5, 0.25, 0.25, 0.0])
    load = np.array([[20, 10, 10, 0], [10, 10, 20, 0], [20, 10, 10, 500]])
    np.testing.assert_allclose(diagnostics.max_violation(load, targets), [0, 1, 0], atol=1e-15)


def planted_ties(tokens=20_000):
    """Each of 32 labels has an expert of its own, but 2 % of the tokens go anywhere."""
    rng = np.random.default_rng(2)
    own = rng.permutation(E)
    label = rng.integers(0, E, tokens)
    expert = np.where(rng.random(tokens) < 0.02, rng.integers(0, E, tokens), own[label])
    table = np.zeros((E, E), int)
    np.add.at(table, (label, expert), 1)
    return own, table


def test_planted_ties_are_recovered():
    own, table = planted_ties()
    assert 0.95 < diagnostics.normalized_mutual_information(table) < 0.97
    control = diagnostics.shuffled(table)
    np.testing.assert_array_equal(control.sum(axis=1), table.sum(axis=1))
    assert diagnostics.normalized_mutual_information(control) < 0.02
    experts, shares = zip(*diagnostics.tie(table), strict=True)
    assert list(experts) == own.tolist()
    assert min(shares) > 0.95


def test_information_of_a_noisy_channel_in_closed_form():
    """log E less the entropy of (1 - q, q/(E-1), ...), over log E; the same for fractions as for counts."""
    q = 0.25
    channel = np.full((4, 4), q / 3) + (1 - q - q / 3) * np.eye(4)
    lost = -(1 - q) * math.log(1 - q) - q * math.log(q / 3)
    for table in (channel / 4, (1200 * channel).astype(np.int32), (channel / 400).astype(np.float32)):
        found = diagnostics.normalized_mutual_information(table)
        assert found == pytest.approx(1 - lost / math.log(4), rel=1e-6)
    assert specialisation.normalized_information is diagnostics.normalized_mutual_information


def test_tie_is_what_exceeds_chance():
    """Expert 0 takes most of everything; expert 3 has one assignment in all, and so the largest ratio to chance."""
    table = np.array([[60, 38, 1, 1], [60, 2, 38, 0], [0, 0, 0, 0]])
    assert diagnostics.tie(table) == [(1, 0.38), (2, 0.38), (-1, 0.0)]
    assert diagnostics.tie(np.outer([1, 3], [5, 7, 11])) == [(-1, 0.0)] * 2


def choices(tokens=2000):
    """bool [tokens, 8]: 0 is always on, 1 chooses at random, 2 and 5 are duplicates but for 2 %, 3 contains 4, 6 and
    7 are duplicates that are rare."""
    rng = np.random.default_rng(3)
    chosen = rng.random((tokens, 8)) < 0.3
    chosen[:, 0] = True
    chosen[:, 5] = chosen[:, 2] ^ (chosen[:, 2] & (rng.random(tokens) < 0.02))
    chosen[:, 4] = chosen[:, 3] & chosen[:, 1]
    chosen[:, 6:] = (np.arange(tokens) < 31)[:, None]
    return chosen


def test_planted_duplicates_are_found_and_no_others():
    chosen = choices()
    both = chosen.T.astype(int) @ chosen
    load = np.diagonal(both)
    jaccard = (chosen[:, 2] & chosen[:, 5]).sum() / (chosen[:, 2] | chosen[:, 5]).sum()
    assert 0.95 < jaccard < 1
    assert diagnostics.duplicates(both, load) == [(2, 5, pytest.approx(jaccard))]
    assert diagnostics.duplicates(both, load, least=31) == [(6, 7, 1.0), (2, 5, pytest.approx(jaccard))]
    assert diagnostics.duplicates(both, load, threshold=1.0, least=31) == [(6, 7, 1.0)]
    for rare in (2, 5):
        assert diagnostics.duplicates(both, np.where(np.arange(8) == rare, 0, load)) == []


def test_every_overlap_against_a_loop():
    chosen = choices(200)
    expected = {}
    for i in range(8):
        for j in range(i + 1, 8):
            either = sum(a or b for a, b in zip(chosen[:, i], chosen[:, j], strict=True))
            expected[i, j] = sum(a and b for a, b in zip(chosen[:, i], chosen[:, j], strict=True)) / either
    both = chosen.T.astype(np.int32) @ chosen
    found = diagnostics.duplicates(both, np.diagonal(both), threshold=0.0, least=1)
    assert {(i, j): overlap for i, j, overlap in found} == pytest.approx(expected)
    assert [overlap for *_, overlap in found] == sorted(expected.values(), reverse=True)


def test_churn_and_agreement_against_loops():
    rng = np.random.default_rng(4)
    before = rng.integers(-2, 5, (3, 50, 4)).astype(np.int32)
    after = np.where(rng.random(before.shape) < 0.15, rng.integers(-2, 5, before.shape), before).astype(np.int32)
    valid = rng.random(50) < 0.6
    changed, kept = np.zeros((2, 3))
    for layer, token in np.ndindex(3, 50):
        a, b = ({i for i in ids[layer, token].tolist() if i >= 0} for ids in (before, after))
        if valid[token]:
            changed[layer] += a != b
            kept[layer] += len(a & b) / max(len(a), len(b)) if a or b else 1
    np.testing.assert_allclose(diagnostics.churn(before, after, valid), changed / valid.sum())
    np.testing.assert_allclose(diagnostics.agreement(before, after, valid), kept / valid.sum())


def test_sets_have_no_order_and_only_valid_tokens_count():
    before = np.array([[[0, 1], [2, 3], [4, 5], [6, -1], [-1, -1]]])
    after = np.array([[[1, 0], [3, 4], [0, 1], [-7, 6], [-2, -1]]])
    for valid, churn, agreement in (([1, 1, 0, 1, 1], 1 / 4, 3.5 / 4), ([1, 1, 1, 1, 1], 2 / 5, 3.5 / 5)):
        assert diagnostics.churn(before, after, np.array(valid, bool)).tolist() == [churn]
        assert diagnostics.agreement(before, after, np.array(valid, bool)).tolist() == [agreement]


def test_starved_experts_raise_the_alarm_by_layer():
    last_fed = np.array([[90, 80, 99], [100, 100, 100], [-1, 100, 89]], np.int32)
    assert diagnostics.starved(last_fed, step=100, patience=10) == [(0, {0: 91, 1: 81}), (2, {0: 0, 2: 90})]
    assert diagnostics.starved(last_fed, step=100, patience=11) == [(0, {1: 81}), (2, {0: 0, 2: 90})]
    assert diagnostics.starved(last_fed, step=100, patience=102) == []
    assert diagnostics.starved(np.full((1, 1), np.iinfo(np.int32).min, np.int32), 100, 10)[0] == (0, {0: -(2**31) + 1})


@pytest.mark.parametrize("count", [0, 3])
def test_constant_and_empty_inputs_give_finite_numbers(count):
    constant, single = np.full((3, 4), count), np.full((2, 1), count)
    for load in (constant, single, np.zeros((0, 4), int)):
        assert all(np.isfinite(getattr(diagnostics, name)(load)).all() for name in OF_LOAD)
        assert diagnostics.dead(load).tolist() == [0 if count else load.shape[1]] * len(load)
        assert diagnostics.normalized_mutual_information(load) == 0
        assert diagnostics.tie(load) == [(-1, 0.0)] * len(load)
        assert diagnostics.shuffled(load).shape == load.shape
    assert diagnostics.duplicates(np.zeros((4, 4), int), np.zeros(4, int), least=0, threshold=0.1) == []
    ids = np.full((2, count, 2), 1)
    nobody = np.zeros(count, bool)
    assert diagnostics.churn(ids, ids + 1, nobody).tolist() == [0, 0]
    assert diagnostics.agreement(ids, ids + 1, nobody).tolist() == [1, 1]
