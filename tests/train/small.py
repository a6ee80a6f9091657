"""A model small enough to compile in a second, its batches, and train steps shared by the tests of this folder and its neighbours."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from moejax import config, mesh, sharding
from moejax.arrays import Batch
from moejax.data import prepare, source, tokenizer
from moejax.moe.transport import TRAFFIC
from moejax.train import guard, metrics, routing, state, step

ROOT = pathlib.Path(__file__).parents[2]
B, T, V = 8, 16, 264
COMPILER = {"xla_backend_optimization_level": 0}
"""Without LLVM's optimisations: compile time is the cost of these tests. The program stays the same."""
if jax.__version_info__ < (0, 11):
    COMPILER["xla_cpu_use_fusion_emitters"] = False  # the older emitters compile twice as fast; later they are gone
quick_jit = functools.partial(jax.jit, compiler_options=COMPILER)


def exact():
    """Inside, two programs with the same arithmetic round alike: other emitters fuse a part that is recomputed in another way."""
    return mock.patch.dict(COMPILER, {"xla_backend_optimization_level": 0}, clear=True)


def quick():
    """Inside, what the library compiles is compiled quickly."""
    return mock.patch.object(jax, "jit", quick_jit)


OPTIONS = {
    "model.width": 16, "model.pattern": ("attention+sparse",), "model.repeats": 1, "model.heads": 2,
    "model.kv_heads": 1, "model.head_dim": 8, "model.hidden": 24, "model.loss_chunk": 88, "model.moe.num_experts": 8,
    "model.moe.hidden": 8, "data.context": T, "data.batch": B, "train.steps": 20, "train.warmup": 1,
}  # fmt: skip


def configure(**options: Any) -> config.Config:
    """The small config with options by dotted path: configure(**{"model.moe.top_k": 1})."""
    tree = config.to_dict(config.Config())
    for path, value in (OPTIONS | options).items():
        *sections, name = path.split(".")
        section = functools.reduce(dict.__getitem__, sections, tree)
        assert name in section, path
        section[name] = value
    return config.from_dict(tree)


def arrays(seed: int, rows: int = B, positions: int = T) -> dict[str, np.ndarray]:
    """Random rows of two documents each; nine positions of ten are valid."""
    rng = np.random.default_rng(seed)
    draw = lambda high: rng.integers(0, high, (rows, positions)).astype(np.int32)  # noqa: E731
    segments = np.sort(1 + draw(2), axis=1)
    valid = rng.random((rows, positions)) < 0.9
    return {
        "tokens": draw(256), "targets": draw(256), "segments": segments, "valid": valid, "labels": segments - 1,
        "row_ids": np.arange(rows, dtype=np.int32),
    }  # fmt: skip


def place(host: dict[str, np.ndarray], on: jax.sharding.Mesh) -> Batch:
    return Batch(
        **{name: jax.device_put(value, sharding.batch_sharding(on, value.ndim)) for name, value in host.items()}
    )


class Run(NamedTuple):
    built: state.Built
    start: state.TrainState
    """Step 0, never donated."""
    step: Any


def build(cfg: config.Config, shape: tuple[int, int] = (B, T)) -> Run:
    """The state and the compiled train step of a config on the first devices that its mesh takes."""
    return _build(cfg, shape)


@functools.cache
def _build(cfg: config.Config, shape: tuple[int, int]) -> Run:
    built, start = begin(cfg)
    with jax.set_mesh(built.mesh), quick():
        update = step.make_train_step(built, start)
        return Run(built, start, update.lower(start, place(arrays(0, *shape), built.mesh)).compile())


def begin(cfg: config.Config) -> tuple[state.Built, state.TrainState]:
    """What a run has before its first step. Parameters are made once for all meshes; test_state shows that they are the same."""
    on = mesh.make(cfg.mesh, jax.devices()[: int(np.prod(mesh.shape(cfg.mesh)))])
    shapes = (
        "num_experts",
        "hidden",
        "hidden_classes",
        "latent",
        "shared_hidden",
        "shared_gate",
        "zero_experts",
        "soft_slots",
        "router_bias",
        "expert_bias",
    )
    moe = config.MoE(**{name: getattr(cfg.model.moe, name) for name in (*shapes, "router", "score", "top_k")})
    plain = dataclasses.replace(
        cfg.model, compute_dtype="float32", remat="none", loss_chunk=cfg.model.vocab_size, moe=moe
    )
    with jax.set_mesh(on), quick():
        built = state.build(cfg, on)
        values = jax.tree.map(jax.device_put, _parameters(plain, cfg.train.seed), built.shardings)
        moments = jax.jit(built.transform.init)(values)
        zero = jax.device_put(np.zeros((), np.int32), sharding.replicated(on))
        kept = jax.device_put(routing.init(cfg.model), sharding.replicated(on))
        watched = jax.device_put(guard.init(), sharding.replicated(on))
        return built, state.TrainState(zero, values, moments, kept, watched)


@functools.cache
def _parameters(model: config.Model, seed: int) -> Any:
    cfg = configure(**{"train.seed": seed})
    return on_host(create(dataclasses.replace(cfg, model=model)).parameters)


def create(cfg: config.Config) -> state.TrainState:
    """state.create, compiled quickly."""
    on = mesh.make(cfg.mesh, jax.devices()[: int(np.prod(mesh.shape(cfg.mesh)))])
    with quick():
        return state.create(state.build(cfg, on))


TRAFFIC_NUMBERS = {"moe/rows_sent", "moe/rounds", "moe/devices_visited", "moe/devices_visited_most"}


class Trace(NamedTuple):
    """What a few train steps leave, on the host."""

    sums: list
    numbers: list
    """The lines of metrics.jsonl."""
    gradients: Any
    """Of the first step, before clipping."""
    parameters: Any
    routing: Any
    """The routing state after the last step."""
    recorded: list
    """The routing of every step, empty unless the config records."""


def trace(cfg: config.Config, batches: list[dict[str, np.ndarray]], start: Any = None) -> Trace:
    """Trains on the batches. The gradient is read off AdamW's first moment, (1 - b1) times the clipped gradient."""
    run = build(cfg, batches[0]["tokens"].shape)
    now, gradients, sums, kept = jax.tree.map(lambda x: x.copy(), run.start), None, [], []
    if start is not None:
        put = lambda new, old: jax.device_put(np.asarray(new), old.sharding)  # noqa: E731
        now = dataclasses.replace(now, parameters=jax.tree.map(put, start, now.parameters))
    with jax.set_mesh(run.built.mesh):
        for host in batches:
            now, out, recorded = run.step(now, place(host, run.built.mesh))
            sums.append(metrics.to_host(out))
            kept.append(on_host(recorded))
            if gradients is None:
                scale = max(1.0, sums[0]["gradient_norm"] / cfg.train.clip_norm) / (1 - cfg.train.b1)
                gradients = jax.tree.map(lambda m: np.asarray(m) * scale, now.optimizer[1][0].mu)
    return Trace(sums, numbers_of(sums, cfg), gradients, on_host(now.parameters), on_host(now.routing), kept)


def numbers_of(sums: list, cfg: config.Config) -> list:
    """The lines of metrics.jsonl; from them and from the sums is taken what depends on the mesh."""
    numbers = [metrics.of_training(s, cfg.model.moe) for s in sums]
    for found, of_step in zip(numbers, sums, strict=True):
        for name in TRAFFIC_NUMBERS & found.keys():
            del found[name]
        without_traffic(of_step)
    return numbers


def without_traffic(sums: dict) -> dict:
    """The sums less what an exchange took, which depends on the mesh."""
    for layers in sums["layers"].values():
        for name in TRAFFIC & layers.keys():
            del layers[name]
    return sums


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def close(actual: Any, wanted: Any, rtol: float = 1e-5) -> None:
    """Integers exactly, reals up to rtol of the largest entry of their array."""
    actual, wanted = by_path(actual), by_path(wanted)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.dtype.kind in "iub":
            np.testing.assert_array_equal(actual[name], value, err_msg=name)
        else:
            atol = rtol * np.abs(value).max(initial=0)
            np.testing.assert_allclose(actual[name], value, rtol=0, atol=atol, err_msg=name)


def equal(actual: Any, wanted: Any) -> None:
    """Bit for bit."""
    actual, wanted = by_path(actual), by_path(wanted)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name].dtype == value.dtype and actual[name].tobytes() == value.tobytes(), name


# ---- text and processes ------------------------------------------------------------------------------------------

WORDS = ("router", "expert", "token", "gate", "slot", "load", "shard", "mesh", "of", "the", "a", "is")


def documents() -> list[source.Document]:
    """Forty short documents of two kinds."""
    rng = np.random.default_rng(5)
    found = []
    for i in range(40):
        words = rng.choice(WORDS, size=rng.integers(8, 30))
        found.append(source.Document(f"{i:02}", ("odd", "even")[i % 2], f"{i} {' '.join(words)}.\n".encode()))
    return found


def prepared(folder: pathlib.Path, tokens: tokenizer.Tokenizer = tokenizer.BYTES) -> pathlib.Path:
    """A prepared folder of the documents, about a quarter of them held out."""
    return prepare.prepare(documents(), folder, 0.25, tokens)


def flags(folder: pathlib.Path, **options: Any) -> list[str]:
    """The small config as command-line options of scripts/train.py on configs/tiny.py."""
    chosen = OPTIONS | {"model.unroll": 1, "data.source": "prepared", "data.files": str(folder)} | options
    return ["--config=configs/tiny.py", *(f"--config.{name}={value}" for name, value in chosen.items())]


PROGRAMS = pathlib.Path(os.environ["MOEJAX_TEST_PROGRAMS"]) if "MOEJAX_TEST_PROGRAMS" in os.environ else None
"""Where processes that tests start keep compiled programs for each other; conftest.py makes it."""


def start(
    script: str, *arguments: str, devices: int = 1, cache: pathlib.Path | None = PROGRAMS, quick: bool = True
) -> subprocess.Popen:
    """A script of scripts/, as a user starts it; programs in `cache` are not compiled again."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "COLUMNS")} | {"JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if quick:
        environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    if cache is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    pipe = subprocess.PIPE
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); a process that hangs is killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {seconds} s:\n{out}\n{err}") from None
    return process.returncode, out, err
