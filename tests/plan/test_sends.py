"""Collectives of compiled programs against what was written down by hand: kind, axes, bytes, times, what goes over the wire."""

import math

import jax
import jax.numpy as jnp
import pytest
from plan import compiled_text as text

from moejax.plan import groups, sends

MESH = {"a": 2, "b": 2, "c": 2}


def program(body, out, shape=(8, 16, 8), dtype=jnp.float32):
    """Collectives of a body of shard_map on two by two by two devices; each axis cuts one dimension."""
    on = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    lies = jax.P(*MESH)
    mapped = jax.shard_map(body, mesh=on, in_specs=lies, out_specs=out, check_vma=False)
    return sends.of(text.compiled(mapped, text.array(*shape, dtype=dtype, sharding=jax.NamedSharding(on, lies))), MESH)


OWN = 4 * 8 * 4 * 4
"""Bytes of one device: an eighth of 8x16x8 numbers of four bytes."""
lax, P = jax.lax, jax.P
CASES = {
    "sum over one axis": (lambda x: lax.psum(x, "a"), P(None, "b", "c"), "all-reduce", "a", OWN, 2 * OWN / 2),
    "sum over two": (lambda x: lax.psum(x, ("a", "c")), P(None, "b", None), "all-reduce", "ac", OWN, 2 * OWN * 3 / 4),
    "sum over all": (lambda x: lax.psum(x, ("a", "b", "c")), P(), "all-reduce", "abc", OWN, 2 * OWN * 7 / 8),
    "gather": (lambda x: lax.all_gather(x, "b", axis=1, tiled=True), P("a", None, "c"), "all-gather", "b", 2 * OWN, OWN),
    "gather over two": (
        lambda x: lax.all_gather(x, ("a", "b"), axis=1, tiled=True), P(None, None, "c"), "all-gather", "ab", 4 * OWN, 3 * OWN,
    ),
    "sum and cut": (
        lambda x: lax.psum_scatter(x, "c", scatter_dimension=1, tiled=True), P("a", ("b", "c")), "reduce-scatter", "c", OWN, OWN / 2,
    ),
    "sum and cut over two": (
        lambda x: lax.psum_scatter(x, ("b", "c"), scatter_dimension=1, tiled=True),
        P("a", ("b", "c")), "reduce-scatter", "bc", OWN, OWN * 3 / 4,
    ),
    "exchange": (lambda x: lax.all_to_all(x, "c", 1, 0, tiled=True), P(("a", "c"), "b"), "all-to-all", "c", OWN, OWN / 2),
    "exchange over two": (
        lambda x: lax.all_to_all(x, ("b", "c"), 1, 0, tiled=True), P(("a", "b", "c")), "all-to-all", "bc", OWN, OWN * 3 / 4,
    ),
    "shift": (lambda x: lax.ppermute(x, "b", [(0, 1), (1, 0)]), P("a", "b", "c"), "collective-permute", "b", OWN, OWN),
    "shift over two": (
        lambda x: lax.ppermute(x, ("a", "c"), [(i, (i + 1) % 4) for i in range(4)]), P("a", "b", "c"), "collective-permute", "ac", OWN, OWN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_collective(name):
    body, out, kind, axes, size, wire = CASES[name]
    (found,) = program(body, out)
    assert (found.kind, found.axes, found.bytes, found.times, found.apart) == (kind, tuple(axes), size, 1, False)
    assert found.wire == wire and found.dtype == "f32" and "shard_map" in found.scope
    if kind != "collective-permute":
        assert found.devices == 2 ** len(axes)


def test_loops_multiply():
    """Five gathers of a scan, in a type of two bytes that every backend keeps."""

    def body(x):
        return lax.scan(
            lambda c, _: (c + jnp.sum(lax.all_gather(c, "b"), axis=0, dtype=c.dtype), None), x, None, length=5
        )[0]

    (found,) = program(body, P(*MESH), dtype=jnp.int16)
    assert (found.kind, found.times, found.bytes, found.dtype) == ("all-gather", 5, OWN, "s16")
    assert found.wire == 5 * OWN / 2
    (row,) = sends.summed([found, found])
    assert row == {
        "kind": "all-gather",
        "axes": ["b"],
        "network": False,
        "devices": 2,
        "times": 10,
        "apart": 0,
        "bytes": 10 * OWN,
        "wire": 5.0 * OWN,
    }


def of(*lines, others="", mesh=MESH):
    return sends.of(text.written("%x = f32[4,8] parameter(0)", *lines, others=others), mesh)


GROUPS = {
    "{{0,4},{1,5},{2,6},{3,7}}": "a",
    "{{0,2},{1,3},{4,6},{5,7}}": "b",
    "{{5,4},{1,0},{3,2},{7,6}}": "c",
    "{}": "abc",
    "{{0,1,2,3,4,5,6,7}}": "abc",
    "[2,4]<=[8]": "bc",
    "[4,2]<=[8]": "c",
    "[4,2]<=[2,4]T(1,0)": "a",
    "[2,4]<=[4,2]T(1,0)": "ab",
    "[4,2]<=[2,2,2]T(0,2,1)": "b",
    "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": "ab",
    "mesh['axis_0'=4,'axis_1'=2] {'axis_1'}": "c",
    "mesh['axis_0'=8,'axis_1'=1] {'axis_0'}": "abc",
    "mesh['x'=2,'y'=2,'z'=2] {'x','z'}": "ac",
    "mesh['x'=8] {'x':(1)2}": "a",
    "mesh['x'=8] {'x':(2)2}": "b",
    "mesh['x'=4,'y'=2] {'x':(1)2,'y'}": "ac",
    "mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}": "a",
    "mesh['x'=2,'y'=4], device_ids=(0,4,1,5,2,6,3,7) {'x'}": "b",
    "{{0,3},{1,2},{4,7},{5,6}}": "?",
}


@pytest.mark.parametrize("spelled", GROUPS)
def test_spellings_of_groups(spelled):
    """Listed, counted and turned, by the axes of a mesh or parts of them, with devices in another order; of no axes at all."""
    (found,) = of(
        f"ROOT %sum = f32[4,8] all-reduce(%x), channel_id=1, replica_groups={spelled}, use_global_device_ids=true, to_apply=%add"
    )
    assert found.axes == tuple(GROUPS[spelled])
    assert found.devices == (2 if spelled.startswith("{{0,3}") else 2 ** len(found.axes))


def test_an_unknown_spelling_is_not_all_devices():
    with pytest.raises(ValueError, match="cannot be read"):
        groups.partition("channel_id=1, replica_groups=ring(8), to_apply=%add")


def test_groups_of_one_device_send_nothing():
    assert (
        of("ROOT %sum = f32[4,8] all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add") == []
    )
    assert (
        of(
            "ROOT %sum = f32[4,8] all-reduce(%x), replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_1'}, to_apply=%add",
            mesh={"a": 4},
        )
        == []
    )
    assert of("ROOT %move = f32[4,8] collective-permute(%x), source_target_pairs={{0,0},{1,1}}") == []


def test_axes_of_every_kind():
    """Groups of each of the eight sets of three axes are different; an axis of one device is in none."""
    assert len(set(groups.axes_of(MESH).values())) == len(groups.axes_of(MESH)) == 8
    assert set(groups.axes_of({"a": 2, "one": 1, "c": 2}).values()) == {(), ("a",), ("c",), ("a", "c")}


BYTES = 4 * 8 * 4
ALONG = "channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}"


def test_a_fused_sum_and_cut():
    """A fusion that sums and keeps a part is a reduce-scatter of what it sums."""
    fused = f"""%all-reduce-scatter.2 (y: f32[4,8]) -> f32[4,4] {{
  %y = f32[4,8] parameter(0)
  %whole = f32[4,8] all-reduce(%y), {ALONG}, to_apply=%add
  ROOT %part = f32[4,4] slice(%whole), slice={{[0:4], [0:4]}}
}}
"""
    (found,) = of("ROOT %fusion = f32[4,4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2", others=fused)
    assert (found.kind, found.axes, found.bytes, found.wire) == ("reduce-scatter", ("c",), BYTES, BYTES / 2)


STARTED = {
    "all-gather": ("(f32[4,8], f32[4,16])", "f32[4,16]", f"{ALONG}, dimensions={{1}}", 2 * BYTES),
    "all-reduce": ("f32[4,8]", "f32[4,8]", f"{ALONG}, to_apply=%add", BYTES),
    "all-to-all": ("((f32[4,8]), f32[4,8], u32[])", "f32[4,8]", f"{ALONG}, dimensions={{0}}", BYTES),
    "collective-permute": (
        "(f32[4,8], f32[4,8], u32[], u32[])",
        "f32[4,8]",
        "source_target_pairs={{0,1},{1,0}}",
        BYTES,
    ),
}


@pytest.mark.parametrize("kind", STARTED)
def test_started_and_done_apart(kind):
    """One collective; what the compiler keeps of it meanwhile is not sent."""
    between, result, attributes, size = STARTED[kind]
    (found,) = of(f"%start = {between} {kind}-start(%x), {attributes}", f"ROOT %done = {result} {kind}-done(%start)")
    assert (found.kind, found.axes, found.bytes, found.times, found.apart) == (kind, ("c",), size, 1, True)
    assert sends.summed([found, found._replace(apart=False)])[0]["apart"] == 1


def test_a_ragged_exchange():
    """The rows that are given are what is sent at most; where they go and the buffer that they go to are not."""
    (found,) = of(
        "%into = f32[64,8] parameter(1)",
        "%where = s32[2] parameter(2)",
        f"ROOT %got = f32[64,8] ragged-all-to-all(%x, %into, %where, %where, %where, %where), {ALONG}",
    )
    assert (found.kind, found.axes, found.bytes, found.dtype) == ("ragged-all-to-all", ("c",), BYTES, "f32")


def chain(*numbers):
    """A collective in fusions that begin it, go on with it beside a product, and end it."""
    parts = {1: "AsyncCollectiveStart", 2: "AsyncCollectiveUpdate", 3: "AsyncCollectiveDone"}
    others = "".join(
        f"""%part.{i} (y: f32[4,8]) -> f32[4,16] {{
  %y = f32[4,8] parameter(0)
  %all-gather.{i} = f32[4,16] all-gather(%y), {ALONG}, dimensions={{1}}, frontend_attributes={{chain_id="5"}}
  ROOT %call.{i} = f32[4,16] custom-call(%all-gather.{i}), custom_call_target="{name}"
}}
"""
        for i, name in parts.items()
    )
    lines = [f"%fusion.{i} = f32[4,16] fusion(%x), kind=kCustom, calls=%part.{i}" for i in numbers]
    return of(*lines, others=others)


def test_a_collective_in_a_chain_of_fusions_is_one():
    """It is sent where it begins, and ends apart from there."""
    (found,) = chain(1, 2, 3)
    assert (found.kind, found.axes, found.bytes, found.apart) == ("all-gather", ("c",), 2 * BYTES, True)
    assert chain(2, 3) == []


SLICES = {"data": 4, "fsdp": 2, "expert": 1, "tensor": 1, "context": 1}
"""On two slices of four devices."""


def between(kind, target="{1,2}x{0:3}"):
    """A send as the TPU compiler writes it for several slices, and the end of it."""
    said = f'_xla_megascale_target="{target}",_xla_megascale_transfer_type="{kind}"'
    return (
        "%token = token[] after-all()",
        f"%send = (f32[4,8], u32[], token[]) send(%x, %token), channel_id=3, is_host_transfer=true, frontend_attributes={{{said}}}",
        "%sent = token[] send-done(%send), channel_id=3, is_host_transfer=true",
    )


def over_slices(*lines):
    return sends.of(text.written("%x = f32[4,8] parameter(0)", *lines), SLICES, slices=2)


@pytest.mark.parametrize(
    "kind, size, wire",
    [("ALL_REDUCE", BYTES, BYTES), ("ALL_GATHER", 2 * BYTES, BYTES), ("REDUCE_SCATTER", BYTES, BYTES / 2)],
)
def test_a_send_to_other_slices_is_a_collective_between_them(kind, size, wire):
    """Two slices sum what each device has, or gather it: what is sent is the operand."""
    (found,) = over_slices(*between(kind))
    assert (found.kind, found.axes, found.devices) == (kind.lower().replace("_", "-"), ("data",), 2)
    assert (found.bytes, found.wire, found.dtype, found.apart, found.network) == (size, wire, "f32", True, True)


def test_a_send_to_the_host_goes_to_no_device():
    send = "%send = (f32[4,8], u32[], token[]) send(%x, %token), channel_id=3, is_host_transfer=true"
    assert over_slices("%token = token[] after-all()", send) == []


def test_groups_of_several_slices_count_the_devices_of_one():
    """Of four parts of data two lie on a slice: its groups are of four devices, and sums within and between it are listed apart."""
    inside = "%sum = f32[4,8] all-reduce(%x), replica_groups={{0,2},{1,3}}, to_apply=%add"
    gather = "%all = f32[4,16] all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={1}"
    every = "%every = f32[4,8] all-reduce(%x), replica_groups={}, to_apply=%add"
    found = over_slices(inside, gather, every, *between("ALL_REDUCE"))
    assert [(s.kind, s.axes, s.devices, s.network) for s in found] == [
        ("all-reduce", ("data",), 2, False),
        ("all-gather", ("fsdp",), 2, False),
        ("all-reduce", ("data", "fsdp"), 4, False),
        ("all-reduce", ("data",), 2, True),
    ]
    assert [row["network"] for row in sends.summed(found) if row["axes"] == ["data"]] == [False, True]


def test_an_open_loop_sends_nothing(mesh_of):
    """Further rounds of an exchange are none while routing fits."""

    def body(x):
        return lax.while_loop(lambda c: jnp.max(c) > 1e9, lambda c: lax.psum(c, "a"), x)

    assert program(body, P(*MESH)) == []


def test_several_arrays_in_one_sum():
    """The compiler puts sums together; their bytes add up."""
    (found,) = of(
        "%y = bf16[6] parameter(1)",
        f"ROOT %sums = (f32[4,8], bf16[6]) all-reduce(%x, %y), {ALONG}, to_apply=%add",
    )
    assert found.bytes == BYTES + 12 and math.isclose(found.wire, BYTES + 12)
