"""The process that compiles, replaced by a tiny one: what is remembered, what is asked again, and every way in which it ends."""

import dataclasses
import json
import sys

import jax
import pytest

from moejax import config
from moejax.errors import ConfigError, UserError
from moejax.plan import aot, compiling

PLAIN = (
    "print(json.dumps({'fits': True, 'topology': request['topology'], 'width': request['config']['model']['width']}))"
)


def request(step="train", topology="v5p:2x2x2", slices=1, **model):
    return aot.Request(config.Config(name="small", model=config.Model(**model)), topology, slices, step)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """stand_in(line) replaces the process by one line of Python that has read the request; `starts()` is how often it was started."""
    log = tmp_path / "starts"
    log.write_text("")
    monkeypatch.setattr(aot, "libtpu", lambda: None)

    def replace(line):
        head = f"import json, os, sys, time; open({str(log)!r}, 'a').write('.'); request = json.load(sys.stdin)"
        monkeypatch.setattr(aot, "COMPILER", (sys.executable, "-I", "-S", "-c", f"{head}\n{line}"))
        return lambda: len(log.read_text())

    return replace


def test_an_answer_is_remembered(stand_in, tmp_path):
    """The second time nothing is started; without a folder every time. Folders are made."""
    starts, folder = stand_in(PLAIN), tmp_path / "deep" / "cache"
    first = aot.compiled(request(width=64), folder)
    assert (first["topology"], first["width"], starts()) == ("v5p:2x2x2", 64, 1)
    assert first["seconds"] >= 0 and first["versions"]["jax"] == jax.__version__ and first["peak_gb"] >= 0
    assert aot.compiled(request(width=64), folder) == first and starts() == 1
    aot.compiled(request(width=64), None)
    aot.compiled(request(width=64), None)
    assert starts() == 3 and [f.suffix for f in folder.iterdir()] == [".json"]


def test_a_damaged_answer_is_made_again(stand_in, tmp_path):
    starts = stand_in(PLAIN)
    first = aot.compiled(request(), tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(kept.read_text()[:20])
    again = aot.compiled(request(), tmp_path / "cache")
    assert starts() == 2 and again["width"] == first["width"] and json.loads(kept.read_text()) == again


OTHERS = {
    "config": request(width=96),
    "mesh": dataclasses.replace(request(), config=dataclasses.replace(request().config, mesh=config.Mesh(fsdp=8))),
    "topology": request(topology="v5e:2x4"),
    "slices": request(slices=2),
    "step": request(step="eval"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_request_has_another_key(name):
    assert aot.key(request(), None) == aot.key(request(), None) != aot.key(OTHERS[name], None)


def test_other_versions_and_other_code_have_another_key(monkeypatch, tmp_path):
    """A compiler that is in a folder has the version that it says there."""
    first = aot.key(request(), None)
    (tmp_path / "libtpu-9.9.dist-info").mkdir()
    (tmp_path / "libtpu-9.9.dist-info" / "METADATA").write_text("Name: libtpu\nVersion: 9.9\n")
    assert aot.versions(tmp_path)["libtpu"] == "9.9" and aot.key(request(), tmp_path) != first
    monkeypatch.setattr(aot, "code", lambda: "other")
    assert aot.key(request(), None) != first


def test_the_code_is_hashed_but_for_what_only_shows(monkeypatch, tmp_path):
    package = tmp_path / "moejax"
    for folder in ("", "plan", "report", "bench"):
        (package / folder).mkdir(exist_ok=True)
        (package / folder / "__init__.py").write_text("")
    monkeypatch.setattr(aot.moejax, "__file__", str(package / "__init__.py"))
    first = aot.code()
    (package / "report" / "__init__.py").write_text("x = 1")
    (package / "bench" / "__init__.py").write_text("x = 1")
    assert aot.code() == first
    (package / "plan" / "__init__.py").write_text("x = 1")
    assert aot.code() != first


def test_what_is_wrong_with_the_request_is_a_config_error(stand_in, tmp_path):
    """It is said as the other process said it, and not remembered."""
    starts = stand_in("print(json.dumps({'error': 'mesh.expert=3: choose a divisor'}))")
    for _ in range(2):
        with pytest.raises(ConfigError, match="^mesh.expert=3: choose a divisor$"):
            aot.compiled(request(), tmp_path / "cache")
    assert starts() == 2 and not list((tmp_path / "cache").iterdir())


def test_too_much_memory_ends_it(stand_in, tmp_path):
    """A process that takes 200 MB of 60 is stopped long before it would end."""
    stand_in("held = bytearray(200_000_000); held[::4096] = b'x' * len(held[::4096]); time.sleep(100)")
    with pytest.raises(UserError, match=r"compiling small for v5p:2x2x2 took more than 0.1 GB .* --memory_gb") as error:
        aot.compiled(request(), tmp_path / "cache", memory=60_000_000)
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    "line, said",
    [
        (
            "sys.stderr.write('Traceback\\n  in f\\nValueError: wrong\\nlast words\\n'); sys.exit(3)",
            "code 3: ValueError: wrong",
        ),
        ("sys.stderr.write('F1123 Check failed: n < 3\\n\\n'); os.abort()", "code -6: F1123 Check failed: n < 3"),
        ("sys.exit(1)", "code 1: no message"),
        ("", "code 0: no message"),
    ],
    ids=["exception", "check of the compiler", "silent", "no answer"],
)
def test_a_process_that_dies_says_so(stand_in, line, said):
    stand_in(line)
    with pytest.raises(UserError) as error:
        aot.compiled(request(), None)
    assert str(error.value) == f"the compiler ended with {said}"


def test_a_folder_that_cannot_be_written_is_said_first(stand_in, tmp_path):
    starts = stand_in(PLAIN)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder"):
        aot.compiled(request(), tmp_path / "file" / "cache")
    assert starts() == 0


def test_without_a_compiler(monkeypatch, tmp_path):
    """The error names the extra and the make target; a folder beside the interpreter is enough."""
    monkeypatch.setattr(aot.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`make tpu`.*moejax\[tpu\].*without --topology"):
        aot.compiled(request(), None)
    (tmp_path / "tpu" / "libtpu").mkdir(parents=True)
    assert aot.libtpu() == tmp_path / "tpu"


# ---- what the other process says ---------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    """Topologies are this machine's eight devices."""
    monkeypatch.setattr(compiling, "devices", lambda topology, slices: jax.devices())


def asked(**mesh):
    moe = config.MoE(num_experts=8, hidden=16, kernel="reference")
    model = config.Model(width=16, heads=2, kv_heads=2, head_dim=8, repeats=1, moe=moe)
    cfg = config.Config(model=model, mesh=config.Mesh(**mesh), data=config.Data(batch=8, context=16))
    return aot.Request(cfg, "v5p:2x2x2", 1, "eval").to_dict()


def test_facts_of_a_compiled_step(on_cpu):
    """What was traced is what was compiled; evaluation reads no moments; numbers are summed over every axis that has devices."""
    found = compiling.compiled(json.loads(json.dumps(asked(fsdp=2, expert=4))))
    assert found["fits"] and found["devices"] == 8 and found["tokens"] == 8 * 16
    assert found["flops"] == {"products": found["executed_flops"], "kernels": 0, "total": found["executed_flops"]}
    memory = found["memory"]
    assert 0 < memory["arguments"] < found["argument_bytes"] / 2
    assert memory["used"] == sum(memory[name] for name in ("arguments", "outputs", "temporaries", "code"))
    kinds = {(row["kind"], tuple(row["axes"])) for row in found["collectives"]}
    assert ("all-reduce", ("fsdp", "expert")) in kinds and all(row["times"] > 0 for row in found["collectives"])
    json.dumps(found)


def test_a_mesh_that_the_devices_do_not_have(on_cpu):
    with pytest.raises(ConfigError, match="8"):
        compiling.compiled(asked(fsdp=16))


@pytest.mark.parametrize(
    "message, used, room",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded",
            21.5 * 2**30,
            15.75 * 2**30,
        ),
        ("size of temporaries (900.5M) exceeds available HBM (15.75G)", 900.5 * 2**20, 15.75 * 2**30),
        ("total temporaries (1.5T) exceeds available HBM (512K) of", 1.5 * 2**40, 512 * 2**10),
    ],
)
def test_what_the_compiler_says_of_too_large_a_program(message, used, room):
    found = compiling.FULL.search(message)
    read = [float(found[i]) * compiling.UNITS[found[i + 1]] for i in (1, 3)]
    assert read == [used, room]
