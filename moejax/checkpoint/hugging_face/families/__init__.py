"""Published families by `model_type`."""

from moejax.checkpoint.hugging_face.families.api import Family
from moejax.checkpoint.hugging_face.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from moejax.checkpoint.hugging_face.families.gpt_oss import GPT_OSS
from moejax.checkpoint.hugging_face.families.llama4 import LLAMA4, LLAMA4_TEXT
from moejax.checkpoint.hugging_face.families.mixtral import MINIMAX_M2, MIXTRAL, OLMOE
from moejax.checkpoint.hugging_face.families.qwen2 import QWEN2_MOE
from moejax.checkpoint.hugging_face.families.qwen3 import GLM4_MOE, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
    "llama4_text": LLAMA4_TEXT,
    "llama4": LLAMA4,
    "glm4_moe": GLM4_MOE,
    "minimax_m2": MINIMAX_M2,
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": KIMI_K2,
    "deepseek_v2": DEEPSEEK_V2,
}
