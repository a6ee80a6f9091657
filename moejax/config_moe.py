"""Options of the sparse feed-forward layer: the section `model.moe` of a config."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class MoE:
    """The sparse feed-forward layer."""

    num_experts: int = 16
    """E, routed experts per layer."""
    top_k: int = 2
    """K, experts a token chooses; the static maximum where a router decides how many."""
    hidden: int = 96
    """F, hidden width of one expert."""
    hidden_classes: tuple[int, ...] = ()
    """Hidden widths of equal shares of the experts, in order of their ids, in place of `hidden`; empty for one width."""
    latent: int = 0
    """Width the routed experts work in, between a down- and an up-projection; 0 for the model's own."""
    activation: str = "swiglu"
    """What experts do between their matmuls, a name in moejax.kernels.activations.KINDS."""
    activation_clamp: float | None = None
    """Limit of a gated activation: the gate from above, the other factor on both sides (gpt-oss uses 7); a spike guard."""
    expert_bias: bool = False
    """Add a learned bias after each of the experts' matmuls."""
    shared_hidden: int = 0
    """Hidden width of the shared expert that every token visits; 0 for none."""
    shared_gate: bool = False
    """Multiply the shared expert's output by a learned sigmoid of the token."""
    zero_experts: tuple[str, ...] = ()
    """Zero-computation experts with ids past E, each one of moejax.moe.zero_experts.KINDS; any number."""
    zero_share: float | None = None
    """Share of assignments that balancers steer to zero-computation experts; None treats them as any other expert."""
    router: str = "topk"
    """Kind of router, a name in moejax.moe.routers.ROUTERS."""
    score: str = "softmax"
    """What logits become before they are gates, a name in moejax.moe.scores.SCORES."""
    router_bias: bool = False
    """Add a learned bias to the router's logits."""
    gate_at: str = "output"
    """What gates multiply, a name in moejax.moe.gating.GATE_AT: output (of the expert) or input (as in Llama 4)."""
    renormalize: bool = True
    """Divide the gates of a token by their sum."""
    gate_scale: float = 1.0
    """Factor on every gate."""
    jitter: float = 0.0
    """Half width of the multiplicative uniform noise on the router's input in training (Switch uses 0.01)."""
    router_dropout: float = 0.0
    """Probability that an expert is hidden from a token's selection in training."""
    router_groups: int = 1
    """Equal parts of the experts, of which a token may visit `router_groups_kept` (a limit on nodes)."""
    router_groups_kept: int = 1
    """Parts of `router_groups` that a token keeps, by the sum of their best scores."""
    router_groups_best: int = 2
    """Scores of a part that are added to rank it: 2 in DeepSeek-V3, 1 in DeepSeek-V2."""
    top_k_start: int | None = None
    """Choices a token makes at step 0, rising to top_k; None starts with top_k."""
    top_k_steps: int = 0
    """Steps from top_k_start to top_k."""
    top_p: float = 0.5
    """Probability that the choices of a token must reach together (router top_p)."""
    mean_k: float | None = None
    """Requests a token makes on average, where a router steers their number (threshold, relu); None is top_k / 2."""
    hash_by: str = "token"
    """What is hashed (router hash): token, or position in the row."""
    soft_slots: int = 1
    """Slots of an expert in a group (router soft)."""
    capacity_factor: float | None = None
    """Slots of an expert in a group as a multiple of the fair share K * valid / E; None is dropless."""
    eval_capacity_factor: float | None = None
    """The same at evaluation, which is dropless unless this is set; then both losses are reported."""
    order: str = "position"
    """Who comes first where places are short, a name in moejax.moe.places.ORDERS."""
    reroute: bool = False
    """A request that finds no place goes to the next best expert that has one."""
    group_rows: int = 1
    """Rows that share one group's capacity."""
    group_window: int | None = None
    """Positions of one row that form a group; None takes whole rows."""
    transport: str = "gather"
    """How tokens reach experts, a name in moejax.moe.transport.TRANSPORTS."""
    receive_buffer: float = 1.25
    """Rows that a device has room to receive in a round of an exchange, as a multiple of its fair share; the rest goes in further
    rounds (transport ragged)."""
    exchange: str = "auto"
    """How rows are exchanged (transport ragged): padded (equal parts, everywhere), native (the rows alone; XLA has it for TPU), or
    auto."""
    tensor: str = "hidden"
    """What the mesh axis tensor cuts in this layer, a name in moejax.sharding.LAYOUTS: hidden (the width of every expert) or experts
    (the set of experts, and with it positions; no expert is cut)."""
    chunks: int = 1
    """Parts that a device's groups are exchanged in: the exchange of one can run under the experts of another."""
    kernel: str = "auto"
    """Backend of the grouped matmul, a name in moejax.kernels.grouped_matmul.BACKENDS, or auto."""
    load_balance: float = 0.01
    """Coefficient of the load-balance loss; 0 turns it off, as for every balancer."""
    load_balance_scope: str = "global"
    """What is balanced: global (the batch of a step), microbatch, group or sequence."""
    load_balance_overflow: float = 0.0
    """Share of requests past 1.25 times their expert's fair share to which the loss's weight adapts itself; 0 keeps it fixed."""
    router_z: float = 0.001
    """Coefficient of the router z-loss."""
    importance: float = 0.0
    """Coefficient of the importance loss: squared coefficient of variation of the experts' summed gates."""
    smooth_load: float = 0.0
    """Coefficient of the load loss of 2017: the same of the expected loads under the router's noise (router noisy_topk)."""
    score_variance: float = 0.0
    """Coefficient of the loss that spreads each expert's probabilities over tokens, for specialisation."""
    orthogonality: float = 0.0
    """Coefficient of the loss that turns the outputs of a token's experts away from each other, for specialisation."""
    sparsity: float = 0.0
    """Initial coefficient of the L1 loss on gates, which adapts to reach mean_k (router relu; ReMoE starts at 1e-8)."""
    sign_bias: float = 0.0
    """Step of the selection bias by the sign of the load error (auxiliary-loss-free balancing uses 0.001)."""
    quantile_bias: float = 0.0
    """Share of the way to the selection bias at which every expert's quantile gives it its fair share, a step; at most 1."""
    selection_bias: bool = False
    """Keep a selection bias that no step moves: what a published model comes with. `sign_bias` and `quantile_bias` add to it."""
    sinkhorn: int = 0
    """Sinkhorn iterations on the selection scores of a group; non-causal."""
    allow_noncausal: bool = False
    """Accept a router or drop policy through which future tokens change past ones."""
    alarm_share: float = 0.1
    """An expert counts as fed in a step when its load is at least this multiple of its fair share."""
    alarm_after: int = 100
    """Steps an expert goes unfed before the collapse alarm names it."""
