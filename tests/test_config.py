"""B31: everything that can be wrong with a config is one sentence with the values and the remedy, before a device is touched."""

import dataclasses
import json
import subprocess
import sys

import jax
import ml_collections
import pytest
from train import small

from moejax import config
from moejax.errors import ConfigError, UserError
from moejax.train import check

CAPACITY = {"model.moe.transport": "scatter", "model.moe.capacity_factor": 1.25}
TOO_BIG = {"model.moe.num_experts": 1, "model.moe.top_k": 1, "model.moe.renormalize": False}

RULES = [
    ({"mesh.data": 0}, ["mesh.data=0", "set it to 1"]),
    ({"mesh.tensor": 2}, ["mesh.tensor=2", "model.kv_heads=1", "choose one of 1"]),
    ({"mesh.tensor": 3, "model.kv_heads": 6, "model.heads": 6}, ["mesh.tensor=3", "model.moe.hidden=8"]),
    (
        {"mesh.tensor": 4, "mesh.expert": 4, "model.moe.tensor": "experts"},
        ["mesh.expert * mesh.tensor = 16", "8 experts"],
    ),
    ({"mesh.context": 3}, ["mesh.context=3", "data.context=16", "choose one of 1, 2, 4"]),
    ({"mesh.context": 4, "model.moe.group_window": 8}, ["mesh.context=4", "4 positions", "group_window=8", "null"]),
    ({"mesh.tensor": 16, "model.moe.tensor": "experts"}, ["mesh.tensor=16", "8 experts"]),
    ({"model.moe.tensor": "both"}, ["model.moe.tensor='both'", "hidden, experts"]),
    ({"mesh.expert": 3}, ["mesh.expert=3", "num_experts=8", "1, 2, 4, 8"]),
    ({"mesh.fsdp": 4, "model.moe.hidden": 6}, ["mesh.fsdp=4", "model.moe.hidden=6", "1, 2, 3, 6"]),
    ({"mesh.fsdp": 3}, ["mesh.fsdp=3", "model.width=16", "1, 2, 4, 8, 16"]),
    ({"mesh.fsdp": 8, "mesh.expert": 4}, ["= 32", "model.width=16", "choose a product from 1, 2, 4, 8, 16"]),
    ({"model.compute_dtype": "float16"}, ["'float16'", "choose float32 or bfloat16"]),
    ({"model.width": 0}, ["model.width=0", "at least 1"]),
    ({"model.loss_chunk": 100}, ["model.loss_chunk=100", "vocab_size=264", "choose a divisor"]),
    ({"model.query_chunk": 3}, ["model.query_chunk=3", "16 positions", "choose one of 1, 2, 4, 8, 16, or 0"]),
    ({"mesh.context": 2, "model.query_chunk": 16}, ["model.query_chunk=16", "8 positions"]),
    ({"model.loss_chunk": 0}, ["model.loss_chunk=0", "choose a divisor"]),
    ({"model.unroll": 2}, ["model.unroll=2", "repeats=1", "choose a divisor"]),
    ({"model.unroll": 0}, ["model.unroll=0", "choose a divisor"]),
    ({"model.pattern": ()}, ["model.pattern=()", "at least one"]),
    ({"model.repeats": 0}, ["0 times", "at least one"]),
    ({"model.pattern": ("attention",)}, ["'attention'", "mixer+channel", "dense, sparse"]),
    ({"model.pattern": ("mamba+sparse",)}, ["'mamba+sparse'", "one of attention"]),
    ({"model.hidden": 0}, ["model.hidden=0", "at least 1"]),
    ({"model.remat": "some"}, ["'some'", "none, selective, exchanged, full"]),
    ({"model.heads": 3, "model.kv_heads": 2}, ["heads=3", "kv_heads=2", "divisors of 3"]),
    ({"model.kv_heads": 0}, ["kv_heads=0", "choose kv_heads"]),
    ({"model.head_dim": 7}, ["head_dim=7", "even"]),
    ({"model.vocab_size": 256, "model.loss_chunk": 64}, ["vocab_size=256", "258", "at least 258"]),
    ({"model.moe.num_experts": 0}, ["num_experts=0", "at least 1"]),
    ({"model.moe.hidden": 0}, ["model.moe.hidden=0", "at least 1"]),
    ({"model.moe.shared_hidden": -1}, ["shared_hidden=-1", "0 for none"]),
    ({"model.moe.router": "softmax_topk"}, ["'softmax_topk'", "topk, switch, gshard"]),
    ({"mesh.expert": 8, "model.moe.hidden_classes": (8, 16)}, ["mesh.expert=8", "4 experts of each width", "1, 2, 4"]),
    ({"mesh.fsdp": 4, "model.moe.hidden_classes": (8, 6)}, ["mesh.fsdp=4", "model.moe.hidden_classes=6", "1, 2, 3, 6"]),
    ({"mesh.fsdp": 4, "model.moe.latent": 6}, ["mesh.fsdp=4", "model.moe.latent=6", "1, 2, 3, 6"]),
    ({"model.moe.sign_bias": -0.1}, ["sign_bias=-0.1", "set 0"]),
    ({"train.record_every": -1}, ["record_every=-1", "0 for none"]),
    ({"train.replay_limit": 1.5}, ["replay_limit=1.5", "share in [0, 1]"]),
    ({"train.record_every": 1, "model.pattern": ("attention+dense",)}, ["record_every=1", "without a sparse layer"]),
    ({"train.replay": "/nowhere"}, ["train.replay=/nowhere", "assignments", "train.record_every=1"]),
    ({"train.reference": "/nowhere"}, ["train.reference=/nowhere", "probe_STEP.npz"]),
    ({"train.clip_spike": 1.0}, ["clip_spike=1.0", "0 for no guard"]),
    ({"train.clip_spike": float("nan")}, ["clip_spike=nan", "above 1"]),
    ({"model.moe.top_k": 9}, ["top_k=9", "num_experts=8", "lower top_k"]),
    ({"model.moe.top_k": 0}, ["top_k=0", "lower top_k or raise num_experts"]),
    ({"model.moe.top_k": 1}, ["top_k=1", "renormalize=False", "or model.moe.router=switch"]),
    ({"model.moe.router": "switch"}, ["router=switch", "set model.moe.top_k=1", "it is 2"]),
    ({"model.moe.router": "gshard", "model.moe.top_k": 3}, ["router=gshard", "set model.moe.top_k=2", "it is 3"]),
    ({"model.moe.gate_scale": 0.0}, ["gate_scale=0.0", "set 1.0"]),
    ({"model.moe.gate_scale": float("nan")}, ["gate_scale=nan", "set 1.0"]),
    ({"model.moe.jitter": 1.0}, ["jitter=1.0", "[0, 1)"]),
    ({"model.moe.jitter": -0.1}, ["jitter=-0.1", "[0, 1)"]),
    (CAPACITY | {"model.moe.capacity_factor": 0.0}, ["capacity_factor=0.0", "above 0", "1.25"]),
    (CAPACITY | {"model.moe.capacity_factor": -1.0}, ["capacity_factor=-1.0", "above 0"]),
    (CAPACITY | {"model.moe.capacity_factor": float("inf")}, ["capacity_factor=inf", "null for dropless"]),
    (CAPACITY | {"model.moe.capacity_factor": float("nan")}, ["capacity_factor=nan", "null for dropless"]),
    ({"model.moe.eval_capacity_factor": 0.0}, ["eval_capacity_factor=0.0", "above 0"]),
    (CAPACITY | {"model.moe.capacity_factor": 1.123456789}, ["capacity_factor=1.123456789", "fewer digits"]),
    ({"model.moe.group_rows": 0}, ["group_rows=0", "set it to 1"]),
    ({"model.moe.group_window": 4, "model.moe.group_rows": 2}, ["group_window=4", "group_rows=2", "set group_rows=1"]),
    ({"model.moe.group_window": 5}, ["group_window=5", "context=16", "divisor or null"]),
    ({"model.moe.group_window": 0}, ["group_window=0", "divisor or null"]),
    ({"model.moe.transport": "pigeon"}, ["'pigeon'", "einsum, scatter, gather"]),
    (
        {"model.moe.transport": "scatter"},
        ["transport=scatter", "null", "capacity_factor=1.25 or model.moe.transport=gather"],
    ),
    ({"model.moe.kernel": "cuda"}, ["'cuda'", "auto or one of reference, blocked, xla"]),
    ({"model.moe.load_balance": -0.1}, ["load_balance=-0.1", "set 0"]),
    ({"model.moe.router_z": -0.1}, ["router_z=-0.1", "set 0"]),
    ({"train.steps": 0, "train.warmup": 0}, ["train.steps=0", "at least 1"]),
    ({"train.warmup": 20}, ["train.warmup=20", "train.steps=20", "lower it"]),
    ({"train.warmup": -1}, ["train.warmup=-1", "train.steps=20"]),
    ({"train.learning_rate": 0.0}, ["learning_rate=0.0", "above 0"]),
    ({"train.learning_rate": float("nan")}, ["learning_rate=nan", "above 0"]),
    ({"train.clip_norm": 0.0}, ["clip_norm=0.0", "above 0"]),
    ({"train.epsilon": -1.0}, ["epsilon=-1.0", "above 0"]),
    ({"train.final_learning_rate": -1.0}, ["final_learning_rate=-1.0", "not below 0"]),
    ({"train.weight_decay": -0.1}, ["weight_decay=-0.1", "not below 0"]),
    ({"train.b1": 1.0}, ["train.b1=1.0", "[0, 1)"]),
    ({"train.b2": -0.1}, ["train.b2=-0.1", "[0, 1)"]),
    ({"data.batch": 0}, ["data.batch=0", "at least 1"]),
    ({"data.context": 0}, ["data.context=0", "at least 1"]),
    ({"data.heldout": 0.0}, ["data.heldout=0.0", "set 0.05"]),
    ({"data.heldout": 1.0}, ["data.heldout=1.0", "set 0.05"]),
    ({"data.seed": -1}, ["data.seed=-1", "between 0 and"]),
    ({"train.seed": 2**32}, [f"train.seed={2**32}", "between 0 and"]),
    ({"train.microbatches": 3}, ["data.batch=8", "microbatches=3", "1, 2, 4, 8"]),
    ({"train.microbatches": 0}, ["microbatches=0", "choose microbatches"]),
    ({"train.microbatches": 8, "model.moe.group_rows": 2}, ["data.batch=8", "microbatches=8", "group_rows=2"]),
    *(
        ({f"train.{n}": 0}, [f"train.{n}=0", "at least 1"])
        for n in ("log_every", "eval_every", "eval_rows", "routing_every")
    ),
    *(({f"checkpoint.{n}": 0}, [f"checkpoint.{n}=0", "at least 1"]) for n in ("every", "keep")),
    ({"train.profile_steps": 3}, ["profile_from=0", "profile_steps=3", "train.steps=20"]),
    ({"train.profile_steps": 3, "train.profile_from": 19}, ["profile_from=19", "train.steps=20"]),
]


@pytest.fixture
def no_device(monkeypatch):
    """Nobody may ask which devices there are."""

    def touched(*args, **kwargs):
        raise AssertionError("a device was touched")

    for name in ("devices", "local_devices", "device_count", "default_backend", "make_mesh", "device_put"):
        monkeypatch.setattr(jax, name, touched)


@pytest.mark.parametrize(
    "options,words", RULES, ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else ""
)
def test_b31_rules(options, words, no_device):
    """The message has the values, the rule and the remedy, in one line; exit code 2."""
    with pytest.raises(ConfigError) as caught:
        check.check(small.configure(**options))
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message and caught.value.exit_code == 2 and isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    "options",
    [{}, {"model.moe.group_window": 4}, CAPACITY, {"model.moe.router": "switch", "model.moe.top_k": 1}, {"mesh.fsdp": 2, "mesh.expert": 8},
     {"model.pattern": ("attention+dense",), "model.moe.num_experts": 3, "mesh.expert": 2}, TOO_BIG,
     {"train.profile_steps": 3, "train.profile_from": 18}, {"mesh.expert": 4, "model.moe.hidden_classes": (8, 16)},
     {"train.record_every": 5, "train.replay_limit": 0.0, "train.clip_spike": 2.0}],
    ids=str,
)  # fmt: skip
def test_b31_what_is_right_passes(options, no_device):
    """The rules refuse no more than they say; rules of sparse layers do not bind a dense model."""
    check.check(small.configure(**options))


def test_no_device_is_touched_by_a_check():
    """In a fresh process, no backend has been started after a check."""
    code = (
        "from moejax import config; from moejax.train import check; check.check(config.Config());"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized();"
        "import jax; jax.devices(); assert xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=small.ROOT)


UNKNOWN = [
    (
        {"model": {"moe": {"num_expert": 3}}},
        ["config.model.moe.num_expert is not an option", "did you mean config.model.moe.num_experts?"],
    ),
    ({"trian": {}}, ["config.trian", "did you mean config.train?"]),
    ({"mesh": {"zzz": 1}}, ["config.mesh.zzz", "known keys: data, fsdp, expert, tensor, context"]),
    ({"train": {"steps": "many"}}, ["config.train.steps='many' is str", "must be int"]),
    ({"train": {"steps": 3.0}}, ["config.train.steps=3.0 is float", "must be int"]),
    ({"train": {"steps": True}}, ["config.train.steps=True is bool", "must be int"]),
    ({"train": {"steps": None}}, ["config.train.steps=None", "must be int"]),
    ({"train": {"learning_rate": "1e-3"}}, ["learning_rate='1e-3' is str", "must be float"]),
    ({"model": {"moe": {"renormalize": 1}}}, ["renormalize=1 is int", "must be bool"]),
    ({"model": {"moe": {"capacity_factor": "tight"}}}, ["capacity_factor='tight'", "must be float or null"]),
    ({"model": {"pattern": "attention+sparse"}}, ["pattern='attention+sparse' is str"]),
    ({"model": {"pattern": [1]}}, ["config.model.pattern=1 is int", "must be str"]),
    ({"model": {"moe": 3}}, ["config.model.moe=3", "section", "config.model.moe.num_experts"]),
    ({"data": None}, ["config.data=None", "section", "config.data.source"]),
]


@pytest.mark.parametrize("tree,words", UNKNOWN, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_b31_unknown_and_ill_typed_keys(tree, words):
    """Unknown keys with the nearest name, wrong types with the right one, a section with one of its keys."""
    for read in (config.from_dict, lambda t: config.resolve(ml_collections.ConfigDict(t))):
        with pytest.raises(ConfigError) as caught:
            read(tree)
        assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_json_round_trip():
    """A config through JSON is the same config, also with nulls, tuples and floats written as integers."""
    for cfg in (
        config.Config(),
        small.configure(),
        small.configure(**CAPACITY | {"model.moe.group_window": 4, "name": "other"}),
    ):
        assert config.from_dict(json.loads(json.dumps(config.to_dict(cfg)))) == cfg
        assert config.from_dict(config.to_dict(cfg)) == cfg
    assert config.from_dict({"train": {"learning_rate": 1}}).train.learning_rate == 1.0
    assert type(config.from_dict({"train": {"learning_rate": 1}}).train.learning_rate) is float
    assert hash(config.from_dict(json.loads(json.dumps(config.to_dict(config.Config())))))


def test_default_is_the_dataclasses():
    """An experiment file starts from every default, and each of its keys can be set."""
    assert config.resolve(config.default()) == config.Config()
    tree = config.default()
    tree.model.moe.capacity_factor = 1.25
    tree.model.pattern = ("attention+dense", "attention+sparse")
    cfg = config.resolve(tree)
    assert cfg.model.moe.capacity_factor == 1.25 and cfg.model.pattern == ("attention+dense", "attention+sparse")
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.model.width = 3
    tree.model.moe.num_expert = 3
    with pytest.raises(ConfigError, match=r"did you mean config\.model\.moe\.num_experts"):
        config.resolve(tree)
