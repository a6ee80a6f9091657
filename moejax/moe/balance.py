"""Balancers: what keeps the load even. Each is a loss on the sums of a layer; the layer loss is their weighted sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax import config
from moejax.arrays import Stats
from moejax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Balancer:
    """A loss on the sums of the global batch, and the option that is its coefficient."""

    loss: Callable[[Stats], Float[Array, ""]]
    coefficient: Callable[[config.MoE], float]


def share(part: Array | np.ndarray, whole: Array | np.ndarray) -> Array:
    """part / whole in fp32, 0 where there is nothing."""
    return part.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)


def load_balance(stats: Stats) -> Float[Array, ""]:
    """E * sum_e f_e P_e, with f_e the share of all requests (every choice) and P_e the mean probability: 1 at perfect
    balance for every k (Fedus et al. 2021, eq. 4, over all k choices)."""
    fraction = share(stats["requests"], stats["requested"])
    return fraction.size * jnp.sum(fraction * share(stats["probability"], stats["tokens"]))


def router_z(stats: Stats) -> Float[Array, ""]:
    """Mean squared logsumexp of the router's logits (Zoph et al. 2022, eq. 5)."""
    return share(stats["squared_logsumexp"], stats["tokens"])


BALANCERS: dict[str, Balancer] = {
    "load_balance": Balancer(load_balance, lambda moe: moe.load_balance),
    "router_z": Balancer(router_z, lambda moe: moe.router_z),
}


def check(moe: config.MoE) -> None:
    """Coefficients are not negative."""
    for name, balancer in BALANCERS.items():
        if balancer.coefficient(moe) < 0:
            raise ConfigError(
                f"model.moe.{name}={balancer.coefficient(moe)}: a negative coefficient unbalances; set 0 to turn it off"
            )
