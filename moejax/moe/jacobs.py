"""The two losses of Jacobs, Jordan, Nowlan and Hinton 1991, "Adaptive mixtures of local experts": experts that blend, and
experts that compete. All experts see every case (dense gating). N cases, E experts, O outputs of each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def averaged_error(
    gate_logits: Float[Array, "N E"], outputs: Float[Array, "N E O"], target: Float[Array, "N O"]
) -> Float[Array, " N"]:
    """||d - sum_i p_i o_i||^2 with p = softmax(gate_logits) (their eq. 1.1).

    An expert's gradient has the residual of the blend: each makes up for what the others leave, so they co-operate.
    """
    blend = jnp.einsum("ne,neo->no", jax.nn.softmax(gate_logits), outputs)
    return jnp.sum((target - blend) ** 2, axis=-1)


def competitive_nats(
    gate_logits: Float[Array, "N E"], outputs: Float[Array, "N E O"], target: Float[Array, "N O"]
) -> Float[Array, " N"]:
    """-log sum_i p_i exp(-||d - o_i||^2 / 2) in nats, p = softmax(gate_logits) (their eq. 1.3).

    Up to a constant, the negative log likelihood of a mixture of Gaussians of variance 1. An expert's gradient is its own
    error times its posterior share of the case (eq. 1.5): who does better gets more of it, so they divide the cases.
    """
    error = jnp.sum((target[:, None] - outputs) ** 2, axis=-1)
    return -jax.nn.logsumexp(jax.nn.log_softmax(gate_logits) - error / 2, axis=-1)
