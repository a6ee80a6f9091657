"""What the router of a layer sees of the tokens: logits, noise and masks, in groups."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax import config
from moejax.moe import assignment, noise, pieces, routers
from moejax.moe.pieces import Pieces
from moejax.moe.records import Inputs, State, columns


@dataclasses.dataclass(frozen=True)
class Mode:
    """What differs between training and the kinds of evaluation; static."""

    training: bool
    """Noise is drawn."""
    capacity_factor: float | None
    """None is dropless."""
    label_kinds: int = 0
    """Kinds of labels to tabulate against experts, and experts against each other; 0 for no table."""
    record: bool = False
    """Return the integers of routing as well."""


class Tokens(NamedTuple):
    """What routing needs to know of the tokens beside their vectors, for all positions of a row on every device."""

    valid: Bool[Array, "B T"]
    labels: Int[Array, "B T"]
    row_ids: Int[Array, " B"]
    ids: Int[Array, "B T"]
    """Vocabulary ids, for routers that hash them."""
    positions: Int[Array, "B T"] | None = None
    """Positions in the row; None counts from 0."""


class Moment(NamedTuple):
    """When and where a layer runs: together with a row's id this seeds its noise."""

    key: Array
    """The step's noise key."""
    layer: Int[Array, ""]
    """Depth of the layer."""
    step: Int[Array, ""]
    """Updates made."""


def of_rows(
    x: Array,
    tokens: Tokens,
    heads: dict[str, Array],
    state: State,
    moment: Moment,
    moe: config.MoE,
    mode: Mode,
    cut: Pieces,
) -> Inputs:
    """Whole groups of a device's rows; x are its own positions of them, `tokens` all."""
    positions, kind = cut.positions, routers.ROUTERS[moe.router]

    def draw(use: str, *shape: int) -> Array:
        return noise.uniform(moment.key, moment.layer, tokens.row_ids, use, *shape)

    def in_groups(rows: Array | None) -> Array | None:
        return None if rows is None else assignment.group(rows, moe)

    seen = x
    if mode.training and moe.jitter > 0:
        seen = routers.jittered(x, pieces.own(draw("jitter", positions, x.shape[2]), cut), moe.jitter)
    logits = {
        name: assignment.group(pieces.whole(routers.logits(seen, weight, heads.get(f"{name}_bias")), cut), moe)
        for name, weight in heads.items()
        if weight.ndim == 2
    }
    drawn, hidden = None, None
    if kind.noise(moe) and (mode.training or kind.always_random):
        drawn = draw("router", positions, kind.noise(moe))
    if mode.training and moe.router_dropout > 0:
        hidden = draw("dropout", positions, columns(moe)) < moe.router_dropout
    counted = jnp.broadcast_to(jnp.arange(positions, dtype=jnp.int32)[None], tokens.ids.shape)
    where = counted if tokens.positions is None else tokens.positions
    valid = assignment.group(tokens.valid, moe)
    nothing = jnp.zeros_like(valid, shape=(*valid.shape, columns(moe)), dtype=jnp.float32)
    return Inputs(
        logits=logits.get("logits", nothing),
        spread=logits.get("spread"),
        valid=valid,
        ids=assignment.group(tokens.ids, moe),
        position=assignment.group(where, moe),
        noise=in_groups(drawn),
        hidden=in_groups(hidden),
        state=state,
        layer=moment.layer,
        step=moment.step,
    )
