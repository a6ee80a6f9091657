"""Published checkpoints straight into sharded arrays: the same numbers on every mesh; quantised tensors; and each damage is found first."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint.published_models import CONFIGS, read, weights, write
from jax.sharding import NamedSharding, PartitionSpec
from models.published import leaves

from moejax.checkpoint.hugging_face import quantized, shards
from moejax.checkpoint.hugging_face.files import open_folder
from moejax.checkpoint.hugging_face.published import load, open_published
from moejax.checkpoint.hugging_face.save import save
from moejax.checkpoint.hugging_face.stream import stream
from moejax.errors import DamagedError, UserError

AXES = ("a", "b")


def placed(shapes, mesh, spread):
    """Targets whose dimension that fits is cut over the axes in turn, from the last or from the first one."""

    def spec(shape):
        entries, left = [None] * len(shape), [(axis, mesh.shape[axis]) for axis in AXES]
        for i in range(len(shape)) if spread == "first" else reversed(range(len(shape))):
            if left and shape[i] % left[0][1] == 0:
                entries[i] = left.pop(0)[0]
        return PartitionSpec(*entries)

    return {
        path: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec() if spread == "none" else spec(x.shape))
        )
        for path, x in shapes.items()
    }


@pytest.mark.parametrize("spread", ["none", "first", "last"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_streamed_is_loaded(name, spread, tmp_path):
    """Whole on every device, experts or widths cut: bit for bit what lies on one host; every byte is told once."""
    folder = write(tmp_path, name, weights(name, ml_dtypes.bfloat16))
    model, flat = load(folder, leaves)
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    targets = placed(leaves(model), mesh, spread)
    told = []
    arrays, report = stream(open_published(folder), targets, lambda done, total: told.append((done, total)))
    assert arrays.keys() == flat.keys()
    for path, value in arrays.items():
        assert value.sharding == targets[path].sharding
        assert np.asarray(value).tobytes() == flat[path].tobytes(), path
        assert all(np.array_equal(s.data, flat[path][s.index]) for s in value.addressable_shards)
    dones = sorted(done for done, _ in told)
    assert dones[-1] == told[0][1] and len(set(dones)) == len(dones)
    if spread == "none":
        assert dones[-1] == sum(x.nbytes for x in flat.values())
    assert {row["name"] for row in report} == weights(name).keys()


# ---- quantised ----------------------------------------------------------------------------------------------------


def mxfp4(rng, experts, columns, rows):
    """Random blocks and scales [E, N, M/32], and the [E, M, N] that they stand for, number by number."""
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    codes = rng.integers(0, 16, (experts, columns, rows))
    scales = rng.integers(120, 131, (experts, columns, rows // 32)).astype(np.uint8)
    value = np.zeros((experts, rows, columns), np.float32)
    for e, n, m in np.ndindex(codes.shape):
        value[e, m, n] = table[codes[e, n, m]] * 2.0 ** (int(scales[e, n, m // 32]) - 127)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return blocks.reshape(experts, columns, rows // 32, 16), scales, value


def test_mxfp4(tmp_path):
    """As released: blocks and scales beside plain tensors give what the plain tensors give, whole and streamed a row at a time."""
    rng = np.random.default_rng(3)
    plain, packed = weights("gpt_oss"), weights("gpt_oss")
    for name in [n for n in plain if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = plain[name].shape
        packed[f"{name}_blocks"], packed[f"{name}_scales"], plain[name] = mxfp4(rng, experts, columns, rows)
        del packed[name]
    model, wanted = load(write(tmp_path / "plain", "gpt_oss", plain), leaves)
    tree = CONFIGS["gpt_oss"] | {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    }
    folder = write(tmp_path / "packed", "gpt_oss", packed, tree)
    _, flat = load(folder, leaves)
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    arrays, report = stream(open_published(folder), placed(leaves(model), mesh, "last"))
    for path, value in wanted.items():
        assert np.array_equal(flat[path], value) and np.array_equal(arrays[path], value), path
    whys = {row["name"]: row["why"] for row in report}
    assert (
        whys["model.layers.0.mlp.experts.down_proj_blocks"]
        == whys["model.layers.0.mlp.experts.down_proj_scales"]
        == "dequantised from mxfp4"
    )
    save(
        tmp_path / "out",
        model,
        leaves(model),
        flat.__getitem__,
        family="gpt_oss",
        dtype="float32",
        before=tree,
    )
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == plain.keys() and all(np.array_equal(again[n], plain[n]) for n in plain)


def test_mxfp4_scale_that_is_no_number():
    """255 is NaN; 0 is 2^-127, a number below the normal ones."""
    blocks = np.full((1, 1, 2, 16), 0x22, np.uint8)
    value = quantized.of_mxfp4(blocks, np.array([[[255, 0]]], np.uint8))
    assert np.isnan(value[0, :32]).all() and (value[0, 32:] == np.float32(2.0**-127)).all()


def test_blocks_of_float8(tmp_path):
    """Blocks of 6 x 5, which do not fill the edges; a tensor that is not quantised stays beside."""
    rng = np.random.default_rng(4)
    plain, packed = weights("deepseek_v3"), weights("deepseek_v3")
    for name in [n for n in plain if n.endswith("_proj.weight") or n.endswith("with_mqa.weight")]:
        rows, columns = plain[name].shape
        values = rng.normal(size=(rows, columns)).astype(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(0.5, 2, (-(-rows // 6), -(-columns // 5))).astype(np.float32)
        packed[name], packed[f"{name}_scale_inv"] = values, scales
        for i, j in np.ndindex(rows, columns):
            plain[name][i, j] = np.float32(values[i, j]) * scales[i // 6, j // 5]
    _, wanted = load(write(tmp_path / "plain", "deepseek_v3", plain), leaves)
    options = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [6, 5]}
    tree = CONFIGS["deepseek_v3"] | {"quantization_config": options}
    folder = write(tmp_path / "packed", "deepseek_v3", packed, tree)
    _, flat = load(folder, leaves)
    assert all(np.array_equal(flat[path], value) for path, value in wanted.items())
    for given, words in (
        (None, "weight_block_size"),
        (options | {"weight_block_size": [6, 6]}, "blocks of"),
        ({"quant_method": "gptq"}, "gptq"),
    ):
        (folder / "config.json").write_text(json.dumps(tree | {"quantization_config": given}))
        with pytest.raises((UserError, DamagedError), match=words):
            open_published(folder)


# ---- damage -------------------------------------------------------------------------------------------------------

ONE = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def whole(folder):
    """Mixtral in several shards."""
    tensors, tree = weights("mixtral"), CONFIGS["mixtral"]
    shards.write(
        folder, {n: (x.shape, x.dtype) for n, x in tensors.items()}, tensors.__getitem__, tree, shard_bytes=20000
    )
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def rewrite(file, change):
    """A file with other tensors, by the safetensors library."""
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def reshape(tensors):
    tensors[ONE] = tensors[ONE].T.copy()


def retype(tensors):
    tensors[ONE] = tensors[ONE].astype(np.int32)


def bytewise(change):
    """A change of a file's bytes."""
    return lambda file: file.write_bytes(change(file.read_bytes()))


DAMAGE = {
    "a shard that is missing": (lambda file: file.unlink(), DamagedError, "lacks {file} of"),
    "a shard that is cut short": (bytewise(lambda b: b[:-1]), DamagedError, "{file} is cut short: tensor"),
    "a shard cut within its header": (bytewise(lambda b: b[:100]), DamagedError, "{file} has 100 bytes and a header of"),
    "a shard with bytes too many": (bytewise(lambda b: b + b"x"), DamagedError, "{file} has .* bytes, its tensors end"),
    "a header that is no JSON": (bytewise(lambda b: b.replace(b'{"', b"{'", 1)), DamagedError, "{file} has a header"),
    "a type that does not fit": (bytewise(lambda b: b.replace(b'"F32"', b'"F16"', 1)), DamagedError, "{file} has a header"),
    "a tensor that is missing": (lambda file: rewrite(file, lambda t: t.pop(ONE)), DamagedError, f"{{file}} has no tensor {ONE}"),
    "a tensor of another shape": (lambda file: rewrite(file, reshape), UserError, rf"{{file}}: tensor {ONE} has shape \[20, 16\]"),
    "a tensor of another type": (lambda file: rewrite(file, retype), UserError, f"{{file}}: tensor {ONE} is int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_before_anything_is_read(name, tmp_path):
    """One line with file and tensor."""
    change, kind, words = DAMAGE[name]
    file = tmp_path / whole(tmp_path)[ONE]
    open_published(tmp_path).plan(leaves(read("mixtral")))
    change(file)
    with pytest.raises(kind, match=words.format(file=f".*{file.name}")) as caught:
        open_published(tmp_path).plan(leaves(read("mixtral")))
    assert "\n" not in str(caught.value)


def test_a_tensor_of_a_missing_expert(tmp_path):
    """Neither the last expert nor one between can be missing."""
    for expert in (5, 11):
        tensors = {n: x for n, x in weights("mixtral").items() if f"experts.{expert}.w2" not in n}
        folder = write(tmp_path / str(expert), "mixtral", tensors)
        with pytest.raises(UserError, match=rf"lacks .*experts.{expert}.w2"):
            load(folder, leaves)


def test_what_was_begun_is_not_taken_for_whole(tmp_path):
    """A write that fails leaves nothing under a name that is read, and nothing beside."""
    tensors = weights("mixtral")

    def make(name):
        if name == ONE:
            raise OSError(28, "No space left on device")
        return tensors[name]

    with pytest.raises(UserError, match="No space left"):
        shards.write(tmp_path / "out", {n: (x.shape, x.dtype) for n, x in tensors.items()}, make, {}, shard_bytes=20000)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="neither"):
        open_folder(tmp_path / "out")
