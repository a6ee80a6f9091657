"""What the backward pass recomputes, by name. Routing is never decided again: its integers are always saved."""

from __future__ import annotations

from collections.abc import Callable

import jax

from moejax.errors import ConfigError
from moejax.moe.names import ASSIGNMENT, EXCHANGED

_save = jax.checkpoint_policies
_routing = _save.save_only_these_names(ASSIGNMENT)

POLICIES: dict[str, Callable | None] = {
    "none": None,
    "selective": _save.save_from_both_policies(_save.dots_saveable, _routing),
    "exchanged": _save.save_only_these_names(ASSIGNMENT, EXCHANGED),
    "full": _routing,
}
"""none saves everything; selective saves matmuls' results; exchanged saves rows as they arrive, so that no exchange is repeated; full
saves block inputs and the assignment alone."""


def check(name: str) -> None:
    if name not in POLICIES:
        raise ConfigError(f"model.remat={name!r} is not a policy; choose one of {', '.join(POLICIES)}")


def wrap(layer: Callable, name: str, *, scanned: bool) -> Callable:
    """A layer under the policy. Between the loops of a scan nothing can be merged; outside of one the compiler would find what is computed
    again to be there already, and keep it."""
    policy = POLICIES[name]
    return layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)
