"""Damage is found, told, put aside, and the checkpoint before it is taken (B24); refused and failed saves are errors (B25)."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import small

from moejax import config, mesh
from moejax.checkpoint import digests
from moejax.checkpoint.manager import Checkpoints
from moejax.errors import DamagedError, SaveError, UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # orbax forgets coroutines of a failed read
KEEP = config.Checkpoint(keep=9)


def state_of(step):
    return {"a": {"w": jnp.arange(5000, dtype=jnp.float32).reshape(50, 100) * step}, "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of three checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    saver = Checkpoints(folder, KEEP)
    for step in (1, 2, 3):
        saver.save(step, state_of(step), {"skip": [step]})
    saver.close()
    return folder


def files_of(folder, least=0):
    """Files of the last checkpoint, the largest first."""
    found = [f for f in (folder / "3").rglob("*") if f.is_file() and f.stat().st_size > least]
    return sorted(found, key=lambda f: (-f.stat().st_size, str(f)))


def flip(file, at=0.5, bit=1):
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= bit
    file.write_bytes(data)


DAMAGE = {
    "flipped": lambda file: flip(file),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_b24_damage_of_the_data(whole, tmp_path, name):
    """The largest file, which holds the arrays: the step before is restored, and what was damaged lies in damaged/."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    DAMAGE[name](files_of(folder)[0])
    keeper, told = Checkpoints(folder, KEEP), []
    step, found, extra = keeper.restore_newest(state_of(0), lambda step, why: told.append((step, why)))
    assert step == 2 and extra == {"skip": [2]} and int(found["step"]) == 2
    np.testing.assert_array_equal(found["a"]["w"], state_of(2)["a"]["w"])
    assert [step for step, _ in told] == [3] and "checkpoint 3 in " in told[0][1]
    assert (tmp_path / "damaged" / "3").is_dir() and keeper.steps() == [1, 2]
    keeper.save(3, state_of(3))
    keeper.close()
    again = Checkpoints(folder, KEEP)
    assert again.steps() == [1, 2, 3]
    small.equal(again.restore(3, state_of(0))[0], state_of(3))
    again.close()


def test_b24_damage_anywhere(whole, tmp_path):
    """Each file emptied in turn, and a bit flipped at ten places of the largest: the checkpoint is refused, or what is restored is what
    was saved, where the byte plays no part. Never other numbers."""
    refused = 0
    files = files_of(whole)
    places = [(file, DAMAGE["emptied"]) for file in files]
    places += [(files[0], lambda file, at=at: flip(file, at, 16)) for at in np.linspace(0.01, 0.99, 10)]
    for i, (file, damage) in enumerate(places):
        folder = tmp_path / str(i) / "checkpoints"
        shutil.copytree(whole, folder)
        damage(folder / file.relative_to(whole))
        keeper = Checkpoints(folder, KEEP)
        step, found, _ = keeper.restore_newest(state_of(0), lambda step, why: None)
        refused += step == 2
        small.equal(found, state_of(step))
        keeper.close()
    assert refused >= 10


def test_b24_damage_of_what_stands_beside(whole, tmp_path):
    """One digit of the batches that were left out, of a digest, or of the format: JSON as before, and found."""
    for i, (was, becomes) in enumerate(
        ((b'"skip":[3]', b'"skip":[7]'), (b'"format":1', b'"format":2'), (b'"a/w":"', b'"a/v":"'))
    ):
        folder = tmp_path / str(i) / "checkpoints"
        shutil.copytree(whole, folder)
        file = folder / "3" / "_CHECKPOINT_METADATA"
        text = file.read_bytes().replace(b": ", b":").replace(b", ", b",")
        file.write_bytes(text.replace(was, becomes))
        assert text.count(was) == 1
        keeper = Checkpoints(folder, KEEP)
        step, found, extra = keeper.restore_newest(state_of(0), lambda step, why: None)
        assert step == 2 and extra == {"skip": [2]}
        keeper.close()


def test_b24_nothing_whole(whole, tmp_path):
    """All damaged: one error that says where they are now, exit code 4."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    for step in (1, 2, 3):
        shutil.rmtree(folder / str(step) / "d", ignore_errors=True)
        for file in (folder / str(step)).rglob("*"):
            if file.is_file() and file.stat().st_size > 200:
                file.write_bytes(b"")
    keeper = Checkpoints(folder, KEEP)
    with pytest.raises(DamagedError, match="none of the checkpoints .* is whole") as error:
        keeper.restore_newest(state_of(0), lambda step, why: None)
    assert error.value.exit_code == 4
    keeper.close()


def test_another_model_is_no_damage(whole):
    """Other arrays than the run has: a UserError that names one, and nothing is put aside."""
    keeper = Checkpoints(whole, KEEP)
    wider = state_of(0) | {"a": {"w": jnp.zeros((50, 101))}}
    with pytest.raises(UserError, match=r"another model or version: 1 arrays differ, as a/w"):
        keeper.restore_newest(wider, lambda step, why: None)
    assert keeper.steps() == [1, 2, 3]
    keeper.close()


def test_partial_restore(whole):
    """Only the arrays that are asked for, on the host, held to their digests."""
    keeper = Checkpoints(whole, KEEP)
    found = keeper.load_arrays(2, lambda name: name.startswith("a/"))
    assert list(found) == ["a/w"]
    np.testing.assert_array_equal(found["a/w"], state_of(2)["a"]["w"])
    assert set(keeper.load_arrays(3)) == {"a/w", "step"}
    keeper.close()


def test_retention(tmp_path):
    """The last n, every m, and the best by a metric."""
    options = config.Checkpoint(keep=1, keep_every=4, keep_best=2)
    keeper = Checkpoints(tmp_path, options)
    for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0, 1.5, 6.0], start=1):
        keeper.save(step, state_of(step), metrics={"eval/loss": loss})
    keeper.close()
    keeper = Checkpoints(tmp_path, options)
    assert keeper.steps() == [2, 4, 6, 7]
    keeper.close()


def test_a_save_that_is_refused_is_an_error(tmp_path):
    """A step below the last, after a run went back without forgetting: orbax refuses in silence, this does not."""
    keeper = Checkpoints(tmp_path, KEEP)
    keeper.save(5, state_of(5))
    with pytest.raises(SaveError, match="step 4 was refused: .* holds later steps"):
        keeper.save(4, state_of(4))
    keeper.forget_after(3)
    keeper.save(4, state_of(4))
    keeper.close()
    keeper = Checkpoints(tmp_path, KEEP)
    assert keeper.steps() == [4]
    keeper.close()


def test_digests_do_not_depend_on_the_mesh(monkeypatch):
    """The same digests on one device and on eight, for every type and sharding, at once and in pieces; any flipped bit, and two numbers
    exchanged, change them."""
    rng = np.random.default_rng(0)
    arrays = {
        "f": rng.normal(size=(8, 4, 6)).astype(np.float32), "h": rng.normal(size=(16, 8)).astype(jnp.bfloat16),
        "i": rng.integers(-9, 9, (8,)).astype(np.int32), "b": rng.random((4, 8)) > 0.5, "s": np.float32(3.5),
        "n": rng.integers(-9, 9, (8, 2)).astype(np.int8),
    }  # fmt: skip
    wanted = digests.of({name: jnp.asarray(a) for name, a in arrays.items()})
    specs = {
        "f": ("expert", None, "fsdp"), "h": (("fsdp", "expert"), None), "i": ("expert",), "b": (None, "expert"), "s": (),
        "n": ("fsdp", None),
    }  # fmt: skip
    on = mesh.make(config.Mesh(fsdp=2, expert=4))
    with jax.set_mesh(on):
        placed = {n: jax.device_put(a, jax.NamedSharding(on, jax.P(*specs[n]))) for n, a in arrays.items()}
    assert digests.of(placed) == wanted
    for piece in (5, 24):
        monkeypatch.setattr(digests, "PIECE", piece)
        digests._digests.clear_cache()
        assert digests.of(placed) == wanted == digests.of({name: jnp.asarray(a) for name, a in arrays.items()})
    for name, a in arrays.items():
        flat = np.atleast_1d(a).view(np.uint8).copy()
        for byte in {0, flat.size // 2, flat.size - 1}:
            changed = flat.reshape(-1).copy()
            changed[byte] ^= 1
            other = jnp.asarray(changed.view(np.atleast_1d(a).dtype).reshape(np.shape(a)))
            assert digests.differing({name: other}, {name: wanted[name]}) == [name]
    swapped = arrays["f"].copy().reshape(-1)
    swapped[[3, 90]] = swapped[[90, 3]]
    assert digests.differing({"f": jnp.asarray(swapped.reshape(8, 4, 6))}, {"f": wanted["f"]}) == ["f"]
    assert digests.differing({"i": jnp.asarray(arrays["i"])}, {n: wanted[n] for n in "if"}) == ["f"]


def test_replicas_that_differ_are_found():
    """Copies of a part on the devices of a process: alike as they should be, and one that is not."""
    on = mesh.make(config.Mesh(fsdp=2, expert=4))
    where = jax.NamedSharding(on, jax.P("fsdp"))
    good = jax.device_put(np.arange(8, dtype=np.float32), where)
    parts = [np.asarray(s.data).copy() for s in good.addressable_shards]
    parts[5][1] += 1e-3
    bad = jax.make_array_from_single_device_arrays(
        (8,), where, [jax.device_put(p, s.device) for p, s in zip(parts, good.addressable_shards, strict=True)]
    )
    apart = {name for (name, _), found in digests.of_parts({"good": good, "bad": bad}).items() if len(set(found)) > 1}
    assert apart == {"bad"}
