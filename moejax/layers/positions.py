"""Rotary positions (Su et al. 2021, eq. 34), of a part of a head or all of it, and their frequencies for longer contexts."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax import config
from moejax.errors import ConfigError

Frequencies = Float[np.ndarray, " half"]
Scaling = Callable[[Frequencies, config.Rope, float], Frequencies]


def _linear(frequency: Frequencies, rope: config.Rope, theta: float) -> Frequencies:
    """Positions divided by the factor (Chen et al. 2023)."""
    return frequency / rope.factor


def _llama3(frequency: Frequencies, rope: config.Rope, theta: float) -> Frequencies:
    """Slowed by the factor where a dimension turns rarely in the original context (Llama 3.1, 2024)."""
    turns = rope.original_context * frequency / (2 * math.pi)
    kept = np.clip((turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0, 1)
    return kept * frequency + (1 - kept) * frequency / rope.factor


def _yarn(frequency: Frequencies, rope: config.Rope, theta: float) -> Frequencies:
    """Slowed by the factor along a ramp over dimensions (Peng et al. 2023, eq. 23)."""
    half = len(frequency)

    def place(turns: float) -> float:
        """The dimension that turns so often in the original context."""
        return half * math.log(rope.original_context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    slowed = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0, 1)
    return frequency * (1 - slowed) + frequency / rope.factor * slowed


SCALINGS: dict[str, Scaling] = {
    "none": lambda frequency, rope, theta: frequency,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def frequencies(rope: config.Rope, theta: float, width: int) -> Frequencies:
    """Radians a position of every pair of `width` dimensions, fp64."""
    return SCALINGS[rope.scaling](theta ** (-np.arange(0, width, 2) / width), rope, theta)


def _m(coefficient: float, factor: float) -> float:
    """0.1 c ln(factor) + 1 (Peng et al. 2023, eq. 22, with c = 1)."""
    return 0.1 * coefficient * math.log(factor) + 1 if factor > 1 else 1.0


def magnitude(rope: config.Rope) -> float:
    """The factor on cosine and sine."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.magnitude is not None:
        return rope.magnitude
    if rope.mscale or rope.mscale_all:
        return _m(rope.mscale, rope.factor) / _m(rope.mscale_all, rope.factor)
    return _m(1.0, rope.factor)


def score_scale(rope: config.Rope) -> float:
    """The factor on the scores of latent attention (DeepSeek-V2 2024, section 3.1.4)."""
    return _m(rope.mscale_all, rope.factor) ** 2 if rope.scaling == "yarn" else 1.0


def angles(
    queries: Int[Array, "b T"], rope: config.Rope, theta: float, width: int
) -> tuple[Float[Array, "b T half"], Float[Array, "b T half"]]:
    """Cosine and sine of queries * frequency, times the magnitude, fp32. Only differences of indices matter."""
    frequency = jnp.asarray(frequencies(rope, theta, width), jnp.float32)
    angle = queries.astype(jnp.float32)[..., None] * frequency[None, None]
    return magnitude(rope) * jnp.cos(angle), magnitude(rope) * jnp.sin(angle)


def rotate(
    x: Float[Array, "B T H d"], cosine: Float[Array, "b T half"], sine: Float[Array, "b T half"], interleaved: bool
) -> Float[Array, "B T H d"]:
    """The first 2 * half dimensions turned in pairs, in fp32: (i, i + half), or neighbours where `interleaved`. The rest stays."""
    half = cosine.shape[-1]
    turning, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    pairs = turning.reshape(*x.shape[:-1], half, 2) if interleaved else turning.reshape(*x.shape[:-1], 2, half)
    first, second = jnp.moveaxis(pairs, -1 if interleaved else -2, 0)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    turned = first * cosine - second * sine, second * cosine + first * sine
    whole = jnp.stack(turned, axis=-1 if interleaved else -2).reshape(turning.shape).astype(x.dtype)
    return jnp.concatenate([whole, rest], axis=-1) if rest.shape[-1] else whole


def check(rope: config.Rope, theta: float) -> None:
    """Known kinds, and numbers with which the formulas hold."""
    if rope.scaling not in SCALINGS:
        raise ConfigError(f"model.rope.scaling={rope.scaling!r}: choose one of {', '.join(SCALINGS)}")
    if not 0 < rope.fraction <= 1:
        raise ConfigError(f"model.rope.fraction={rope.fraction}: a share of a head's dimensions in (0, 1]")
    if not theta > 1:
        raise ConfigError(f"model.rope_theta={theta}: a base above 1, such as 10000")
    if rope.scaling == "none" and rope.factor != 1:
        raise ConfigError(
            f"model.rope.factor={rope.factor} with scaling=none does nothing; set it to 1, or choose a scaling"
        )
    if rope.factor < 1 or rope.original_context < 1:
        raise ConfigError(f"model.rope.factor={rope.factor}, original_context={rope.original_context}: at least 1 each")
    if not rope.low_frequency < rope.high_frequency or not 0 < rope.beta_slow <= rope.beta_fast:
        raise ConfigError(
            f"model.rope.low_frequency={rope.low_frequency} lies below high_frequency={rope.high_frequency}, and beta_slow="
            f"{rope.beta_slow} above 0 and not above beta_fast={rope.beta_fast}"
        )
