"""Parameters of a model by part, read off the modules that hold them. No array is made and no device is started."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import NamedTuple

import jax
from flax import nnx

from moejax import config, mesh, sharding
from moejax.errors import UserError
from moejax.moe.records import columns, mean_k
from moejax.moe.routers import ROUTERS

ONE_DEVICE = jax.sharding.AbstractMesh(
    (1,) * len(mesh.AXES), mesh.AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(mesh.AXES)
)
"""What modules need to be outlined, without a device."""
IN_CHANNEL = {"mlp": "dense", "into": "latent", "out": "latent", "shared_gate": "shared"}
"""Parts that are called otherwise than the modules of a channel."""
NOT_QUANTIZED = {"router", "unembedding"}
"""Matrices that a quantised model keeps as they are; embeddings are none."""
ORDER = (
    "embedding", "norms", "mixers", "dense", "router", "latent", "experts", "constants", "shared", "further", "unembedding",
)  # fmt: skip
"""Of parts in an account."""
SUMMED = ("out", "join")
"""Matrices with more than one dimension that is summed over: all but the last."""


class Part(NamedTuple):
    """Parameters of one kind in all layers."""

    name: str
    parameters: int
    active: int
    """Those that one token meets, on average over tokens where routers choose; rounded to the nearest whole number."""
    multiplied: int
    """Weights of matmuls that one token goes through, a weight twice where it is used twice: 2 FLOPs each in a forward pass."""
    matrices: int = 0
    """Weights that are kept in fewer bits where a model is quantised: those of matmuls."""
    scales: int = 0
    """Output columns of these matrices, each of which then has a scale."""
    decoding: bool = True
    """Takes part in decoding; else in training and in reading a source alone."""


class Leaf(NamedTuple):
    """One parameter."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    """In one layer."""
    layers: int
    routed: bool
    """Belongs to routed experts; dimension 0 counts them."""
    matrix: bool
    """A weight of a matmul."""

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.layers

    @property
    def columns(self) -> int:
        """Outputs, each a sum of its own."""
        if self.routed:
            return self.layers * self.shape[0] * self.shape[-1]
        return self.layers * (self.shape[-1] if self.path[-1] in SUMMED else math.prod(self.shape[1:]))


class Visits(NamedTuple):
    """Of routed experts, what a token does on average."""

    met: Fraction
    """Experts whose parameters it meets."""
    rows: Fraction
    """Rows of experts that are computed for it."""


NONE = Visits(Fraction(0), Fraction(0))


def visits(moe: config.MoE, group: int | None) -> Visits:
    """Experts of a token, all experts taken equally often and none of its requests dropped.

    Token choice: top_k, also with top_p, which may take fewer; mean_k where a router steers the number. Expert choice: capacity_factor
    times top_k. Soft: parameters of all experts, and num_experts * soft_slots rows for the `group` tokens of a group. Zero-computation
    experts take their part of the choices, zero_share of them if it is set, and cost nothing.

    Raises UserError for a soft router without the size of a group.
    """
    kind, experts = ROUTERS[moe.router], Fraction(moe.num_experts)
    if kind.soft:
        if group is None:
            raise UserError(
                f"model.moe.router={moe.router}: what a token costs depends on the tokens of a group; give a whole Config, whose "
                f"data.context says how many, or set model.moe.group_window"
            )
        return Visits(experts, experts * moe.soft_slots / group)
    wanted = Fraction(moe.top_k)
    if not kind.token_choice:
        wanted = min(experts, Fraction(str(moe.capacity_factor)) * moe.top_k)
    elif "mean_k" in kind.reads:
        wanted = Fraction(str(mean_k(moe)))
    computed = experts / columns(moe) if moe.zero_share is None else 1 - Fraction(str(moe.zero_share))
    return Visits(wanted * computed, wanted * computed)


def leaves(make: Callable[[nnx.Rngs], nnx.Module], layers: int = 1) -> list[Leaf]:
    """Every parameter of a module, in so many equal layers. What is stacked over layers counts in each."""
    with jax.sharding.use_abstract_mesh(ONE_DEVICE):
        state = nnx.state(jax.eval_shape(lambda: make(nnx.Rngs(0))))
    found = []
    for path, variable in nnx.to_flat_state(state):
        shape, dims = variable.get_value().shape, variable.get_metadata("dims")
        stacked = len(shape) - len(dims)
        found.append(
            Leaf(
                tuple(str(name) for name in path),
                shape[stacked:],
                math.prod(shape[:stacked]) * layers,
                sharding.of_experts(dims),
                variable.get_metadata("decay"),  # all matrices decay, and nothing else does
            )
        )
    return found


def in_channel(path: tuple[str, ...]) -> str:
    """The part that a parameter of a channel belongs to, by its path."""
    return IN_CHANNEL.get(path[0], path[0])


def name_of(path: tuple[str, ...]) -> str:
    """The part that a parameter of a Decoder belongs to, by its path."""
    if path[0] in ("first", "blocks"):
        path = path[3:] if path[0] == "blocks" else path[2:]
        if path[0] == "mixer":
            return "mixers"
        if path[0] == "channel":
            return in_channel(path[1:])
    return "norms" if path[0].endswith("_norm") else path[0]


def by_part(own: Iterable[Leaf], name: Callable[[tuple[str, ...]], str]) -> dict[str, list[Leaf]]:
    """Parameters by the part that `name` says."""
    found: dict[str, list[Leaf]] = {}
    for leaf in own:
        found.setdefault(name(leaf.path), []).append(leaf)
    return found


def of_leaves(name: str, own: Iterable[Leaf], visited: Visits, experts: int, decoding: bool = True) -> Part:
    """Counts of the parameters of one part; of routed experts a token meets some."""
    own, zero = list(own), Fraction(0)
    share = lambda leaf, visits: leaf.size * visits / experts if leaf.routed else leaf.size  # noqa: E731
    matrices = [leaf for leaf in own if leaf.matrix]
    quantized = [leaf for leaf in matrices if not NOT_QUANTIZED.intersection(leaf.path)]
    return Part(
        name,
        parameters=sum(leaf.size for leaf in own),
        active=round(sum((share(leaf, visited.met) for leaf in own), zero)),
        multiplied=round(sum((share(leaf, visited.rows) for leaf in matrices), zero)),
        matrices=sum(leaf.size for leaf in quantized),
        scales=sum(leaf.columns for leaf in quantized),
        decoding=decoding,
    )


def merged(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Parts of one name added, in the order of ORDER."""
    found: dict[tuple[str, bool], Part] = {}
    for part in parts:
        key = part.name, part.decoding
        found[key] = _sum(found[key], part) if key in found else part
    return tuple(sorted(found.values(), key=lambda part: ORDER.index(part.name.removeprefix("encoder "))))


def _sum(a: Part, b: Part) -> Part:
    """Of two parts with one name."""
    numbers = ("parameters", "active", "multiplied", "matrices", "scales")
    return a._replace(**{name: getattr(a, name) + getattr(b, name) for name in numbers})
