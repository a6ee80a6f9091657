"""Experts forbidden and silenced, in the layer that is meant and exactly; rows read the same on every mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from train import small

from moejax.data import prepare, tokenizer
from moejax.errors import UserError
from moejax.study import forward
from moejax.study.reading import DocumentRows, Reader

DEEP = {"model.first": ("attention+sparse",), "model.repeats": 2, "model.unroll": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = prepare.whole(small.documents(), tmp_path_factory.mktemp("data") / "text", tokenizer.BYTES)
    return DocumentRows(folder, "heldout", small.T)


@functools.cache
def reader(rows, limit=24, **options):
    """Of the untrained model, whose layers choose differently; and its state."""
    built, start = small.begin(small.configure(**options))
    with small.quick():
        return Reader(built, start, rows, limit), start


def changed(state, change):
    """Parameters with one array of the blocks' channel replaced by a function of it."""
    parameters = jax.tree.map(lambda x: x, state.parameters)
    change(parameters["blocks"]["layers"][0]["channel"])
    return dataclasses.replace(state, parameters=parameters)


@pytest.mark.parametrize("layer", range(3))
def test_one_expert_of_one_layer(rows, layer):
    """Layer 0 lies before the blocks. Forbidden, the expert is chosen by nobody there, and as often as others elsewhere; silenced, it is
    chosen as before in its layer and the loss is another."""
    read, state = reader(rows, **DEEP)
    model, base = read.built.config.model, read.read(state)
    expert = int(np.bincount(base.experts[layer].ravel(), minlength=8).argmax())
    without = read.read(state, forward.forbidden(model, layer, expert))
    quiet = read.read(state, forward.silenced(model, layer, expert))
    assert base.experts.shape == (3, len(read.facts.tokens), 2) and (base.experts[layer] == expert).any()
    for other in range(3):
        assert (without.experts[other] == expert).any() == (other != layer)
    np.testing.assert_array_equal(quiet.experts[: layer + 1], base.experts[: layer + 1])
    met = (base.experts[layer] == expert).any(axis=1)
    assert (without.nats != base.nats)[met].mean() > 0.5 and (quiet.nats != base.nats)[met].mean() > 0.5
    np.testing.assert_array_equal(read.nats(state, forward.forbidden(model, layer, expert)), without.nats)


def test_an_expert_that_says_nothing_is_not_missed(rows):
    """Its down projection is zero: silencing it changes no bit. Nothing edited is the model itself."""
    read, state = reader(rows)

    def mute(channel):
        experts = channel["experts"][0]
        keep = (np.arange(8) != 3).astype(np.float32)[None, :, None, None]
        experts["down"] = jax.device_put(np.asarray(experts["down"]) * keep, experts["down"].sharding)

    muted = changed(state, mute)
    base = read.read(muted)
    assert (base.experts == 3).any()
    np.testing.assert_array_equal(read.nats(muted, forward.silenced(read.built.config.model, 0, 3)), base.nats)
    assert (read.nats(state, forward.silenced(read.built.config.model, 0, 3)) == base.nats).all()
    assert (read.read(state).nats != base.nats).any()


ROUTERS = {
    "sigmoid with a bias": {"model.moe.score": "sigmoid", "model.moe.sign_bias": 0.1},
    "relu": {"model.moe.router": "relu", "model.moe.sparsity": 0.01},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_forbidden_is_as_if_it_had_never_been(rows, name):
    """The loss of the last expert forbidden is that of a model with one expert less, gates and all; whatever its selection bias."""
    options = ROUTERS[name]
    read, state = reader(rows, **options)
    if "model.moe.sign_bias" in options:
        bias = np.zeros((1, 8), np.float32)
        bias[0, 7] = 5
        sparse = state.routing["sparse"]
        held = sparse | {"sign_bias": jax.device_put(bias, sparse["sign_bias"].sharding)}
        state = dataclasses.replace(state, routing={"sparse": held})
    fewer, begun = reader(rows, **options | {"model.moe.num_experts": 7})

    def cut(channel):
        own = state.parameters["blocks"]["layers"][0]["channel"]
        put = lambda new, old: jax.device_put(np.asarray(new), old.sharding)  # noqa: E731
        weights = channel["experts"][0]
        channel["experts"][0] = {k: put(own["experts"][0][k][:, :7], w) for k, w in weights.items()}
        channel["router"] = {k: put(own["router"][k][..., :7], w) for k, w in channel["router"].items()}

    rest = {k: v for k, v in state.parameters.items() if k != "blocks"}
    fewer_state = changed(dataclasses.replace(begun, parameters=state.parameters | rest), lambda channel: None)
    fewer_state = changed(fewer_state, cut)
    wanted = fewer.read(fewer_state)
    actual = read.read(state, forward.forbidden(read.built.config.model, 0, 7))
    assert (read.read(state).experts == 7).any() and not (actual.experts == 7).any()
    np.testing.assert_array_equal(np.sort(actual.experts[0]), np.sort(wanted.experts[0]))
    np.testing.assert_allclose(actual.nats, wanted.nats, rtol=0, atol=1e-5)


def test_every_mesh_reads_the_same(rows):
    """Two devices by two by two: choices to the integer, losses to rounding, documents and all other facts exactly; the last batch has
    rows of padding."""
    eight = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}
    one, state = reader(rows, 21)
    many, spread = reader(rows, 21, **eight)
    small.equal(many.facts._asdict(), one.facts._asdict())
    edit = forward.silenced(one.built.config.model, 0, 1)
    for change in (None, edit):
        a, b = one.read(state, change), many.read(spread, change)
        np.testing.assert_array_equal(np.sort(b.experts), np.sort(a.experts))
        np.testing.assert_allclose(b.nats, a.nats, rtol=1e-5)


def test_facts_are_those_of_the_text(rows):
    """Every document once, with its label and its bytes; a document over several rows is one."""
    read, _ = reader(rows, None)
    facts, texts = read.facts, sorted(small.documents(), key=lambda d: d.name)
    assert facts.sizes.tolist() == [len(d.text) for d in texts] == facts.by_document(facts.bytes).tolist()
    assert [rows.label_names[i] for i in facts.document_labels] == [d.label for d in texts]
    starts = facts.tokens[np.flatnonzero(np.diff(facts.documents, prepend=-1))]
    assert (starts == tokenizer.DOCUMENT).all() and len(np.unique(facts.rows[facts.documents == 5])) > 1


GROUPS = {"model.moe.group_rows": 2, "model.moe.capacity_factor": 1.0, "model.moe.top_k": 2}


def test_experts_that_choose_tokens(rows):
    """In groups of two rows: as many choices of every expert as it has places, each at the token that it chose."""
    options = GROUPS | {"model.moe.router": "expert_choice", "model.moe.allow_noncausal": True}
    read, state = reader(rows, **options)
    base = read.read(state)
    load = np.bincount(base.experts[base.experts >= 0], minlength=8)
    assert base.experts.shape[2] == 8 and load.min() > 0.8 * load.max() and 1.5 < load.sum() / len(base.nats) < 2.5
    without = read.read(state, forward.silenced(read.built.config.model, 0, 0))
    met = (base.experts[0] == 0).any(axis=1)
    assert (without.nats != base.nats)[met].mean() > 0.5


def test_what_cannot_be_studied(rows):
    for options, message in (
        ({"model.pattern": ("attention+dense",)}, "no token chooses an expert"),
        ({"model.moe.router": "soft", "model.moe.allow_noncausal": True}, "no token chooses an expert"),
    ):
        with pytest.raises(UserError, match=message):
            reader(rows, **options)
    for moe in ({"model.moe.router": "hash"}, {"model.moe.sinkhorn": 2, "model.moe.allow_noncausal": True}):
        with pytest.raises(UserError, match="none can be forbidden; give --ablate=silenced"):
            forward.require_forbidding(small.configure(**moe).model.moe)
