"""The losses of Jacobs et al. 1991 against NumPy, and the point that the example makes with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest

from moejax import cli
from moejax.errors import UserError
from moejax.moe import jacobs

FILE = "examples/jacobs_1991.py"
N, E, O = 5, 3, 2
BOTH = jacobs.averaged_error, jacobs.competitive_nats


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, E)), rng.normal(size=(N, E, O)), rng.normal(size=(N, O))


def test_values(case):
    logits, outputs, target = case
    p, error = softmax(logits), ((target[:, None] - outputs) ** 2).sum(-1)
    blend = (p[..., None] * outputs).sum(1)
    small = [jnp.asarray(x, jnp.float32) for x in case]
    np.testing.assert_allclose(jacobs.averaged_error(*small), ((target - blend) ** 2).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(
        jacobs.competitive_nats(*small), -np.log((p * np.exp(-error / 2)).sum(-1)), rtol=1e-5, atol=1e-6
    )


def test_slopes_are_the_papers(case):
    """The slope at an expert's output is -2 p_i (d - blend) in eq. 1.1, and -h_i (d - o_i) with the posterior h in eq. 1.3."""
    logits, outputs, target = case
    small = [jnp.asarray(x, jnp.float32) for x in case]
    p, error = softmax(logits), ((target[:, None] - outputs) ** 2).sum(-1)
    blend = (p[..., None] * outputs).sum(1)
    posterior = softmax(np.log(p) - error / 2)
    slope = [jax.grad(lambda o, f=f: f(small[0], o, small[2]).sum())(small[1]) for f in BOTH]
    np.testing.assert_allclose(slope[0], -2 * p[..., None] * (target - blend)[:, None], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(slope[1], -posterior[..., None] * (target[:, None] - outputs), rtol=1e-4, atol=1e-6)


def test_far_targets_stay_finite():
    far = jacobs.competitive_nats(jnp.zeros((1, 2)), jnp.zeros((1, 2, 1)), jnp.full((1, 1), 1e4))
    assert np.isfinite(far).all()


@pytest.fixture
def example():
    """The example as a function of its arguments, and as a module."""
    with pages.script(FILE) as module:

        def run(*arguments):
            cli.parse([FILE, *arguments])
            module.main()

        yield run, module


def test_experts_divide_the_task_where_averaged_errors_do_not(example):
    """Seeds that the example does not show: competing experts solve nearly every subtask alone, averaged ones not half."""
    _, module = example
    solved = {name: 0 for name in module.LOSSES}
    for seed in (100, 101, 102, 103):
        task = module.cases(seed)
        for name, loss in module.LOSSES.items():
            solved[name] += module.outcome(module.train(loss, task, seed, 3000), task).solved
    assert solved["competitive likelihood"] >= 14 and solved["averaged error"] <= 8


def test_the_command_prints_a_row_for_each_loss_and_seed(example, capsys):
    run, module = example
    run("--seeds=3,4", "--steps=20")
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("trained on") and len(rows) == 2 * len(module.LOSSES)


def test_the_command_says_what_is_wrong(example):
    run, _ = example
    with pytest.raises(UserError, match="--seeds=0,x: whole numbers"):
        run("--seeds=0,x")
