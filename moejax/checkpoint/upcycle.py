"""Dense to sparse: experts begin as copies of a trained feed-forward layer (Komatsuzaki et al. 2022, Sparse Upcycling).

With experts of the layer's width each is a copy. With experts of a part of it (granular) the hidden width is cut into parts, experts
are copies of parts, and the router's columns are equal within a copy, so that a token chooses whole copies (He et al. 2024, "Upcycling
LLMs into Mixture of Experts", virtual groups). A token's gates add up to gate_scale, and each part is needed once, so the down
projection is multiplied by parts / gate_scale.
"""

from __future__ import annotations

from moejax import config
from moejax.checkpoint import gates
from moejax.checkpoint.entries import Noise, Select, Tile
from moejax.checkpoint.gates import Verdict
from moejax.checkpoint.rules import drop, fresh
from moejax.checkpoint.surgery import Part, Surgery, make, places, require_same
from moejax.checkpoint.transforms import Split, Unstack
from moejax.errors import ConfigError
from moejax.moe import widths


def upcycle(
    source: config.Model, target: config.Model, *, noise: float = 0.0, seed: int = 0, moments: bool = True
) -> Surgery:
    """The dense layers of `source` that are sparse in `target` become experts.

    Args:
      noise: standard deviation of what is added to each expert's weights, in standard deviations of the weights.
      seed: of the noise.
      moments: take the optimiser's moments along; those of the router begin at 0.

    Preserves the function where a token's gates add up to a constant, without noise; the surgery's `why` says so.
    """
    require_same(source, target, "upcycle")
    chosen = [i for i in places(target, "sparse") if i in places(source, "dense")]
    if not chosen or places(source, "sparse"):
        raise ConfigError(
            f"upcycle makes sparse layers of dense ones: model.pattern is {source.pattern} in the source and {target.pattern} in the "
            f"target; begin with dense layers, and make some of them sparse"
        )
    parts = _check(source, target)
    verdict = gates.of_upcycling(target.moe, parts)
    if noise:
        verdict = Verdict(False, f"noise={noise} moves the weights of every expert")
    found = [part for i in chosen for part in _layer(i, target.moe, parts, noise, seed)]
    routing = [drop("routing/{leaf:*}"), fresh("routing/{leaf:*}")]
    return make("upcycle", found, routing, verdict, moments=moments)


def _layer(i: int, moe: config.MoE, parts: int, noise: float, seed: int) -> list[Part]:
    """Expert e is part e % parts of copy e // parts."""
    channel = f"blocks/layers/{i}/channel"
    copies = Tile(1, moe.num_experts // parts)
    drawn = (Noise(noise, seed),) if noise else ()
    first = Select((tuple(e - e % parts for e in range(moe.num_experts)),), 2)
    return [
        Part(
            f"{channel}/mlp/gate_up", f"{channel}/experts/0/{{half:gate|up}}",
            (Unstack("half", 2), Split(2, parts, 1), copies), noise=drawn,
        ),
        Part(
            f"{channel}/mlp/down", f"{channel}/experts/0/down", (Split(1, parts, 1), copies), parts / moe.gate_scale, drawn
        ),
        Part(None, f"{channel}/router/{{head:*}}", (first,) if parts > 1 else ()),
        Part(None, f"{channel}/experts/0/{{bias:gate_bias|up_bias|down_bias}}"),
        Part(None, f"{channel}/{{own:constants|shared_gate|shared/gate_up|shared/down}}"),
    ]  # fmt: skip


def _check(source: config.Model, target: config.Model) -> int:
    """The parts that the hidden width is cut into. Raises ConfigError where experts cannot be parts of the dense layer."""
    moe = target.moe
    if moe.latent or len(widths.of_classes(moe)) > 1 or (moe.activation, moe.activation_clamp) != ("swiglu", None):
        raise ConfigError(
            f"upcycle makes experts of a SwiGLU layer of the model's width: set model.moe.latent=0 (it is {moe.latent}), hidden_classes=() "
            f"({moe.hidden_classes}), activation=swiglu ({moe.activation}) and activation_clamp=null ({moe.activation_clamp})"
        )
    hidden, parts = widths.of_classes(moe)[0], source.hidden // widths.of_classes(moe)[0]
    if parts < 1 or source.hidden % hidden or moe.num_experts % parts:
        raise ConfigError(
            f"model.moe.hidden={hidden} with num_experts={moe.num_experts}: experts are equal parts of the dense layer's model.hidden="
            f"{source.hidden} and make whole copies of it; set model.moe.hidden={source.hidden}, or that over a divisor of the experts"
        )
    return parts
