"""What is counted is what is built: parameters against the state's own shapes, caches against empty ones, FLOPs against a count by hand."""

import dataclasses
import math

import jax
import pytest
from train import small

from moejax import mesh
from moejax.config_attention import Attention, Latent
from moejax.errors import UserError
from moejax.layers import kinds
from moejax.models import decoder
from moejax.plan import account, mixing, parts
from moejax.train import state

MOE = "model.moe."
ODD = {
    "defaults": {},
    "classes": {MOE + "hidden_classes": (8, 3), MOE + "expert_bias": True, MOE + "router_bias": True},
    "zero": {MOE + "zero_experts": ("zero", "constant", "constant"), MOE + "score": "sigmoid", MOE + "sign_bias": 0.1},
    "further": {
        "model.further": 2, "model.first": ("latent+dense",), "model.pattern": ("local+dense", "latent+sparse"),
        MOE + "latent": 6, MOE + "shared_hidden": 5, MOE + "shared_gate": True, "model.repeats": 3,
    },
    "attention": {
        "model.attention": {"bias": True, "out_bias": True, "norm": "whole", "sinks": True}, MOE + "activation": "relu2",
        MOE + "router": "noisy_topk", MOE + "top_k": 3, "model.latent": {"query_rank": 4},
        "model.pattern": ("attention+sparse", "latent+sparse"),
    },
    "soft": {MOE + "router": "soft", MOE + "soft_slots": 3, MOE + "allow_noncausal": True},
}  # fmt: skip


def configure(options):
    """The small config; a dict for a section changes some of it."""
    plain = {k: v for k, v in options.items() if not isinstance(v, dict)}
    cfg = small.configure(**plain)
    sections = {k.rpartition(".")[2]: v for k, v in options.items() if isinstance(v, dict)}
    changed = {name: dataclasses.replace(getattr(cfg.model, name), **values) for name, values in sections.items()}
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **changed))


@pytest.mark.parametrize("name", ODD)
def test_the_total_is_what_the_state_holds(name):
    cfg = configure(ODD[name])
    built = state.build(cfg, mesh.make(cfg.mesh, jax.devices()[:1]))
    shapes = jax.tree.leaves(state.abstract(built))
    assert account.of_config(cfg).total_parameters == sum(x.size for x in shapes)


def test_what_a_token_meets_of_experts():
    """Two of eight; of two widths the mean; of ten choices eight compute; what routers steer on average."""
    active = lambda **options: _part(configure({MOE + k: v for k, v in options.items()}), "experts").active  # noqa: E731
    assert active() == 2 * 3 * 16 * 8
    assert active(hidden_classes=(8, 3)) == round(2 * 3 * 16 * 5.5)
    assert active(zero_experts=("zero", "identity")) == round(0.8 * 2 * 3 * 16 * 8)
    assert active(zero_experts=("zero",), zero_share=0.25) == 1.5 * 3 * 16 * 8
    assert active(router="threshold", top_k=4, mean_k=1.5) == 1.5 * 3 * 16 * 8
    assert active(router="expert_choice", capacity_factor=1.25) == 2.5 * 3 * 16 * 8
    soft = _part(configure({MOE + "router": "soft", MOE + "soft_slots": 3, MOE + "group_window": 4}), "experts")
    assert (soft.active, soft.multiplied) == (soft.parameters, 8 * 3 // 4 * 3 * 16 * 8)


def _part(cfg, name):
    return next(part for part in account.of_config(cfg).parts if part.name == name)


def test_flops_by_hand():
    """Width 16, 2 heads of 8, one of keys; experts of 8, 2 of 8 a token; 264 tokens; rows of 16."""
    counted = account.of_config(small.configure())
    weights = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 16 * 8 + 2 * 3 * 16 * 8 + 16 * 264
    assert account.weight_flops(counted) == 2 * weights
    pair = 2 * 2 * 8 * 2  # a product and a sum of values, over 2 heads of 8
    assert account.model_flops(counted, 16) == 2 * weights + pair * (1 + 16) / 2
    assert account.training_flops(counted, 16) == 3 * account.model_flops(counted, 16)
    assert account.decoding_flops(counted, 16) == 2 * weights + pair * 16
    further = account.of_config(small.configure(**{"model.further": 1}))
    layer = weights - 16 * 264
    assert account.weight_flops(further) == 2 * (2 * layer + 2 * 16 * 16 + 2 * 16 * 264)
    assert account.decoding_flops(further, 16) == account.decoding_flops(counted, 16)


@pytest.mark.parametrize("window, chunk", [(0, 0), (5, 0), (0, 6), (4, 6), (40, 0), (0, 40)])
def test_pairs_are_those_of_the_mask(window, chunk):
    """Against a mask of 16 positions written out; a decoded token sees what its row of the mask has."""
    one = mixing.Mixing("local", 1, window=window, chunk=chunk)
    sees = lambda q, k: k <= q and (not window or q - k < window) and (not chunk or q // chunk == k // chunk)  # noqa: E731
    rows = [sum(sees(q, k) for k in range(16)) for q in range(16)]
    assert mixing.pairs(one, 16) == sum(rows)
    assert [mixing.seen(one, n + 1) for n in range(16)] == rows


def test_latent_attention_counts_its_own_widths():
    latent = Latent(query_rank=4, rank=6, nope=5, rope=2, value=3)
    model = dataclasses.replace(small.configure().model, pattern=("latent+dense",), latent=latent)
    counted = account.of_config(model)
    assert account.score_flops(counted, 9) == 2 * 2 * (5 + 2 + 3) * 5
    assert account.remaking_flops(counted, 9) == 8 * 2 * 6 * 2 * (5 + 3)
    assert account.cache_bytes_per_token(counted) == 4 * (6 + 2)


@pytest.mark.parametrize("name", ODD)
def test_caches_are_those_of_decoding(name):
    cfg = configure(ODD[name])
    with jax.sharding.use_abstract_mesh(parts.ONE_DEVICE):
        made = jax.eval_shape(lambda: decoder.empty_cache(cfg.model, 3, 10))
    wanted = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(made[:2]))
    assert account.allocated_cache_bytes(account.of_config(cfg), 3, 10) == wanted


def test_a_window_bounds_what_a_cache_must_hold():
    cfg = small.configure(**{"model.pattern": ("attention+dense", "local+dense"), "model.compute_dtype": "bfloat16"})
    counted = account.of_config(dataclasses.replace(cfg.model, local=Attention(window=5)))
    one = 2 * 2 * 8  # bf16 keys and values of one head of 8
    assert account.cache_bytes_per_token(counted) == one and account.state_bytes(counted) == 5 * one
    assert [account.cache_bytes(counted, n) for n in (3, 9)] == [6 * one, 14 * one]


def test_bytes_of_weights():
    """Experts [8, 16, 8] twice and [8, 8, 16]: a scale for each expert's output column."""
    counted = account.of_config(small.configure())
    mixers, experts = 16 * 16 * 2 + 16 * 8 * 2, 8 * 3 * 16 * 8
    scales = (16 + 8 + 8 + 16) + 8 * (8 + 8 + 16)
    rest = counted.total_parameters - mixers - experts
    assert account.weight_bytes(counted, "float32") == 4 * counted.total_parameters == account.gradient_bytes(counted)
    assert account.weight_bytes(counted, "bfloat16") == 2 * counted.total_parameters
    assert account.weight_bytes(counted, "int8") == mixers + experts + 4 * scales + 2 * rest
    assert account.weight_bytes(counted, "int4") == (mixers + experts) // 2 + 4 * scales + 2 * rest
    assert account.optimizer_bytes(counted) == 8 * counted.total_parameters


def test_every_mixer_is_scored():
    assert mixing.SCORED.keys() == kinds.MIXERS.keys()


def test_errors_say_what_to_change():
    counted = account.of_config(small.configure())
    with pytest.raises(UserError, match="precision='fp8': choose one of float32"):
        account.weight_bytes(counted, "fp8")
    with pytest.raises(UserError, match="context=0: a number of positions"):
        account.model_flops(counted, 0)
    with pytest.raises(UserError, match="set model.moe.group_window"):
        account.of_config(configure(ODD["soft"]).model)
