"""What experts do between their two matmuls: a table of activations, each with its gradient written out.

Every function is elementwise and computes in fp32, whatever it is given, so that one definition serves plain arrays and the registers
of a kernel. Gated kinds have two factors, `gate` and `up`; the others have `up` alone, and None in the place of `gate`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.errors import ConfigError

F32 = jnp.float32
GPT_OSS_SLOPE = 1.702


@dataclasses.dataclass(frozen=True)
class Kind:
    """value(gate, up) and gradient(gate, up, da) -> (d_gate, d_up), in fp32."""

    gated: bool
    value: Callable[[Array, Array], Array]
    gradient: Callable[[Array, Array, Array], tuple[Array, Array]]


def _silu(x: Array) -> tuple[Array, Array]:
    """silu and its slope."""
    s = jax.nn.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _gelu(x: Array) -> tuple[Array, Array]:
    """The tanh form of GELU (Hendrycks and Gimpel 2016, section 2) and its slope."""
    t = jnp.tanh(0.7978845608 * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.3989422804 * x * (1 - t * t) * (1 + 0.134145 * x * x)


def _gpt_oss(x: Array) -> tuple[Array, Array]:
    """x sigmoid(1.702 x) and its slope."""
    s = jax.nn.sigmoid(GPT_OSS_SLOPE * x)
    return x * s, s * (1 + GPT_OSS_SLOPE * x * (1 - s))


def _relu(x: Array) -> tuple[Array, Array]:
    return jnp.maximum(x, 0), jnp.where(x > 0, 1.0, 0.0)


def _relu2(x: Array) -> tuple[Array, Array]:
    r = jnp.maximum(x, 0)
    return r * r, 2 * r


def _glu(curve: Callable[[Array], tuple[Array, Array]], shift: float = 0.0) -> Kind:
    """curve(gate) * (up + shift)."""

    def gradient(gate: Array, up: Array, da: Array) -> tuple[Array, Array]:
        value, slope = curve(gate)
        return da * (up + shift) * slope, da * value

    return Kind(True, lambda gate, up: curve(gate)[0] * (up + shift), gradient)


def _plain(curve: Callable[[Array], tuple[Array, Array]]) -> Kind:
    """curve(up)."""
    return Kind(False, lambda gate, up: curve(up)[0], lambda gate, up, da: (gate, da * curve(up)[1]))


KINDS: dict[str, Kind] = {
    "swiglu": _glu(_silu),  # Shazeer 2020, eq. 6
    "geglu": _glu(_gelu),  # Shazeer 2020, eq. 6
    "gpt_oss": _glu(_gpt_oss, shift=1.0),  # gpt-oss 2025: gate sigmoid(1.702 gate) (up + 1), with limit 7
    "relu": _plain(_relu),
    "relu2": _plain(_relu2),  # So et al. 2021
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """One of KINDS, with a limit: gate at most `limit`, up within it on both sides; no gradient passes where it binds."""

    kind: str = "swiglu"
    limit: float | None = None

    @property
    def gated(self) -> bool:
        return KINDS[self.kind].gated

    def value(self, gate: Float[Array, "..."] | None, up: Float[Array, "..."]) -> Float[Array, "..."]:
        """The activation, in fp32."""
        return KINDS[self.kind].value(*self._limited(gate, up))

    def gradient(
        self, gate: Float[Array, "..."] | None, up: Float[Array, "..."], da: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."] | None, Float[Array, "..."]]:
        """Cotangents of gate (None if there is none) and up, in fp32, for the cotangent of the value."""
        d_gate, d_up = KINDS[self.kind].gradient(*self._limited(gate, up), da.astype(F32))
        if self.limit is None or gate is None:
            return d_gate, d_up
        return (
            jnp.where(gate.astype(F32) < self.limit, d_gate, 0.0),
            jnp.where(jnp.abs(up.astype(F32)) < self.limit, d_up, 0.0),
        )

    def _limited(self, gate: Array | None, up: Array) -> tuple[Array | None, Array]:
        gate, up = None if gate is None else gate.astype(F32), up.astype(F32)
        if self.limit is None or gate is None:
            return gate, up
        return jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)


SWIGLU = Activation()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def activated(
    gate: Float[Array, "..."] | None, up: Float[Array, "..."], activation: Activation = SWIGLU
) -> Float[Array, "..."]:
    """The activation in up's dtype, differentiable: its backward pass keeps the pre-activations alone."""
    return activation.value(gate, up).astype(up.dtype)


def _slopes(activation: Activation, h: tuple, da: Array) -> tuple:
    gate, up = h
    d_gate, d_up = activation.gradient(gate, up, da)
    return None if d_gate is None else d_gate.astype(up.dtype), d_up.astype(up.dtype)


activated.defvjp(lambda gate, up, activation: (activated(gate, up, activation), (gate, up)), _slopes)


def check(activation: Activation) -> None:
    """A known kind, and a limit only where there is a gate to limit."""
    if activation.kind not in KINDS:
        raise ConfigError(f"model.moe.activation={activation.kind!r}: choose one of {', '.join(KINDS)}")
    if activation.limit is None:
        return
    if not activation.limit > 0:
        raise ConfigError(f"model.moe.activation_clamp={activation.limit}: above 0 (gpt-oss uses 7), or null for none")
    if not activation.gated:
        raise ConfigError(
            f"model.moe.activation_clamp={activation.limit} with activation={activation.kind!r}: only gated activations are limited "
            f"({', '.join(name for name, kind in KINDS.items() if kind.gated)}); set it to null"
        )
