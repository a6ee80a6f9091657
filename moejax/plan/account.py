"""How large a model is and what a token costs: parameters, FLOPs and bytes, counted on any machine from a config alone.

A FLOP is one addition or one multiplication. Counted are the products with weights and those of attention's scores, which is what
model FLOPs utilisation is measured against; norms, activations, softmaxes and the moving of tokens are not.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import jax.numpy as jnp
import ml_collections

from moejax import config
from moejax.errors import UserError
from moejax.layers import kinds
from moejax.models.decoder import Decoder
from moejax.plan import mixing, parts, stacks
from moejax.plan.mixing import Mixing
from moejax.plan.parts import Part

BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
SCALE, KEPT = 4, 2
"""Bytes of the scale of a quantised column (fp32, as in kernels/quantized.py), and of what is not quantised (bfloat16)."""


@dataclasses.dataclass(frozen=True)
class Account:
    """A model counted. FLOPs and bytes are functions of it."""

    parts: tuple[Part, ...]
    mixings: tuple[Mixing, ...]
    element: int
    """Bytes of a number in a cache: of the compute type."""

    @property
    def total_parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def active_parameters(self) -> dict[str, int]:
        """What one token meets, in the three ways that publishers count: A everything, B without the input embedding, C without the
        output projection either. A tied embedding is one."""
        everything = sum(part.active for part in self.parts)
        inputs = everything - _of(self, "embedding").active
        return {"A": everything, "B": inputs, "C": inputs - _of(self, "unembedding").active}


def _of(account: Account, name: str) -> Part:
    return next((part for part in account.parts if part.name == name), Part(name, 0, 0, 0))


def of_config(cfg: config.Config | config.Model) -> Account:
    """The account of a model that is built, from the outline of its own modules. Modules for further tokens are part of it: a token of
    training meets them, decoding does not. Selection biases are state and no parameters.

    Raises UserError where a Model alone does not say what a token costs (see `parts.visits`)."""
    model = cfg.model if isinstance(cfg, config.Config) else cfg
    visited = parts.visits(model.moe, _group(cfg)) if kinds.number(model, "sparse") else parts.NONE
    every = parts.by_part(parts.leaves(lambda rngs: Decoder(model, rngs=rngs)), parts.name_of)
    found = {
        name: parts.of_leaves(name, own, visited, model.moe.num_experts, decoding=name != "further")
        for name, own in every.items()
    }
    if model.further:  # each module's prediction goes through the output projection once more
        again = model.further * found["unembedding"].multiplied
        found["further"] = found["further"]._replace(multiplied=found["further"].multiplied + again)
    mixers = Counter(kinds.split(kind)[0] for kind in (*model.first, *model.pattern * model.repeats))
    mixed = [mixing.of_layers(model, name, number) for name, number in mixers.items()]
    later = Counter(kinds.split(kind)[0] for kind in kinds.further(model))
    mixed += [mixing.of_layers(model, name, number, decoding=False) for name, number in later.items()]
    return Account(parts.merged(found.values()), tuple(mixed), jnp.dtype(model.compute_dtype).itemsize)


def of_tree(tree: ml_collections.ConfigDict) -> Account:
    """The account of an experiment file, also of one with a section `counted`, whose architecture is not built.

    Raises ConfigError for what cannot be read."""
    if config.COUNTED not in tree:
        return of_config(config.resolve(tree))
    whole = tree.to_dict()
    sections = whole.pop(config.COUNTED)
    plain = ml_collections.ConfigDict(whole)
    cfg = config.resolve(plain)
    found, mixed = stacks.count(cfg.model, sections, _group(cfg))
    return Account(parts.merged(found), tuple(mixed), jnp.dtype(cfg.model.compute_dtype).itemsize)


def _group(cfg: config.Config | config.Model) -> int | None:
    """Tokens of a group of routing; None where a Model alone does not say."""
    if isinstance(cfg, config.Model):
        return cfg.moe.group_window
    return cfg.model.moe.group_window or cfg.model.moe.group_rows * cfg.data.context


def weight_flops(account: Account) -> int:
    """FLOPs of a token's products with weights in a forward pass of training: 2 for each weight. Looking up an embedding is none."""
    return 2 * sum(part.multiplied for part in account.parts)


def score_flops(account: Account, context: int) -> float:
    """FLOPs of attention's scores and sums, and of recurrences, for a token of a row of so many positions, on average. Causal attention
    counts the pairs that it sees: half of them."""
    _at_least_one("context", context)
    whole = sum(m.layers * (m.pair * mixing.pairs(m, context) + m.step * context) for m in account.mixings)
    return whole / context


def model_flops(account: Account, context: int) -> float:
    """FLOPs of a token in a forward pass over rows of so many positions, of which attention sees the causal half."""
    return weight_flops(account) + score_flops(account, context)


def training_flops(account: Account, context: int) -> float:
    """FLOPs of a token in a step of training: three forward passes. What is recomputed is not counted."""
    return 3 * model_flops(account, context)


def decoding_flops(account: Account, position: int) -> int:
    """FLOPs of the token at this position, counted from 1, that sees what is before it in a cache, `position` places with its own.
    Modules for further tokens and encoders take no part. See `remaking_flops` for what latent attention adds."""
    _at_least_one("position", position)
    weights = 2 * sum(part.multiplied for part in account.parts if part.decoding)
    own = [m for m in account.mixings if m.decoding]
    return weights + sum(m.layers * (m.pair * mixing.seen(m, position) + m.step) for m in own)


def remaking_flops(account: Account, position: int) -> int:
    """FLOPs by which moejax makes keys and values anew from the narrow vectors of the positions before, at one step of decoding with
    latent attention; an implementation that moves these products to the query has none."""
    _at_least_one("position", position)
    return sum(m.layers * m.remade * (position - 1) for m in account.mixings if m.decoding)


def cache_bytes_per_token(account: Account) -> int:
    """Bytes by which the cache of one sequence grows with every token, in the compute type: of layers that see all positions."""
    return account.element * sum(m.layers * m.kept for m in account.mixings if m.decoding and not m.limit)


def state_bytes(account: Account) -> int:
    """Bytes kept of a sequence however long it is: full windows and pieces, recurrent state."""
    own = [m for m in account.mixings if m.decoding]
    return sum(m.layers * (m.fixed + account.element * m.kept * m.limit) for m in own)


def cache_bytes(account: Account, positions: int) -> int:
    """Bytes that decoding needs of the positions of one sequence: no more than a window of those layers that see no more."""
    _at_least_one("positions", positions)
    own = [m for m in account.mixings if m.decoding]
    return sum(m.layers * (m.fixed + account.element * m.kept * min(positions, m.limit or positions)) for m in own)


def allocated_cache_bytes(account: Account, rows: int, size: int) -> int:
    """Bytes of `models.decoder.empty_cache`, which has room for all positions in layers with a window too."""
    whole = [m.layers * (m.fixed + account.element * m.kept * size) for m in account.mixings if m.decoding]
    return rows * sum(whole)


def weight_bytes(account: Account, precision: str) -> int:
    """Bytes of all parameters in float32, bfloat16, int8 or int4.

    int8 and int4 are of the matrices of mixers, feed-forward layers and experts, with one fp32 scale for each output column, as
    kernels/quantized.py has them. Norms, biases, routers and both embeddings stay in bfloat16. Raises UserError for another name.
    """
    if precision not in BITS:
        raise UserError(f"precision={precision!r}: choose one of {', '.join(BITS)}")
    total, bits = account.total_parameters, BITS[precision]
    if bits >= 16:
        return total * bits // 8
    matrices = sum(part.matrices for part in account.parts)
    scales = sum(part.scales for part in account.parts)
    return math.ceil(matrices * bits / 8) + scales * SCALE + (total - matrices) * KEPT


def optimizer_bytes(account: Account) -> int:
    """Of AdamW: two moments of every parameter, in fp32."""
    return 8 * account.total_parameters


def gradient_bytes(account: Account) -> int:
    """In fp32."""
    return 4 * account.total_parameters


def to_dict(account: Account, context: int) -> dict[str, Any]:
    """All numbers, for JSON: FLOPs and bytes at this context."""
    return {
        "parameters": {"total": account.total_parameters, "active": account.active_parameters},
        "parts": [part._asdict() for part in account.parts],
        "context": context,
        "flops_per_token": {
            "weights": weight_flops(account), "scores": score_flops(account, context), "forward": model_flops(account, context),
            "training": training_flops(account, context), "decoding": decoding_flops(account, context),
            "remaking": remaking_flops(account, context),
        },
        "bytes": {
            "weights": {precision: weight_bytes(account, precision) for precision in BITS},
            "gradients": gradient_bytes(account), "optimizer": optimizer_bytes(account),
            "cache_per_token": cache_bytes_per_token(account), "state_per_sequence": state_bytes(account),
            "cache_of_sequence": cache_bytes(account, context),
        },
    }  # fmt: skip


def _at_least_one(name: str, number: int) -> None:
    if number < 1:
        raise UserError(f"{name}={number}: a number of positions, at least 1")
