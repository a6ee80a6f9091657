"""Rules that families share: what a published model calls its weights, how it lays them out, and the leaf of moejax that they become.

Published linear weights are [out, in], ours [in, …]. Steps work on one published tensor, and what gathers tensors comes last, so that a
part of a leaf can be made of the tensors it needs alone (stream.py). Lines go from names within a published layer to names within ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moejax import config
from moejax.checkpoint.hugging_face import depth
from moejax.checkpoint.rules import Rule
from moejax.checkpoint.transforms import Split, Stack, Transform, Transpose, Unstack

TURN = Transpose((1, 0))
BIAS = "routing/sparse/selection_bias"
"""[sparse layers, E], the state that a published correction bias becomes."""


class Line(NamedTuple):
    """A rule within one layer."""

    source: str
    target: str
    steps: tuple[Transform, ...] = ()


Part = Callable[[config.Model, str], list[Line]]
"""The lines of a mixer or channel of this name."""


def rules(model: config.Model, parts: Mapping[str, Part], prefix: str = "", correction: str = "") -> tuple[Rule, ...]:
    """The rules of a whole model.

    Args:
      parts: by mixer and channel of a layer.
      prefix: of every published name.
      correction: name, within a layer, of the bias on selection.
    """
    found = [
        Rule(f"{prefix}model.embed_tokens.weight", "parameters/embedding"),
        Rule(f"{prefix}model.norm.weight", "parameters/final_norm/scale"),
        Rule(f"{prefix}lm_head.weight", "parameters/unembedding", (TURN,)),
    ]
    for place in depth.places(model):
        lines = [*NORMS, *parts[place.mixer](model, place.mixer), *parts[place.channel](model, place.channel)]
        found += [
            Rule(
                f"{prefix}model.layers.{place.layers}.{line.source}",
                f"{place.target}/{line.target}",
                (*line.steps, *place.stack),
            )
            for line in lines
        ]
    sparse = depth.of_channel(model, "sparse")
    if model.moe.selection_bias and sparse:
        numbers = "|".join(map(str, sparse))
        found.append(Rule(f"{prefix}model.layers.{{layer:{numbers}}}.{correction}", BIAS, (Stack("layer", 0),)))
    return tuple(found)


NORMS = (
    Line("input_layernorm.weight", "mixer_norm/scale"),
    Line("post_attention_layernorm.weight", "channel_norm/scale"),
)


# ---- mixers -------------------------------------------------------------------------------------------------------


def grouped(model: config.Model, mixer: str) -> list[Line]:
    """Grouped-query attention, a matrix each for queries, keys, values and output."""
    options, heads = getattr(model, mixer), {"query": model.heads, "key": model.kv_heads, "value": model.kv_heads}
    found = [Line("self_attn.o_proj.weight", "mixer/out", (TURN, Split(0, model.heads, 0)))]
    for name, number in heads.items():
        found.append(Line(f"self_attn.{name[0]}_proj.weight", f"mixer/{name}", (TURN, Split(1, number, 1))))
        if options.bias:
            found.append(Line(f"self_attn.{name[0]}_proj.bias", f"mixer/{name}_bias", (Split(0, number, 0),)))
        if options.norm in ("head", "whole") and name != "value":
            steps = (Split(0, number, 0),) if options.norm == "whole" else ()
            found.append(Line(f"self_attn.{name[0]}_norm.weight", f"mixer/{name}_norm", steps))
    if options.out_bias:
        found.append(Line("self_attn.o_proj.bias", "mixer/out_bias"))
    if options.sinks:
        found.append(Line("self_attn.sinks", "mixer/sinks"))
    return found


def latent(model: config.Model, mixer: str) -> list[Line]:
    """Multi-head latent attention."""
    cut = Split(1, model.heads, 1)
    queries = [Line("self_attn.q_proj.weight", "mixer/query", (TURN, cut))]
    if model.latent.query_rank:
        queries = [
            Line("self_attn.q_a_proj.weight", "mixer/query_down", (TURN,)),
            Line("self_attn.q_a_layernorm.weight", "mixer/query_norm/scale"),
            Line("self_attn.q_b_proj.weight", "mixer/query_up", (TURN, cut)),
        ]
    return [
        *queries,
        Line("self_attn.kv_a_proj_with_mqa.weight", "mixer/latent_down", (TURN,)),
        Line("self_attn.kv_a_layernorm.weight", "mixer/latent_norm/scale"),
        Line("self_attn.kv_b_proj.weight", "mixer/latent_up", (TURN, cut)),
        Line("self_attn.o_proj.weight", "mixer/out", (TURN, Split(0, model.heads, 0))),
    ]


MIXERS: dict[str, Part] = {"attention": grouped, "local": grouped, "latent": latent}


# ---- channels -----------------------------------------------------------------------------------------------------


def dense(source: str, target: str = "channel/mlp") -> list[Line]:
    """A gated feed-forward layer: its gate and up projections lie side by side in ours."""
    return [
        Line(f"{source}.{{part:gate_proj|up_proj}}.weight", f"{target}/gate_up", (TURN, Stack("part", 1))),
        Line(f"{source}.down_proj.weight", f"{target}/down", (TURN,)),
    ]


def router(source: str, *, bias: bool = False) -> list[Line]:
    """The matrix that scores experts, and its own bias."""
    found = [Line(f"{source}.weight", "channel/router/logits", (TURN,))]
    return [*found, Line(f"{source}.bias", "channel/router/logits_bias")] if bias else found


def shared(model: config.Model, source: str) -> list[Line]:
    """The shared expert, where the model has one."""
    return dense(source, "channel/shared") if model.moe.shared_hidden else []


def experts(model: config.Model, source: str, names: str = "gate_proj|up_proj|down_proj") -> list[Line]:
    """Three matrices for each expert. `names` are those of gate, up and down."""
    numbers = f"{{expert:0..{model.moe.num_experts - 1}}}"
    line = Line(
        f"{source}.{numbers}.{{part:{names}}}.weight",
        "channel/experts/0/{part:gate|up|down}",
        (TURN, Stack("expert", 0)),
    )
    return [line]


def fused(source: str, target: str, *, axis: int, alternating: int = 0) -> Line:
    """Gate and up of all experts in one tensor, along its last dimension `axis`: first one, then the other, or of `alternating` pairs one
    column each."""
    one_by_one, in_turn = (
        (Split(axis, 2, 0), Unstack("part", 0)),
        (Split(axis, alternating, axis), Unstack("part", axis + 1)),
    )
    return Line(source, f"channel/experts/0/{target}", in_turn if alternating else one_by_one)


def mlp_rules(model: config.Model) -> tuple[Rule, ...]:
    """Of models whose layers have an `mlp`, dense or with experts; a shared expert and a bias on selection where the model has them."""

    def sparse(model: config.Model, channel: str) -> list[Line]:
        return [*router("mlp.gate"), *experts(model, "mlp.experts"), *shared(model, "mlp.shared_experts")]

    parts = MIXERS | {"dense": lambda model, channel: dense("mlp"), "sparse": sparse}
    return rules(model, parts, correction="mlp.gate.e_score_correction_bias")
