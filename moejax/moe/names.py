"""Names of what rematerialisation may save, as constants, because policies match strings."""

from __future__ import annotations

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

ASSIGNMENT = "moe_assignment"
"""Integers and masks of routing: always saved, so that recompute never decides again."""
EXCHANGED = "moe_exchanged"
"""Rows as they arrive: saved, the backward pass exchanges nothing twice."""


def keep(x: Array, name: str) -> Array:
    """x, marked so that a policy can save it by name."""
    return checkpoint_name(x, name)
