"""Published models to the last parameter: totals and active ones in three conventions. The table was made from the released configs by
Hugging Face transformers, which counts what its modules hold."""

import importlib.util
import json
import pathlib

import pytest

from moejax import config
from moejax.errors import ConfigError
from moejax.plan import account
from moejax.train.check import check

HERE = pathlib.Path(__file__).parent
FOLDER = HERE.parents[1] / "configs" / "models"
UNLISTED = {"gshard_600b", "dense_70b", "sparse_400b"}
"""Not in the table: counted below and in test_introduction.py."""
TABLE = json.loads((HERE / "published_counts.json").read_text())
MISSING = {
    "qwen3_5_35b_a3b": "gated_attention, gated_delta", "qwen3_5_397b_a17b": "gated_attention, gated_delta", "glm_5": "indexed",
    "nemotron_3_nano": "mamba2, sparse_plain_shared", "nemotron_3_super": "mamba2, sparse_plain_shared",
    "switch_base_8": "cross, encoder, plain, relative_bias, tied", "switch_c": "cross, encoder, relative_bias, tied",
    "gshard_600b": "cross, encoder, plain",
}  # fmt: skip
"""Of the configs that are counted alone."""


def load(name):
    """The config of a file, loaded by path as the command line does."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_every_config_is_in_the_table():
    assert {path.stem for path in FOLDER.glob("*.py")} == TABLE.keys() | UNLISTED


@pytest.mark.parametrize("name", TABLE)
def test_parameters_to_the_last_one(name):
    counted = account.of_tree(load(name))
    assert {"total": counted.total_parameters} | counted.active_parameters == TABLE[name]


def test_experts_of_gshard():
    """18 layers of 2,048 experts of two matrices, 1,024 by 8,192."""
    counted = account.of_tree(load("gshard_600b"))
    experts = sum(part.parameters for part in counted.parts if part.name.endswith("experts"))
    assert experts == 18 * 2048 * 2 * 1024 * 8192 == 618_475_290_624


@pytest.mark.parametrize("name", [*TABLE, *sorted(UNLISTED)])
def test_built_ones_may_be_trained_and_counted_ones_say_why_not(name):
    tree = load(name)
    assert tree.name == name
    if name in MISSING:
        with pytest.raises(
            ConfigError, match=rf"counted, not built; scripts/plan.py alone reads it. Missing: {MISSING[name]}$"
        ):
            config.resolve(tree)
        return
    cfg = config.resolve(tree)
    check(cfg)
    assert (cfg.data.context, cfg.model.compute_dtype, cfg.model.remat) == (4096, "bfloat16", "full")
    assert cfg.model.moe.capacity_factor is None and cfg.model.moe.transport == "ragged"
    assert 2048 <= cfg.model.loss_chunk <= 16384 and cfg.model.loss_chunk % 8 == 0


def test_numbers_known_from_elsewhere():
    """DeepSeek-V3 caches 576 numbers a layer (2024, section 2.1.1), Nemotron 3 Super 8,192 bytes a token in its 8 layers of attention."""
    deepseek = account.of_tree(load("deepseek_v3"))
    assert account.cache_bytes_per_token(deepseek) == 61 * 576 * 2
    nemotron = account.of_tree(load("nemotron_3_super"))
    assert account.cache_bytes_per_token(nemotron) == 8192
    assert account.state_bytes(nemotron) == 40 * (128 * 64 * 128 * 4 + 3 * (8192 + 2 * 8 * 128) * 2)
    gpt_oss = account.of_tree(load("gpt_oss_20b"))
    assert account.cache_bytes_per_token(gpt_oss) == 12 * 2 * 8 * 64 * 2
    assert account.state_bytes(gpt_oss) == 128 * account.cache_bytes_per_token(gpt_oss)
