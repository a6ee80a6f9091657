"""What a transport must know before it sees a token."""

from __future__ import annotations

import dataclasses

import jax

from moejax.collectives import Axes


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes. Experts lie in order: device i of the expert axes owns [i * local, (i + 1) * local)."""

    experts: int
    """E, routed experts of the layer."""
    capacity: int
    """C_max, slots per expert and group in a buffer."""
    shards: int
    """Devices along the expert axes."""
    tokens: int
    """Tokens of a group on this device: S, or its piece of S."""
    axis: Axes
    """Mesh axes that experts lie along."""
    cut: Axes = ()
    """Mesh axes that a group's tokens lie along."""
    buffer: float = 1.25
    """Rows that a device can receive in one round of an exchange, as a multiple of its fair share."""
    exchange: str = "auto"
    """How rows are exchanged, a name in moejax.moe.transport.exchange.EXCHANGES, or auto."""
    by_token: bool = False
    """Whether a group's assignments lie token by token, equally many of each."""
    classes: int = 1
    """Widths of experts; a device holds equally many of each, class by class."""

    @property
    def local(self) -> int:
        """Experts of one device."""
        return self.experts // self.shards
