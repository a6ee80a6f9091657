"""Evaluation: dropless unless asked, over every held-out target once, whatever the batch and the mesh (B20)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import small

from moejax.data.pipeline import Rows
from moejax.moe import noise
from moejax.moe.inputs import Mode
from moejax.train.evaluate import Evaluator

TIGHT = {"model.moe.capacity_factor": 0.5}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return Rows(small.prepared(tmp_path_factory.mktemp("data") / "text"), "heldout", small.T)


@functools.cache
def evaluator(cfg, rows):
    built, start = small.begin(cfg)
    with jax.set_mesh(built.mesh), small.quick():
        return Evaluator(built, start, rows), built, start


def evaluate(cfg, rows, limit=None):
    """Numbers and sums of the untrained model."""
    found, built, start = evaluator(cfg, rows)
    with jax.set_mesh(built.mesh):
        return found.run(start, limit, "eval")


@pytest.mark.parametrize("transport", ["scatter", "einsum", "gather"])
def test_b20_dropless_by_default(rows, transport):
    """B20: no drops at evaluation although training, on as many tokens, drops; every transport has the same loss."""
    cfg = small.configure(**TIGHT | {"model.moe.transport": transport})
    numbers, sums = evaluate(cfg, rows)
    assert numbers["eval/moe/drop_rate"] == 0 and sums["layers"]["sparse"]["dropped"].sum() == 0
    assert not [name for name in numbers if name.startswith("eval_capacity")]
    assert numbers["eval/loss"] == pytest.approx(evaluate(small.configure(**TIGHT), rows)[0]["eval/loss"], rel=1e-6)
    if transport == "scatter":
        assert small.trace(cfg, [small.arrays(0)]).numbers[0]["moe/drop_rate"] > 0.2


def test_b20_both_losses_with_a_capacity(rows):
    """B20: with eval_capacity_factor the dropless loss and the one with drops are both there, and differ."""
    numbers, _ = evaluate(small.configure(**{"model.moe.eval_capacity_factor": 0.5}), rows)
    assert numbers["eval/moe/drop_rate"] == 0 and numbers["eval_capacity/moe/drop_rate"] > 0.2
    assert (
        numbers["eval/loss"] != numbers["eval_capacity/loss"]
        and numbers["eval/targets"] == numbers["eval_capacity/targets"]
    )


def test_the_mean_of_all_targets(rows):
    """The loss is NumPy's mean over every valid held-out target, by label too; the last batch's padding does not count."""
    cfg = small.configure()
    assert len(rows) % cfg.data.batch, "the last batch should have padding"
    numbers, _ = evaluate(cfg, rows)
    built, start = small.begin(cfg)
    mode, host = Mode(False, None), [rows[i] for i in range(len(rows))]
    padded = -(-len(host) // 8) * 8
    whole = {k: np.stack([r[k] for r in host] + [rows.blank()[k]] * (padded - len(host))) for k in host[0]}
    whole |= {"row_ids": np.arange(padded, dtype=np.int32)}
    with jax.set_mesh(built.mesh):
        key = noise.step_key(0, jnp.int32(0))
        run = small.quick_jit(lambda s, b: built.model(s.parameters)(b, key, mode, s.routing, s.step)[0])
        hidden = np.asarray(run(start, small.place(whole, built.mesh)), np.float64)[: len(host)]
    logits = hidden @ np.asarray(start.parameters["unembedding"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, whole["targets"][: len(host), :, None], -1)[..., 0]
    valid, labels = whole["valid"][: len(host)], whole["labels"][: len(host)]
    assert numbers["eval/targets"] == valid.sum() > 500
    assert numbers["eval/loss"] == pytest.approx(nats[valid].mean(), rel=1e-6)
    assert numbers["eval/bits_per_byte"] == pytest.approx(nats[valid].mean() / np.log(2), rel=1e-6)
    for i, name in enumerate(rows.label_names):
        assert numbers[f"eval/bits_per_byte/{name}"] == pytest.approx(
            nats[valid & (labels == i)].mean() / np.log(2), rel=1e-6
        )


@pytest.mark.parametrize(
    "options",
    [{"data.batch": 5}, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2, "train.microbatches": 2}],
    ids=["batch 5", "eight devices"],
)
def test_batch_and_mesh_change_nothing(rows, options):
    """B1 of the evaluation: counts exactly, with tables of labels against experts; losses to 1e-6."""
    (wanted, sums), (actual, sums_) = evaluate(small.configure(), rows), evaluate(small.configure(**options), rows)
    small.close(small.without_traffic(sums_), sums, 1e-6)
    actual = {key: value for key, value in actual.items() if key.removeprefix("eval/") not in small.TRAFFIC_NUMBERS}
    small.close(actual, wanted, 1e-6)
    assert sums["layers"]["sparse"]["labels"].sum() == sums["layers"]["sparse"]["routed"].sum()


MESHES = [{}, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2, "train.microbatches": 2}]


def probe(rows, **options):
    found, built, start = evaluator(small.configure(**options), rows)
    with jax.set_mesh(built.mesh):
        return found.probe(start)


def test_the_probe_is_the_same_rows_on_every_mesh(rows):
    """The first `data.batch` rows, five here, although eight devices take sixteen: their experts, token by token."""
    one, many = (probe(rows, **{"data.batch": 5} | mesh) for mesh in MESHES)
    small.equal(many, one)
    assert one["experts"].shape == (1, 5 * small.T, 2) and one["experts"].dtype == np.int32
    np.testing.assert_array_equal(one["valid"], np.stack([rows[i]["valid"] for i in range(5)]).ravel())
    assert (np.sort(one["experts"][0], axis=1)[one["valid"]][:, 0] >= 0).all()
    assert (one["experts"][:, ~one["valid"]] == -1).all() and not one["valid"].all()


def test_the_probe_lies_in_groups(rows):
    """Groups of two rows: validity and choices are of the same tokens; a token without choices is valid nevertheless."""
    found = probe(rows, **{"model.moe.group_rows": 2, "model.moe.router": "threshold", "model.moe.top_k": 1})
    rows_valid = np.stack([rows[i]["valid"] for i in range(8)])
    np.testing.assert_array_equal(found["valid"], rows_valid.reshape(4, 2, -1).swapaxes(1, 2).ravel())
    empty = (found["experts"][0] < 0).all(axis=1)
    assert empty[~found["valid"]].all() and not empty[found["valid"]].all()


def test_no_probe_where_tokens_do_not_choose(rows):
    """Experts that choose tokens, and dense models, have none."""
    choice = {"model.moe.router": "expert_choice", "model.moe.capacity_factor": 1.0, "model.moe.allow_noncausal": True}
    assert probe(rows, **choice) == {} == probe(rows, **{"model.pattern": ("attention+dense",)})


def test_a_limit_reads_fewer_rows(rows):
    """A limit reads that many rows, evenly spaced."""
    numbers, _ = evaluate(small.configure(), rows, 3)
    chosen = [rows[i * len(rows) // 3] for i in range(3)]
    assert numbers["eval/targets"] == sum(r["valid"].sum() for r in chosen)
