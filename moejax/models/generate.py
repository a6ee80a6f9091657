"""Text from a model: prompts in pieces of one size, then token by token, with shapes that do not depend on what is asked.

A row's tokens do not depend on its neighbours: batch, cache and pieces have fixed sizes, no expert has a limit, and a row draws its samples
by its own number and position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax import config, sharding
from moejax.arrays import Batch
from moejax.errors import ConfigError, UserError
from moejax.layers import kinds
from moejax.models.decoder import Cache, Decoder, Routing, empty_cache
from moejax.moe.inputs import Mode
from moejax.moe.routers import ROUTERS


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Only so many of the most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Only the fewest most likely tokens that reach this probability together."""
    seed: int = 0
    """Root of the draws, which depend on it, the sequence and the position alone."""


class Sizes(NamedTuple):
    """Shapes of what is compiled."""

    rows: int
    """Sequences at a time."""
    positions: int
    """Room for prompt and answer together."""
    piece: int = 32
    """Positions of a prompt that are read at a time."""


class Turn(NamedTuple):
    """What goes from step to step."""

    cache: Cache
    hidden: Float[Array, "B D"]
    """Of the last valid token of each row."""


class Generator:
    """The two compiled programs of one model: a piece of the prompts, and one token of every row."""

    def __init__(
        self, model: config.Model, build: Callable[[Any], Decoder], mesh: jax.sharding.Mesh, sizes: Sizes
    ) -> None:
        check(model, mesh, sizes)
        self.model, self.mesh, self.sizes, self._build = model, mesh, sizes, build
        self.read = jax.jit(self._extend, donate_argnums=(3,))
        """(parameters, routing, step, turn, tokens, valid) -> the turn after these tokens."""
        self._next = jax.jit(self._sample, static_argnames="sampling")

    def stream(
        self,
        parameters: Any,
        routing: Routing,
        step: int,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        sampling: Sampling = Sampling(),
        stop: Sequence[int] = (),
    ) -> Iterator[Int[np.ndarray, " n"]]:
        """Token by token, one of every prompt; -1 for a sequence that has met one of `stop`. Ends when all have, or after `tokens`.
        `step` is the number of updates that parameters and routing have seen.

        Raises UserError where prompts do not fit the sizes.
        """
        rows, room, piece = self.sizes
        longest = max((len(p) for p in prompts), default=0)
        if not prompts or len(prompts) > rows or min(len(p) for p in prompts) < 1 or longest + tokens > room:
            raise UserError(
                f"{len(prompts)} prompts of up to {longest} tokens and {tokens} more each: between 1 and {rows} prompts, none empty, and "
                f"{room} positions for both; ask for fewer tokens, or raise --rows or --positions"
            )
        with jax.set_mesh(self.mesh):
            turn, made = self._begin(), jnp.int32(step)
            for start in range(0, longest, piece):
                turn = self.read(parameters, routing, made, turn, *self._piece(prompts, start))
            alive = np.zeros(rows, bool)
            alive[: len(prompts)] = True
            for _ in range(tokens):
                drawn = self._next(parameters, turn, sampling=sampling)
                found = np.asarray(drawn)
                alive &= ~np.isin(found, stop)
                yield np.where(alive, found, -1)[: len(prompts)]
                if not alive.any():
                    return
                given = np.where(alive, found, 0)[:, None].astype(np.int32)
                turn = self.read(parameters, routing, made, turn, *self._put(given, alive[:, None]))

    def template(self, positions: int) -> tuple[Turn, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes and shardings of what `read` takes last: a turn, and so many tokens of every row."""

        def lies(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(self.mesh, x.sharding.spec))

        with jax.set_mesh(self.mesh):
            turn = jax.tree.map(lies, jax.eval_shape(self._begin))
        shape, where = (self.sizes.rows, positions), sharding.batch_sharding(self.mesh)
        tokens, valid = (jax.ShapeDtypeStruct(shape, dtype, sharding=where) for dtype in (jnp.int32, jnp.bool_))
        return turn, tokens, valid

    def _begin(self) -> Turn:
        rows, room, _ = self.sizes
        hidden = jnp.zeros((rows, self.model.width), jnp.dtype(self.model.compute_dtype))
        return Turn(empty_cache(self.model, rows, room), jax.reshard(hidden, sharding.spec("batch", None)))

    def _piece(self, prompts: Sequence[Sequence[int]], start: int) -> tuple[Array, Array]:
        """Positions from `start` on of every prompt; rows that have none left are invalid."""
        tokens = np.zeros((self.sizes.rows, self.sizes.piece), np.int32)
        valid = np.zeros(tokens.shape, bool)
        for row, prompt in enumerate(prompts):
            own = np.asarray(prompt[start : start + self.sizes.piece], np.int32)
            tokens[row, : len(own)], valid[row, : len(own)] = own, True
        return self._put(tokens, valid)

    def _put(self, tokens: np.ndarray, valid: np.ndarray) -> tuple[Array, Array]:
        where = sharding.batch_sharding(self.mesh)
        return jax.device_put(tokens, where), jax.device_put(valid, where)

    def _extend(
        self,
        parameters: Any,
        routing: Routing,
        step: Array,
        turn: Turn,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
    ) -> Turn:
        """The cache with these tokens, and the hidden vector of each row's last valid one so far."""
        ids = jax.reshard(jnp.arange(tokens.shape[0], dtype=jnp.int32), sharding.spec("batch"))
        batch = Batch(tokens, tokens, jnp.ones_like(tokens), valid, jnp.zeros_like(tokens), ids)
        mode, key = Mode(training=False, capacity_factor=None), jax.random.key(0)  # nothing is drawn
        hidden, cache = self._build(parameters).decode(batch, key, mode, routing, step, turn.cache)
        last = jnp.sum(valid, axis=1, dtype=jnp.int32) - 1
        hit = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] == last[:, None]
        newest = jnp.sum(jnp.where(hit[..., None], hidden, 0), axis=1, dtype=hidden.dtype)
        return Turn(cache, jnp.where((last >= 0)[:, None], newest, turn.hidden))

    def _sample(self, parameters: Any, turn: Turn, sampling: Sampling) -> Int[Array, " B"]:
        logits = self._build(parameters).logits(turn.hidden[:, None])[:, 0]
        return draw(jax.reshard(logits, sharding.spec(None, None)), turn.cache.filled, sampling)


def draw(logits: Float[Array, "B V"], position: Int[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """The next token of every row, by the row's number and position."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = kept(logits / sampling.temperature, sampling)

    def of_row(row: Array, place: Array, logits: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), place)
        return jax.random.categorical(key, logits)

    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
    return jax.vmap(of_row)(rows, jax.reshard(position, sharding.spec(None)), logits).astype(jnp.int32)


def kept(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """-inf where `top_k` or `top_p` (Holtzman et al. 2019, nucleus sampling) leave a token out; ties at the limit stay."""
    largest = -jnp.sort(-logits, axis=-1)
    least = jnp.full_like(logits[:, :1], -jnp.inf)
    if sampling.top_k:
        least = largest[:, min(sampling.top_k, logits.shape[1]) - 1 :][:, :1]
    if sampling.top_p < 1:
        share = jax.nn.softmax(jnp.where(largest >= least, largest, -jnp.inf), axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        least = jnp.maximum(
            least, jnp.min(jnp.where(before < sampling.top_p, largest, jnp.inf), axis=-1, keepdims=True)
        )
    return jnp.where(logits >= least, logits, -jnp.inf)


def check(model: config.Model, mesh: jax.sharding.Mesh, sizes: Sizes) -> None:
    """Decoding a token at a time gives what a whole row would."""
    moe, kind = model.moe, ROUTERS[model.moe.router]
    if min(sizes) < 1 or sizes.piece > sizes.positions:
        raise ConfigError(f"{sizes}: at least 1 each, and a piece not longer than the positions")
    if kinds.number(model, "sparse"):
        if not kind.causal or kind.bounded or kind.always_random or moe.sinkhorn:
            raise ConfigError(
                f"model.moe.router={moe.router} with sinkhorn={moe.sinkhorn} looks at a whole group at a time or draws by it, and "
                f"a decoder has one token of it; generate with a model whose router is causal, dropless and not random"
            )
        if moe.group_rows > 1 or moe.group_window is not None:
            raise ConfigError(
                f"model.moe.group_rows={moe.group_rows}, group_window={moe.group_window}: rows decode alone; set 1 and null"
            )
    sparse = kinds.number(model, "sparse")
    cut = sharding.shards(mesh, sharding.LAYOUTS[moe.tensor].position if sparse else "position")
    if cut > 1:
        raise ConfigError(
            f"the mesh cuts positions over {cut} devices, and a token has one; set mesh.context=1, and with model.moe.tensor=experts "
            f"mesh.tensor=1"
        )
    parts = sharding.shards(mesh, "batch")
    if sizes.rows % parts:
        raise ConfigError(f"{sizes.rows} rows do not lie evenly over {parts} devices; choose a multiple of {parts}")


def check_sampling(sampling: Sampling) -> None:
    """Numbers that draw something."""
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ConfigError(
            f"temperature={sampling.temperature}, top_k={sampling.top_k}, top_p={sampling.top_p}: none negative, top_p in (0, 1]"
        )
