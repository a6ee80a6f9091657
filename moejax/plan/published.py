"""What the files of configs/models have alike: how a published model would be trained on a pod, and options that families share."""

from __future__ import annotations

from typing import Any

from moejax import config

Tree = Any
"""An ml_collections.ConfigDict, whose keys a type checker does not know."""
MOST_CHUNK, TENSOR = 16384, 8
"""Columns of the vocabulary whose logits exist at a time, at most; they are a multiple of the devices that `tensor` may have."""


def begin(name: str, vocabulary: int) -> Tree:
    """A config for a pod: rows of 4,096 tokens, 1,024 of them a step, bfloat16, everything recomputed, no token dropped, rows of
    experts exchanged. The schedule is a usual one and not the publisher's."""
    c: Tree = config.default()
    c.name = name
    c.data.context, c.data.batch = 4096, 1024
    c.model.vocab_size, c.model.loss_chunk = vocabulary, chunk(vocabulary)
    c.model.query_chunk = 512
    c.model.moe.kernel = "pallas_tpu"  # the compiler makes a dense product of the weight gradient of ragged_dot
    c.model.compute_dtype, c.model.remat = "bfloat16", "full"
    c.model.moe.transport = "ragged"
    c.train.steps, c.train.warmup = 100_000, 2000
    c.train.learning_rate, c.train.final_learning_rate = 3e-4, 3e-5
    c.train.b2 = 0.95
    c.train.eval_every = c.train.routing_every = c.checkpoint.every = 1000
    return c


def chunk(vocabulary: int) -> int:
    """The largest divisor up to MOST_CHUNK that `tensor` can cut; the whole vocabulary where there is none."""
    good = (d for d in range(MOST_CHUNK, 0, -1) if vocabulary % d == 0 and d % TENSOR == 0)
    return next(good, vocabulary)


def deepseek_routing(c: Tree, gate_scale: float) -> None:
    """As DeepSeek-V3 (2024, section 2.1.2) and after it: sigmoid scores, their best selected with a bias that moves by 0.001 a step,
    gates divided by their sum, and a small loss on each sequence."""
    moe = c.model.moe
    moe.score, moe.gate_scale = "sigmoid", gate_scale
    moe.selection_bias, moe.sign_bias = True, 0.001
    moe.load_balance, moe.load_balance_scope, moe.router_z = 1e-4, "sequence", 0.0


def yarn(c: Tree, factor: float, **options: float | bool) -> None:
    """Frequencies for a context `factor` times the first 4,096 positions."""
    c.model.rope.scaling, c.model.rope.factor = "yarn", factor
    c.model.rope.update(options)
