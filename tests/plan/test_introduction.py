"""The numbers that introductions print, judged: the usual ones of 70B dense against 400B sparse, each with its verdict."""

import json

import pytest
from plan.test_published import load

from moejax import config
from moejax.errors import UserError
from moejax.plan import account, hardware, introduction, serving
from moejax.plan.introduction import Copies, Model
from moejax.train.check import check

CHIP = hardware.CHIPS["h100"]


@pytest.fixture(scope="module")
def counted():
    return {name: account.of_tree(load(name)) for name in ("dense_70b", "sparse_400b", "mixtral_8x7b")}


@pytest.fixture(scope="module")
def compared(counted):
    one = Model("dense", counted["dense_70b"], 70e9, 70e9)
    other = Model("sparse", counted["sparse_400b"], 400e9, 40e9)
    return introduction.compare(one, other, CHIP, copies=[Copies("8x7B", counted["mixtral_8x7b"], 8, 7e9)])


def test_the_two_configs_have_the_sizes_of_their_names(counted):
    """Llama 3 70B is published with 70.6 billion parameters (model card)."""
    dense, sparse = counted["dense_70b"], counted["sparse_400b"]
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert dense.total_parameters == 2 * 128256 * 8192 + 80 * layer + 8192 == 70_553_706_496
    assert dense.active_parameters["A"] == dense.total_parameters
    assert sparse.total_parameters == pytest.approx(400e9, rel=0.01)
    assert sparse.active_parameters["A"] == pytest.approx(40e9, rel=0.02)


@pytest.mark.parametrize("name", ["dense_70b", "sparse_400b"])
def test_both_may_be_trained(name):
    check(config.resolve(load(name)))


def test_printed_numbers_and_verdicts(compared):
    """Arithmetic and size are printed rightly; what follows for serving is right for one sequence and wrong for 128."""
    found = {claim.claim: (claim.printed, claim.verdict) for claim in compared.claims}
    assert found == {
        "dense: FLOPs per token": (140, "right"), "sparse: FLOPs per token": (80, "right"),
        "sparse needs so many times fewer FLOPs": (1.75, "right"),
        "dense: weights in 16 bits": (140, "right"), "sparse: weights in 16 bits": (800, "right"),
        "dense: h100 chips to serve batch 1": (2, "right"), "dense: h100 chips to serve batch 128": (2, "wrong"),
        "sparse: h100 chips to serve batch 1": (10, "right"), "sparse: h100 chips to serve batch 128": (10, "wrong"),
        "sparse needs memory for its active parameters": (80, "wrong"),
        "sparse reads its active weights each step, batch 1": (80, "right"),
        "sparse reads its active weights each step, batch 128": (80, "wrong"),
        "sparse reads its active weights per token, batch 128": (80, "wrong"),
        "sparse decodes so many times faster, batch 1": (1.75, "right"),
        "sparse decodes so many times faster, batch 128": (1.75, "wrong"),
        "sparse decodes so many times faster, batch 181": (1.75, "wrong"),
        "sparse makes tokens so many times cheaper, batch 128": (1.75, "wrong"),
        "8x7B: parameters in all": (56, "wrong"),
    }  # fmt: skip


def test_computed_numbers_are_those_of_the_accounts(compared, counted):
    found = {claim.claim: claim.computed for claim in compared.claims}
    dense, sparse = counted["dense_70b"], counted["sparse_400b"]
    assert found["dense: FLOPs per token"] == account.decoding_flops(dense, 4096) / 1e9
    assert found["sparse needs memory for its active parameters"] == 2 * sparse.total_parameters / 1e9
    assert found["8x7B: parameters in all"] == pytest.approx(46.7, abs=0.01)
    scale = 128 * 3 * 7168 * 2048 * 68 * 2
    step = serving.read(sparse, introduction.USUAL, 128)
    assert step.experts == pytest.approx(scale * (1 - (15 / 16) ** 128))
    assert found["sparse reads its active weights per token, batch 128"] == pytest.approx(
        (step.dense + step.experts) / 128e9
    )
    bytes_read = sum(serving.read(dense, introduction.USUAL, 128)), sum(step)
    for claim in ("decodes so many times faster", "makes tokens so many times cheaper"):
        assert found[f"sparse {claim}, batch 128"] == pytest.approx(bytes_read[0] / bytes_read[1])


def test_the_verdict_allows_for_rounding():
    close = introduction.Claim("one", "GB", 109.0, 100.0, "")
    assert (
        close.verdict == "right"
        and close._replace(printed=111.0).verdict == close._replace(printed=89.0).verdict == "wrong"
    )


def test_any_two_models_can_be_compared(counted):
    """Called by their sizes, rounded to two digits."""
    found = introduction.compare(
        introduction.model("one", counted["dense_70b"]), introduction.model("other", counted["mixtral_8x7b"]), CHIP
    )
    assert (found.sparse.total, found.sparse.active) == (47e9, 13e9)
    assert json.loads(json.dumps(found.to_dict()))["claims"][0]["printed"] == 142


def test_the_table_has_every_claim_its_reason_and_what_is_assumed(compared):
    text = introduction.table(compared)
    for claim in compared.claims:
        assert claim.claim in text and claim.why in text
    assert all(line in text for line in serving.ASSUMED) and "13 chips" in text and "right is within 10%" in text
    assert max(len(line) for line in text.splitlines()) <= 140


def test_sides_are_not_exchanged(counted):
    one, other = (introduction.model(name, counted[name]) for name in ("dense_70b", "sparse_400b"))
    with pytest.raises(
        UserError, match="^sparse_400b has routed experts; give the dense model first and the sparse one second$"
    ):
        introduction.compare(other, one, CHIP)
    with pytest.raises(UserError, match="^dense_70b has no routed experts"):
        introduction.compare(one, one, CHIP)
