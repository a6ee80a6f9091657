"""The train state, a plain tree: step, parameters, optimiser state, routing state. Made sharded, never gathered."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax import compat, config, sharding
from moejax.layers import transfer
from moejax.models.decoder import Decoder
from moejax.train import guard, optimizer, routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: Any
    """i32[], updates made."""
    parameters: Any
    """Nested dict of fp32 arrays."""
    optimizer: Any
    """optax state."""
    routing: Any
    """Of every kind of channel: see train/routing.py. Replicated."""
    guard: Any
    """Bad steps: see train/guard.py. Replicated."""


@dataclasses.dataclass(frozen=True)
class Built:
    """What turns a parameter tree into a model and an update."""

    graph: Any
    """nnx graph definition."""
    shardings: Any
    """Like the parameters."""
    routed: Any
    """Like the parameters: which belong to routed experts."""
    initial: Any
    """Like the parameters: factors of their initial values by the rules of transfer; None where there are no rules."""
    transform: optax.GradientTransformation
    config: config.Config
    mesh: jax.sharding.Mesh

    def model(self, parameters: Any) -> Decoder:
        """The module whose leaves are these parameters."""
        return nnx.merge(self.graph, parameters)


def build(cfg: config.Config, mesh: jax.sharding.Mesh) -> Built:
    """Shapes, shardings and the optimiser; no array is made."""
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: Decoder(cfg.model, rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(abstract)
    shardings = jax.tree.map(lambda v: sharding.of_parameter(v, mesh), variables, is_leaf=_is_parameter)
    decay = jax.tree.map(lambda v: v.get_metadata("decay"), variables, is_leaf=_is_parameter)
    routed = jax.tree.map(lambda v: sharding.of_experts(v.get_metadata("dims")), variables, is_leaf=_is_parameter)
    initial, rates = factors(cfg, mesh)
    transform = optimizer.make(cfg.train, nnx.to_pure_dict(decay), rates)
    return Built(graph, nnx.to_pure_dict(shardings), nnx.to_pure_dict(routed), initial, transform, cfg, mesh)


def factors(cfg: config.Config, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Trees like the parameters: factors of initial values and of learning rates by the rules of transfer; None where there are none."""
    rules = transfer.RULES[cfg.transfer.rules]
    if rules is None:
        return None, None

    def one(own: nnx.Param, tuned: nnx.Param) -> transfer.Factors:
        return rules[own.get_metadata("role")](own.get_metadata("fan_in") / tuned.get_metadata("fan_in"))

    own, tuned = (_outline(model, mesh) for model in (cfg.model, transfer.tuned(cfg.model, cfg.transfer)))
    both = nnx.to_pure_dict(jax.tree.map(one, own, tuned, is_leaf=_is_parameter))
    return tuple(
        jax.tree.map(lambda f, part=part: getattr(f, part), both, is_leaf=lambda x: isinstance(x, transfer.Factors))
        for part in ("init", "rate")
    )


def _outline(model: config.Model, mesh: jax.sharding.Mesh) -> Any:
    """The parameters' metadata. The tuned model need not fit the mesh, so all devices lie along the axis that cuts no parameter."""
    names = mesh.axis_names
    explicit = (jax.sharding.AxisType.Explicit,) * len(names)
    whole = jax.sharding.AbstractMesh((mesh.size, *(1 for _ in names[1:])), names, axis_types=explicit)
    with jax.sharding.use_abstract_mesh(whole):
        return nnx.state(jax.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))


def abstract(built: Built) -> Any:
    """Shape, type and sharding of every parameter; no array is made."""
    with jax.set_mesh(built.mesh):
        shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(Decoder(built.config.model, rngs=nnx.Rngs(0)))))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, built.shardings)


def create(built: Built) -> TrainState:
    """Step 0. The same numbers on every mesh."""

    def parameters(key: jax.Array) -> Any:
        model = Decoder(built.config.model, rngs=nnx.Rngs(key))
        drawn = nnx.to_pure_dict(nnx.state(model))
        return drawn if built.initial is None else jax.tree.map(lambda x, factor: x * factor, drawn, built.initial)

    with jax.set_mesh(built.mesh):
        draw = jax.jit(parameters, out_shardings=built.shardings, compiler_options=compat.quick_compile())
        values = draw(jax.random.key(built.config.train.seed))
    return begin(built, values)


def begin(built: Built, values: Any) -> TrainState:
    """Step 0 with these parameters, which lie as `built` says."""
    with jax.set_mesh(built.mesh):
        moments = jax.jit(built.transform.init)(values)
        whole = sharding.replicated(built.mesh)
        step = jax.device_put(jnp.zeros((), jnp.int32), whole)
        kept = jax.device_put(routing.init(built.config.model), whole)
        watched = jax.device_put(guard.init(), whole)
    return TrainState(step, values, moments, kept, watched)


def template(built: Built) -> TrainState:
    """Shapes and shardings of what a forward pass reads: step, parameters and routing state. No array is made of parameters."""
    whole = sharding.replicated(built.mesh)
    kept = jax.eval_shape(lambda: routing.init(built.config.model))
    kept = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), kept)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), abstract(built), None, kept, None)


def whole_template(built: Built) -> TrainState:
    """Shapes and shardings of all that a training step takes."""
    begun, whole = template(built), sharding.replicated(built.mesh)

    def lies(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.ndim else whole)

    with jax.set_mesh(built.mesh):
        moments = jax.tree.map(lies, jax.eval_shape(built.transform.init, begun.parameters))
    watched = jax.tree.map(lies, jax.eval_shape(guard.init))
    return dataclasses.replace(begun, optimizer=moments, guard=watched)


def count_parameters(built: Built, parameters: Any) -> tuple[int, int]:
    """Parameters in all, and those that one token meets: of routed experts, top_k of num_experts."""
    moe = built.config.model.moe
    sizes = [
        (x.size, routed) for x, routed in zip(jax.tree.leaves(parameters), jax.tree.leaves(built.routed), strict=True)
    ]
    active = sum(size * moe.top_k // moe.num_experts if routed else size for size, routed in sizes)
    return sum(size for size, _ in sizes), active


def _is_parameter(x: Any) -> bool:
    return isinstance(x, nnx.Param)
