"""One sparse block for scripts/bench.py block, which takes it by default: 4,096 tokens of width 512, 32 experts of width 256, 4 a token.

python scripts/bench.py block --against=dense,ragged_dot,hf --torch=PYTHON                                fp32
python scripts/bench.py block --config=configs/block.py --config.model.compute_dtype=bfloat16 …           the same in bf16

PYTHON is an interpreter with torch and transformers. A minute without ragged_dot on two cores, which takes ten. Result: docs/kernels.md.
"""

import ml_collections

from moejax import config


def get_config() -> ml_collections.ConfigDict:
    c = config.default()
    c.data.batch, c.data.context = 4, 1024
    c.model.width = 512
    c.model.moe.num_experts, c.model.moe.top_k, c.model.moe.hidden = 32, 4, 256
    return c
