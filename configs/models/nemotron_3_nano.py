"""Nemotron 3 Nano 30B-A3B (NVIDIA 2025): 31.6 billion parameters, 3.2 active.

python scripts/plan.py --config=configs/models/nemotron_3_nano.py --topology=v5p:8x8x8

Counted: Mamba-2, shared experts without a gate and layers of one part are missing. 6 of 128 experts. Source: config.json of
nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16. The publisher's 3.2 billion active leave the input embedding out (B), its 3.6 do not (A).
"""

import ml_collections

from moejax.plan import published

LAYERS = {"M": "mamba2", "E": "sparse_plain_shared", "*": "attention"}
ORDER = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("nemotron_3_nano", vocabulary=131072)
    m = c.model
    m.width, m.repeats = 2688, 1
    m.pattern = tuple(LAYERS[letter] for letter in ORDER)
    m.heads, m.kv_heads, m.head_dim = 32, 2, 128
    m.attention.rotary, m.norm_epsilon = False, 1e-5
    m.moe.num_experts, m.moe.top_k, m.moe.hidden = 128, 6, 1856
    m.moe.activation = "relu2"
    published.deepseek_routing(c, gate_scale=2.5)
    c.counted = {
        "mamba2": {"heads": 64, "head": 64, "groups": 8, "state": 128, "conv": 4},
        "sparse_plain_shared": {"hidden": 3712},
    }
    return c
