"""Likelihoods of given tokens: those of the full softmax, whatever the mesh, the padding and the rows beside them; and questions."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from data import tiny_tokenizer
from train import small

from moejax.checkpoint.manager import Checkpoints
from moejax.data import source, tokenizer
from moejax.data.pipeline import Rows
from moejax.errors import DamagedError, UserError
from moejax.moe.inputs import Mode
from moejax.train import choices, metrics, scoring, state, step
from moejax.train.evaluate import Evaluator
from moejax.train.scoring import Request, Scorer

TIGHT = {"model.moe.capacity_factor": 0.5, "model.repeats": 2}
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}
LENGTHS = (2, 9, 33, 34, 60, 5, 17)


def requests():
    rng = np.random.default_rng(0)
    return [Request(rng.integers(0, 258, n).astype(np.int32), int(rng.integers(1, n))) for n in LENGTHS]


@functools.cache
def scorer(cfg):
    built, start = small.begin(cfg)
    with jax.set_mesh(built.mesh), small.quick():
        return Scorer(built, start), built, start


def score(cfg, asked):
    with small.quick():
        return scorer(cfg)[0](asked)


def plain(cfg, request):
    """-log p of the scored tokens: the one row alone, unpadded, the whole vocabulary's logits in float64."""
    _, built, start = scorer(cfg)
    n = len(request.ids) - 1
    host = scoring._rows_of([request.ids], n)
    with jax.set_mesh(built.mesh):
        run = small.quick_jit(
            lambda s, b: built.model(s.parameters)(b, jax.random.key(7), Mode(False, None), s.routing, s.step)[0]
        )
        hidden = np.asarray(run(start, small.place(host, built.mesh)), np.float64)[0]
    logits = hidden @ np.asarray(start.parameters["unembedding"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(n), request.ids[1:]][request.first - 1 :]


def test_likelihoods_are_those_of_the_full_softmax():
    """Rows of several lengths, with a capacity that would drop in training; each beside what it is alone."""
    cfg, asked = small.configure(**TIGHT), requests()
    found = score(cfg, asked)
    assert [len(nats) for nats in found.nats] == [len(r.ids) - r.first for r in asked]
    for nats, request in zip(found.nats, asked, strict=True):
        np.testing.assert_allclose(nats, plain(cfg, request), rtol=2e-6, atol=2e-6)
    # Lengths of 32 take 4 rows at a time, those of 64 two: (5 of them in 8 rows, 2 in 2).
    assert (found.rows, found.padding_rows) == (7, 3)


@pytest.mark.parametrize("transport", ["scatter", "ragged"])
def test_eight_devices_with_experts_apart(transport):
    cfg, asked = small.configure(**TIGHT, **{"model.moe.transport": "gather"}), requests()
    many = small.configure(**TIGHT, **MESH, **{"model.moe.transport": transport})
    for nats, wanted in zip(score(many, asked).nats, score(cfg, asked).nats, strict=True):
        np.testing.assert_allclose(nats, wanted, rtol=2e-6, atol=2e-6)


def test_pieces_of_positions_and_windows_of_routing():
    """Lengths that a cut of the positions and the windows of groups divide."""
    windows = {"model.moe.group_window": 8, "mesh.context": 2, "mesh.data": 4}
    asked = requests()
    for nats, wanted in zip(
        score(small.configure(**TIGHT, **windows), asked).nats, score(small.configure(**TIGHT), asked).nats, strict=True
    ):
        np.testing.assert_allclose(nats, wanted, rtol=2e-6, atol=2e-6)


def test_neighbours_and_order_change_nothing():
    """Bit for bit: rows of one shape, whatever the rows beside them, in another place."""
    cfg, asked = small.configure(**TIGHT), requests()
    together = score(cfg, asked).nats
    back = score(cfg, asked[::-1]).nats[::-1]
    alone = [score(cfg, [request]).nats[0] for request in asked]
    for one, two, three in zip(together, back, alone, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(
    "options",
    [
        {"model.moe.router": "expert_choice", "model.moe.capacity_factor": 1.0, "model.moe.allow_noncausal": True},
        {"model.moe.router": "random"},
        {"model.moe.sinkhorn": 2, "model.moe.allow_noncausal": True},
    ],
    ids=["expert choice", "random", "sinkhorn"],
)
def test_routers_that_look_beside_are_refused(options):
    built, start = small.begin(small.configure(**options))
    with pytest.raises(
        UserError, match="its likelihood is no property of the text; score a model with a causal router"
    ):
        Scorer(built, start)


def test_requests_that_do_not_fit():
    for request, message in (
        (Request(np.array([256, 1], np.int32), 2), "first=2 of 2 tokens"),
        (Request(np.array([256, 264], np.int32), 1), "ids from 256 to 264: the model has 264"),
    ):
        with pytest.raises(UserError, match=message):
            score(small.configure(**TIGHT), [request])


# ---- questions ----------------------------------------------------------------------------------------------------


def test_scored_is_every_token_that_reaches_into_the_choice(tmp_path):
    """A token that a merge makes of the end of a prompt and the start of a choice counts; what lies before is given."""
    question = choices.Question("x é)", (" the", "\ny"), 0)
    byte, merged = tokenizer.BYTES, tokenizer.of(tiny_tokenizer.folder(tmp_path / "t", "byte level"))
    of_bytes, of_merged = (choices.requests([question], tokens) for tokens in (byte, merged))
    assert [bytes(r.ids[r.first :].tolist()) for r in of_bytes] == [b" the", b"\ny"]
    assert [merged.decode(r.ids[r.first :]) for r in of_merged] == [" the", ")\ny"]
    assert all(r.ids[0] == t.document for r, t in ((of_bytes[0], byte), (of_merged[0], merged)))


def test_accuracy_by_sum_and_by_byte():
    """Of four questions: the sum prefers short choices, the mean per byte does not; errors are those of a sample."""
    ask = lambda answer: choices.Question("p", ("a", "bbbb"), answer)  # noqa: E731
    nats = [np.array(x, np.float32) for x in ([1], [1, 1, 1, 0.9], [1], [1, 2], [2], [1], [1], [9])]
    found = choices.accuracy([ask(1), ask(0), ask(1), ask(0)], nats)
    assert (found["questions"], found["choices"], found["targets"], found["chance"]) == (4, 8, 12, 0.5)
    # by sum: a, a, b, a; per byte: b (3.9 / 4), b (3 / 4), b, a (9 / 4)
    assert found["accuracy"] == 0.75 and found["accuracy_per_byte"] == 0.75
    assert found["accuracy_error"] == pytest.approx(np.sqrt(0.75 * 0.25 / 3))
    single = choices.accuracy([ask(1)], nats[:2])
    assert (single["accuracy"], single["accuracy_per_byte"], single["accuracy_error"]) == (0, 1, None)


GOOD = {"prompt": "p", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"questions:3 is not JSON"),
        ("[]", r"questions:3 has prompt None; it must be text"),
        (json.dumps(GOOD | {"prompt": "\ud800"}), r"questions:3 has prompt"),
        (json.dumps(GOOD | {"choices": ["a"]}), r"questions:3 has choices \['a'\]; they must be two texts or more"),
        (json.dumps(GOOD | {"choices": ["a", ""]}), r"questions:3 has choices"),
        (json.dumps(GOOD | {"answer": 2}), r"questions:3 has answer 2; it must be the index of a choice, from 0 to 1"),
        (json.dumps(GOOD | {"answer": True}), r"questions:3 has answer True"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    file = tmp_path / "questions"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UserError, match=message):
        choices.read(file)
    file.write_text(f"{json.dumps(GOOD | {'id': 7})}\n\n")
    assert choices.read(file) == [choices.Question("p", ("a", "b"), 1)]
    for content in ("", "\n"):
        file.write_text(content)
        with pytest.raises(UserError, match="holds no question"):
            choices.read(file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        choices.read(tmp_path / "nothing")


# ---- part of a checkpoint, and bytes ------------------------------------------------------------------------------


def test_what_a_forward_pass_reads_is_restored_alone(tmp_path):
    """Saved on one device, read onto eight: parameters and routing state, in their shards, and nothing else; held to digests."""
    cfg, many = small.configure(**TIGHT), small.configure(**TIGHT, **MESH)
    _, start = small.begin(cfg)
    saving = Checkpoints(tmp_path / "checkpoints", cfg.checkpoint)
    saving.save(3, start)
    built, _ = small.begin(many)
    template = state.template(built)
    with jax.set_mesh(built.mesh):
        found = saving.restore_part(3, template)
    assert found.optimizer is None and found.guard is None
    small.equal(found.parameters, start.parameters)
    small.equal(found.routing, start.routing)
    where = jax.tree.map(lambda x: x.sharding, found.parameters)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, where, built.shardings))
    wider, _ = small.begin(small.configure(**TIGHT, **{"model.hidden": 24, "model.moe.hidden": 16}))
    with pytest.raises(UserError, match="is of another model or version"):
        saving.restore_part(3, state.template(wider))
    for file in (tmp_path / "checkpoints" / "3").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000 and "ocdbt" in str(file.parent):
            content = file.read_bytes()
            file.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    with pytest.raises(DamagedError):
        Checkpoints(tmp_path / "checkpoints", cfg.checkpoint).restore_part(3, template)
    saving.close()


def test_bits_per_byte_divides_by_the_bytes_of_the_text(tmp_path):
    """With a vocabulary whose tokens are several bytes: nats of all targets over the bytes of the documents, whole and by label."""
    folder = tiny_tokenizer.folder(tmp_path / "tokenizer")
    rows = Rows(small.prepared(tmp_path / "text", tokenizer.of(folder)), "heldout", small.T)
    options = {"data.tokenizer": str(folder), "model.vocab_size": 304, "model.loss_chunk": 304}
    part = source.split(small.documents(), 0.25)["heldout"]
    size = {kind: sum(len(d.text) for d in part if d.label == kind) for kind in ("odd", "even")}
    for more in ({}, MESH | {"train.microbatches": 2}):
        cfg = small.configure(**options, **more)
        built, start = small.begin(cfg)
        with jax.set_mesh(built.mesh), small.quick():
            numbers, sums = Evaluator(built, start, rows).run(start, None, "heldout")
        assert numbers["heldout/bytes"] == sum(size.values()) > numbers["heldout/targets"]
        assert numbers["heldout/bits_per_byte"] == pytest.approx(
            sums["nats"] / sum(size.values()) / np.log(2), rel=1e-12
        )
        nats = dict(zip(rows.label_names, sums["label_nats"], strict=True))
        for label, count in size.items():
            assert numbers[f"heldout/bits_per_byte/{label}"] == pytest.approx(
                nats[label] / count / np.log(2), rel=1e-12
            )


def test_a_training_step_counts_bytes(tmp_path):
    """Microbatches on a mesh: the bytes of the valid targets, and the loss as it was."""
    options = {"data.tokenizer": "a folder", **MESH, "train.microbatches": 2}
    built, start = small.begin(small.configure(**options))
    host = small.arrays(0, rows=16)
    host["bytes"] = np.random.default_rng(1).integers(0, 9, host["tokens"].shape).astype(np.int32)
    with jax.set_mesh(built.mesh), small.quick():
        update = step.make_train_step(built, start)
        _, sums, _ = update(jax.tree.map(lambda x: x.copy(), start), small.place(host, built.mesh))
    numbers = metrics.of_training(metrics.to_host(sums), built.config.model.moe)
    size = int(host["bytes"][host["valid"]].sum())
    assert int(sums["bytes"]) == size
    nats = numbers["train/cross_entropy"] * host["valid"].sum()
    assert numbers["train/bits_per_byte"] == pytest.approx(nats / size / np.log(2), rel=1e-6)
    with jax.set_mesh(built.mesh), small.quick():
        plain_built = dataclasses.replace(built, config=small.configure(**MESH, **{"train.microbatches": 2}))
        del host["bytes"]
        _, plain_sums, _ = step.make_train_step(plain_built, start)(start, small.place(host, built.mesh))
    np.testing.assert_array_equal(sums["parts"]["loss"], plain_sums["parts"]["loss"])
