"""Multi-head latent attention (DeepSeek-V2 2024, section 2.1; DeepSeek-V3 2024, eq. 1 to 11)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import config, sharding
from moejax.errors import ConfigError
from moejax.layers import context, init, positions
from moejax.layers.attend import attend, stored
from moejax.layers.attention import Cache
from moejax.layers.context import View, Where
from moejax.layers.norms import RMSNorm


class LatentAttention(nnx.Module):
    """Keys and values of all heads from one narrow vector a position, beside one key that turns and is the same for all heads.

    A cache keeps the narrow vector and the turned key; keys and values are made from it anew at every step.
    """

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        own, d, h = model.latent, model.width, model.heads
        self.options, self.interleaved, self.queries = own, model.rope.interleaved, model.query_chunk
        self.scale = (own.nope + own.rope) ** -0.5 * positions.score_scale(model.rope)
        rank = own.query_rank
        up = rank or d
        query = init.normal(rngs, (up, h, own.nope + own.rope), ("storage", "heads", None), fan_in=up)
        self.query, self.query_up = (None, query) if rank else (query, None)
        self.query_down = init.normal(rngs, (d, rank), ("storage", None), fan_in=d) if rank else None
        self.query_norm = RMSNorm(rank, own.norm_epsilon) if rank else None
        self.latent_down = init.normal(rngs, (d, own.rank + own.rope), ("storage", None), fan_in=d)
        self.latent_norm = RMSNorm(own.rank, own.norm_epsilon)
        shape = own.rank, h, own.nope + own.value
        self.latent_up = init.normal(rngs, shape, ("storage", "heads", None), fan_in=own.rank)
        gain = (2 * config.depth(model)) ** -0.5
        shape = h, own.value, d
        self.out = init.normal(rngs, shape, ("heads", None, "storage"), fan_in=h * own.value, gain=gain)

    def __call__(self, x: Float[Array, "B T D"], view: View, cache: Cache) -> tuple[Float[Array, "B T D"], Cache]:
        """The output, and the cache with these positions; an empty cache stays empty."""
        own, vectors = self.options, sharding.spec("batch", "position", None)
        query = self._query(x)
        query = self._turn(query, view, first=own.nope)
        narrow = jnp.einsum("btd,dr->btr", x, sharding.gather(self.latent_down, x.dtype), out_sharding=vectors)
        latent, turning = self.latent_norm(narrow[..., : own.rank]), narrow[..., own.rank :]
        turning = positions.rotate(turning[:, :, None], view.cosine, view.sine, self.interleaved)[:, :, 0]
        if cache:
            assert view.filled is not None
            latent, turning = (
                stored(cache[name], new, view.filled) for name, new in (("latent", latent), ("turning", turning))
            )
            cache = {"latent": latent, "turning": turning}
            latent, turning = latent.astype(x.dtype), turning.astype(x.dtype)
        both = jnp.einsum("bsr,rhk->bshk", latent, sharding.gather(self.latent_up, x.dtype))
        shared = jnp.broadcast_to(turning[:, :, None], (*both.shape[:3], own.rope))
        where = sharding.spec("batch", "position", "heads", None)
        key = jnp.concatenate([both[..., : own.nope], jax.reshard(shared, where)], axis=-1)
        y = attend(query, key, both[..., own.nope :], view.mask, scale=self.scale, queries=self.queries)
        return jnp.einsum("bthk,hkd->btd", y, sharding.gather(self.out, x.dtype), out_sharding=vectors), cache

    def _query(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H d"]:
        if self.query is not None:
            return jnp.einsum("btd,dhk->bthk", x, sharding.gather(self.query, x.dtype))
        assert self.query_down is not None and self.query_norm is not None and self.query_up is not None
        narrow = jnp.einsum("btd,dr->btr", x, sharding.gather(self.query_down, x.dtype))
        return jnp.einsum("btr,rhk->bthk", self.query_norm(narrow), sharding.gather(self.query_up, x.dtype))

    def _turn(self, x: Float[Array, "B T H d"], view: View, first: int) -> Float[Array, "B T H d"]:
        turned = positions.rotate(x[..., first:], view.cosine, view.sine, self.interleaved)
        return jnp.concatenate([x[..., :first], turned], axis=-1)


def view(model: config.Model, where: Where, filled: Array | None) -> View:
    """What layers of latent attention see: everything before, in the same document."""
    turn = positions.angles(where.queries, model.rope, model.rope_theta, model.latent.rope)
    return View(context.visible(where, 0, 0), *turn, None, filled)


def cache(model: config.Model, rows: int, size: int, dtype: jnp.dtype) -> Cache:
    """Zeros with room for `size` positions."""
    where, widths = (
        sharding.spec("batch", "position", None),
        {"latent": model.latent.rank, "turning": model.latent.rope},
    )
    return {name: jax.reshard(jnp.zeros((rows, size, width), dtype), where) for name, width in widths.items()}


def check(model: config.Model) -> None:
    """The rules of latent attention."""
    own = model.latent
    if min(own.rank, own.nope, own.rope, own.value, model.heads) < 1 or own.query_rank < 0 or own.rope % 2:
        raise ConfigError(
            f"model.latent: rank={own.rank}, nope={own.nope}, rope={own.rope}, value={own.value} and model.heads={model.heads} are at "
            f"least 1, rope even, and query_rank={own.query_rank} a width or 0"
        )
    if own.value > own.nope + own.rope:
        raise ConfigError(
            f"model.latent.value={own.value} is wider than a key, nope + rope = {own.nope + own.rope}; choose at most that"
        )
    if model.rope.fraction != 1:
        raise ConfigError(
            f"model.rope.fraction={model.rope.fraction}: latent attention turns model.latent.rope dimensions; set it to 1.0"
        )
