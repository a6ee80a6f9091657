"""Nemotron 3 Super 120B-A12B (NVIDIA 2026): 120.7 billion parameters, 12 active.

python scripts/plan.py --config=configs/models/nemotron_3_super.py --topology=v5p:8x8x8

Counted: Mamba-2, shared experts without a gate and layers of one part are missing. 22 of 512 experts, in a width of 1,024.
Source: config.json of nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16. The publisher's 12 billion active leave the input embedding out (B).
"""

import ml_collections

from moejax.plan import published

LAYERS = {"M": "mamba2", "E": "sparse_plain_shared", "*": "attention"}
ORDER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("nemotron_3_super", vocabulary=131072)
    m = c.model
    m.width, m.repeats = 4096, 1
    m.pattern = tuple(LAYERS[letter] for letter in ORDER)
    m.heads, m.kv_heads, m.head_dim = 32, 2, 128
    m.attention.rotary, m.norm_epsilon = False, 1e-5
    m.moe.num_experts, m.moe.top_k, m.moe.hidden = 512, 22, 2688
    m.moe.latent = 1024
    m.moe.activation = "relu2"
    published.deepseek_routing(c, gate_scale=5.0)
    c.counted = {
        "mamba2": {"heads": 128, "head": 64, "groups": 8, "state": 128, "conv": 4},
        "sparse_plain_shared": {"hidden": 5376},
    }
    return c
