"""Options of the mixers that attend: the sections `model.rope`, `model.attention`, `model.local` and `model.latent` of a config."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions beside `model.rope_theta`; of every mixer whose `rotary` is on."""

    fraction: float = 1.0
    """Share of a head's dimensions that turn, the first ones."""
    interleaved: bool = False
    """Dimensions that turn together are neighbours (2i, 2i + 1); else i and i + half, as in Llama."""
    scaling: str = "none"
    """How frequencies are changed for contexts longer than trained on, a name in moejax.layers.positions.SCALINGS: none, linear,
    llama3, yarn."""
    factor: float = 1.0
    """Of how much longer the context is (linear, llama3, yarn)."""
    original_context: int = 4096
    """Positions of the context that was trained on first (llama3, yarn)."""
    low_frequency: float = 1.0
    """Turns in the original context below which a dimension is slowed by the whole factor (llama3)."""
    high_frequency: float = 4.0
    """Turns in the original context above which a dimension stays as it is (llama3)."""
    beta_fast: float = 32.0
    """Turns in the original context above which a dimension stays as it is (yarn)."""
    beta_slow: float = 1.0
    """Turns in the original context below which a dimension is slowed by the whole factor (yarn)."""
    truncate: bool = True
    """Round the dimensions between which the ramp of yarn lies to whole numbers; gpt-oss does not."""
    magnitude: float | None = None
    """Factor on cosine and sine (yarn); null is what `mscale` says."""
    mscale: float = 0.0
    """c of m(c) = 0.1 c ln(factor) + 1, on cosine and sine (yarn): m(mscale) / m(mscale_all); both 0 is m(1)."""
    mscale_all: float = 0.0
    """c of the same, whose square multiplies the scale of latent attention (yarn)."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """What a kind of grouped-query attention has beside heads: of the mixer `attention`, and in a section of its own of `local`."""

    bias: bool = False
    """Add a learned bias to queries, keys and values."""
    out_bias: bool = False
    """Add a learned bias to the output."""
    norm: str = "none"
    """RMSNorm of queries and keys, a name in moejax.layers.attention.NORMS: none, head (of each head, before they turn), whole (of all
    heads together, before they turn), l2 (of each head, without a scale, after they turn)."""
    rotary: bool = True
    """Turn queries and keys by position; else nothing tells positions apart but the mask (NoPE)."""
    window: int = 0
    """Positions that a query sees, its own included; 0 for all."""
    chunk: int = 0
    """Positions of a document are cut into pieces of so many, and a query sees its own piece; 0 for no pieces."""
    sinks: bool = False
    """A learned logit of each head that takes part in the softmax and attends to nothing."""
    temperature: float = 0.0
    """a of queries times 1 + a ln(1 + floor((position + 1) / temperature_positions)); 0 for none."""
    temperature_positions: int = 8192
    """Positions of a document between one value of that factor and the next."""


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2 2024, section 2.1): keys and values from one narrow vector, the mixer `latent`."""

    query_rank: int = 0
    """Width that queries are made from; 0 makes them from the model's."""
    rank: int = 32
    """Width of the vector that keys and values are made from, which a cache keeps."""
    nope: int = 16
    """Dimensions of a head that do not turn."""
    rope: int = 8
    """Dimensions that turn; of keys they are the same for all heads."""
    value: int = 16
    """Dimensions of a head's value."""
    norm_epsilon: float = 1e-6
    """Added to the mean square of the narrow vectors."""
