"""Chips, slices and their links, against numbers worked out by hand."""

import pytest

from moejax import mesh
from moejax.errors import ConfigError
from moejax.plan import hardware, links
from moejax.plan.hardware import CHIPS, parse_topology


def sizes(**axes):
    return {axis: axes.get(axis, 1) for axis in mesh.AXES}


def row(kind, axes, devices, wire):
    return {"kind": kind, "axes": axes, "devices": devices, "wire": wire}


def test_a_name_says_chip_and_slice():
    """Two devices of a chip lie in a dimension of their own."""
    v5p, tpu7x = parse_topology("v5p:8x8x16"), parse_topology("tpu7x:2x2x1")
    assert (v5p.name, v5p.chips, v5p.devices, v5p.grid) == ("v5p:8x8x16", 1024, 1024, (8, 8, 16))
    assert (tpu7x.chips, tpu7x.devices, tpu7x.grid) == (4, 8, (2, 2, 1, 2))
    assert parse_topology("h200:8").devices == 8


@pytest.mark.parametrize("chip", CHIPS)
def test_every_listed_slice_is_one(chip):
    """With positive figures, and no more room than memory."""
    found = hardware.topologies(chip)
    assert [t.chips for t in found] == sorted(t.chips for t in found)
    own = CHIPS[chip]
    assert min(own.flops, own.int8_flops, own.bandwidth, own.link, own.network) > 0
    assert 0.9 * own.memory < own.usable <= own.memory


@pytest.mark.parametrize(
    "text, says",
    [
        ("v5p", "give a chip and the chips of one slice"),
        ("v5p:8x8x", "chips: v4, v5e"),
        ("v9:2x2", "v9 is not a known chip"),
        ("v5p:4x4", "3 dimension"),
        ("v6e:0x4", "choose one of 1x1"),
        ("v5e:16x32", "more than the 256"),
    ],
)
def test_other_names_say_what_to_give(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_topology(text)


def test_an_unknown_chip_has_no_slices():
    with pytest.raises(ConfigError, match="choose one of v4"):
        hardware.topologies("v9")


def test_whole_cubes_and_sides_of_a_pod_wrap():
    """In three dimensions all or none."""
    wraps = {name: [parse_topology(name).wraps(d) for d in range(2)] for name in ("v5p:4x4x8", "v5p:2x4x4", "v6e:8x16")}
    assert wraps == {"v5p:4x4x8": [True, True], "v5p:2x4x4": [False, False], "v6e:8x16": [False, True]}


def test_axes_take_whole_dimensions_the_last_axis_first():
    """Of 2x4x4 chips `expert` takes the last dimension that is free and as long, `fsdp` what is left; nothing wraps."""
    wiring = links.lay(parse_topology("v5p:2x4x4"), sizes(fsdp=8, expert=4))
    assert wiring.pieces["expert"] == (links.Piece(4, 9e10),)
    assert wiring.pieces["fsdp"] == (links.Piece(2, 9e10), links.Piece(4, 9e10))
    assert wiring.pieces["tensor"] == ()


def test_a_mesh_that_dimensions_do_not_make_is_none():
    """Unless the chip's meshes may cut a dimension, or there are several slices: then devices between share the links."""
    assert links.lay(parse_topology("v5p:8x8x8"), sizes(fsdp=128, expert=4)) is None
    cut = links.lay(parse_topology("v5e:4x4"), sizes(fsdp=8, expert=2))
    assert cut.pieces["expert"] == (links.Piece(2, 4.5e10),)
    assert sorted(p.size for p in cut.pieces["fsdp"]) == [2, 4]
    assert min(p.bandwidth for p in cut.pieces["fsdp"]) == 2.25e10
    two = links.lay(parse_topology("v5p:2x2x2"), sizes(data=4, expert=4), slices=2)
    assert [p.size for p in two.pieces["data"]] == [2]


def test_a_mesh_of_other_devices_is_refused():
    with pytest.raises(ConfigError, match="the product must be 8"):
        links.lay(parse_topology("v5p:2x2x2"), sizes(fsdp=4))
    with pytest.raises(ConfigError, match="a multiple of the slices"):
        links.lay(parse_topology("v5p:2x2x2"), sizes(fsdp=16), slices=2)


def test_a_ring_sends_both_ways():
    """An all-gather of 64 bytes over a ring of 8 sends 56, half each way; on a line all must pass one link."""
    ring = links.lay(parse_topology("v5p:8x8x8"), sizes(data=8, fsdp=8, expert=8))
    line = links.lay(parse_topology("v6e:8x8"), sizes(fsdp=8, expert=8))
    gathered = row("all-gather", ["expert"], 8, 56.0)
    assert links.seconds(gathered, ring) == (56 / 18e10, 0)
    assert links.seconds(gathered, line) == (56 / 9e10, 0)


def test_an_exchange_is_limited_by_the_middle():
    """Each of 8 devices has 64 bytes, of which half cross the middle of a ring, which two links of each way pass: 8 * 64 / 8 over one."""
    ring = links.lay(parse_topology("v5p:8x8x8"), sizes(data=8, fsdp=8, expert=8))
    assert links.seconds(row("all-to-all", ["expert"], 8, 56.0), ring)[0] == pytest.approx(64 / 9e10)
    pair = links.lay(parse_topology("v5p:2x2x2"), sizes(fsdp=4, expert=2))
    assert links.seconds(row("all-to-all", ["expert"], 2, 32.0), pair)[0] == pytest.approx(32 / 9e10)


def test_two_dimensions_carry_twice_as_much():
    plane = links.lay(parse_topology("v5p:4x4x4"), sizes(fsdp=4, expert=16))
    ring = links.lay(parse_topology("v5p:4x4x4"), sizes(fsdp=16, expert=4))
    wire = 100.0
    seconds = [links.seconds(row("all-gather", ["expert"], n, wire), w)[0] for n, w in ((16, plane), (4, ring))]
    assert seconds[1] == pytest.approx(2 * seconds[0])


def test_between_slices_each_device_carries_a_share():
    """A sum of 80 bytes over 8 devices on 2 slices: within a slice of 4 as ever, then 20 bytes a device, of which 20 go and come."""
    wiring = links.lay(parse_topology("v5p:2x2x2"), sizes(data=8, expert=2), slices=2)
    inside, across = links.seconds(row("all-reduce", ["data"], 8, 2 * 80 * 7 / 8), wiring)
    assert inside == pytest.approx(2 * 80 * 3 / 4 / 18e10)
    assert across == pytest.approx(2 * 80 / 2 / 4 / 6.25e9)
    assert links.seconds(row("all-gather", ["expert"], 2, 8.0), wiring)[1] == 0


def test_a_switch_has_no_middle():
    wiring = links.lay(parse_topology("h200:8"), sizes(fsdp=2, expert=4))
    for kind in ("all-to-all", "all-gather"):
        assert links.seconds(row(kind, ["expert"], 4, 45.0), wiring)[0] == pytest.approx(1e-10)


def test_devices_that_no_axis_explains_get_one_link():
    wiring = links.lay(parse_topology("v5p:2x2x2"), sizes(fsdp=8))
    assert links.seconds(row("all-reduce", ["?"], 4, 9.0), wiring) == (9 / 9e10, 0)
