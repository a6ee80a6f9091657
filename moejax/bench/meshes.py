"""The same experiment on every mesh: losses side by side, with the routing of one device played back and without.

With routing played back only rounding is left. Without, rounding decides near ties, and each decision moves the weights: so the flipped
assignments are counted, beside the margins that one device had for those tokens.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moejax import config
from moejax.arrays import NOWHERE
from moejax.bench import timing
from moejax.bench.protocol import FOLDER
from moejax.errors import UserError
from moejax.train import check
from moejax.train.recordings import FOLDER as ASSIGNMENTS

STEPS = 50
DEVICES = 8
MESHES: dict[str, tuple[config.Mesh, int]] = {
    "data 8": (config.Mesh(data=8), 1),
    "expert 8": (config.Mesh(expert=8), 1),
    "fsdp 2, expert 4": (config.Mesh(fsdp=2, expert=4), 1),
    "expert 4, tensor 2": (config.Mesh(expert=4, tensor=2), 1),
    "context 2, expert 4": (config.Mesh(context=2, expert=4), 1),
    "two processes": (config.Mesh(fsdp=2, expert=4), 2),
}
"""Mesh and number of processes."""
FINER = 4
"""Of the second setting: so many times as many experts and choices, each of a part of the width."""
RUNGS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, np.inf)
"""Margins between which flipped tokens are counted."""


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """The config as it is, and with finer experts. Runs that were done in FOLDER are read and not repeated."""
    moe = cfg.model.moe
    fine = {"num_experts": FINER * moe.num_experts, "top_k": FINER * moe.top_k, "hidden": moe.hidden // FINER}
    result: dict[str, Any] = {"steps": STEPS, "machine": timing.machine(), "settings": {}}
    for name, options in {"": {}, "finer experts": fine}.items():
        setting = _setting(cfg, options)
        moe = setting.model.moe
        label = name or "as configured"
        result["settings"][label] = {"num_experts": moe.num_experts, "top_k": moe.top_k} | _compare(setting, label)
    return result


def _setting(cfg: config.Config, options: dict[str, Any]) -> config.Config:
    """Short, logging every step, with few held-out rows: the losses of training are what is compared."""
    model = dataclasses.replace(cfg.model, unroll=1, moe=dataclasses.replace(cfg.model.moe, **options))
    train = dataclasses.replace(
        cfg.train, steps=STEPS, warmup=10, log_every=1, eval_every=STEPS, routing_every=STEPS, record_every=1
    )
    found = dataclasses.replace(cfg, model=model, train=train, data=dataclasses.replace(cfg.data, heldout=0.002))
    for mesh, _ in MESHES.values():
        check.check(dataclasses.replace(found, mesh=mesh))
    return found


def _compare(cfg: config.Config, label: str) -> dict[str, Any]:
    folder = FOLDER / "meshes" / label.replace(" ", "_")
    one = _train(cfg, config.Mesh(), 1, folder / "one")
    rows = {}
    for name, (mesh, processes) in MESHES.items():
        place = folder / name.replace(", ", "_").replace(" ", "")
        free = _train(cfg, mesh, processes, place)
        replay = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, replay=str(one)))
        played = _train(replay, mesh, processes, place.with_name(f"{place.name}_replay"))
        rows[name] = {
            "replay": _apart(one, played) | {"mismatched": _curve(played, "moe/mismatched").astype(int).tolist()},
            "free": _apart(one, free) | _flips(one, free),
        }
    return {"loss": _rounded(_curve(one, "train/loss")), "meshes": rows}


def _train(cfg: config.Config, mesh: config.Mesh, processes: int, workdir: Path) -> Path:
    """A run of its own processes, because the number of devices is fixed once a process has started."""
    if (workdir / "routing" / "heldout.npz").exists():
        return workdir
    workdir.mkdir(parents=True, exist_ok=True)
    asked = dataclasses.replace(cfg, mesh=mesh)
    (workdir / "asked.json").write_text(json.dumps(config.to_dict(asked)))
    experiment = workdir / "asked.py"
    experiment.write_text(
        "import json, pathlib\nfrom moejax import config\n\n\ndef get_config():\n    c = config.default()\n"
        "    c.update(json.loads(pathlib.Path(__file__).with_suffix('.json').read_text()))\n    return c\n"
    )
    devices = 1 if mesh == config.Mesh() else DEVICES // processes
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "scripts/train.py", f"--config={experiment}", f"--workdir={workdir}"]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            command += [f"--coordinator=localhost:{probe.getsockname()[1]}", f"--processes={processes}"]
    started = [
        subprocess.Popen(
            [*command, f"--process={i}"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for i in range(processes)
    ]
    for process in started:
        error = process.communicate()[1].decode()
        if process.returncode:
            raise UserError(f"{' '.join(command)} ended with {process.returncode}: {error.strip()[-400:]}")
    return workdir


def _curve(workdir: Path, name: str) -> np.ndarray:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return np.array([line[name] for line in lines if name in line], np.float64)


def _apart(one: Path, other: Path) -> dict[str, Any]:
    """Relative difference of the training loss, step by step."""
    loss, other_loss = _curve(one, "train/loss"), _curve(other, "train/loss")
    apart = np.abs(other_loss - loss) / np.abs(loss)
    return {"apart": _rounded(apart), "most_apart": float(f"{apart.max():.3g}")}


def _flips(one: Path, other: Path) -> dict[str, Any]:
    """Assignments that one device did not make, by step; and at the first step with any, their tokens by their margin there. Two
    choices of a token that change places are no flip."""
    number, first = [], None
    for step in range(1, STEPS + 1):
        a, b = (np.load(folder / ASSIGNMENTS / f"{step:08d}.npz") for folder in (one, other))
        margin = a["sparse.margin"]
        differs = (_choices(a, margin) != _choices(b, margin)).sum(axis=-1)
        number.append(int(differs.sum()))
        if first is None and number[-1]:
            of_token = margin[differs > 0]
            first = {
                "step": step,
                "requests": int(a["sparse.asked"].sum()),
                "by_margin": np.histogram(of_token, RUNGS)[0].tolist(),
                "largest_margin": float(f"{of_token.max():.3g}"),
            }
    return {"flipped": number, "first_flips": first}


def _choices(recorded: Any, margin: np.ndarray) -> np.ndarray:
    """The experts of every token [layers, groups, S, K] in order of their ids, -1 where a request lost its place or was none; another
    mesh may have padded the groups."""
    expert = np.where(recorded["sparse.slot"] == NOWHERE, -1, recorded["sparse.expert"])[:, : margin.shape[1]]
    return np.sort(expert.reshape(*margin.shape, -1), axis=-1)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{v:.4g}") for v in values]


def table(result: dict[str, Any]) -> str:
    """Largest relative difference of the loss, with replay and without, and flips."""
    lines = []
    for name, setting in result["settings"].items():
        lines.append(
            f"{name}: {setting['num_experts']} experts, top {setting['top_k']}, {result['steps']} steps, against one device"
        )
        lines.append(f"{'mesh':22}{'replay':>10}{'mismatched':>12}{'free':>10}{'flipped':>9}  first flips")
        for mesh, row in setting["meshes"].items():
            first = row["free"]["first_flips"]
            said = "none" if first is None else f"step {first['step']}, margins up to {first['largest_margin']:.1e}"
            lines.append(
                f"{mesh:22}{row['replay']['most_apart']:>10.1e}{sum(row['replay']['mismatched']):>12}"
                f"{row['free']['most_apart']:>10.1e}{sum(row['free']['flipped']):>9}  {said}"
            )
    return "\n".join(lines)


def draw(result: dict[str, Any]) -> bytes:
    """The picture of docs/experiments.md, as PNG: differences of the loss with and without replay, and flips, over the steps."""
    from moejax.report import figures  # matplotlib is an extra, and the numbers do not need it

    step = np.arange(1, result["steps"] + 1)
    settings = result["settings"]
    with figures.grid(11, 3 * len(settings), len(settings), 3) as (figure, axes):
        for row, setting in zip(axes, settings.values(), strict=True):
            said = []
            for i, (mesh, found) in enumerate(setting["meshes"].items()):
                style, free = figures.style_of(i), found["free"]
                for panel, kind in zip(row, ("replay", "free"), strict=False):
                    panel.plot(step, np.maximum(found[kind]["apart"], 1e-9), label=mesh, **style)
                row[2].plot(step, free["flipped"], **style)
                if free["first_flips"] is not None:
                    first = free["first_flips"]
                    tokens = sum(first["by_margin"])
                    said.append(
                        f"{mesh}: step {first['step']}, {tokens} token(s), margin {first['largest_margin']:.0e}"
                    )
            for panel, what in zip(row, ("replayed", "free", "free"), strict=True):
                panel.set_title(f"{setting['num_experts']} experts, top {setting['top_k']}, routing {what}", loc="left")
                panel.set_xlabel("step")
            for panel in row[:2]:
                panel.set_yscale("log")
                panel.set_ylim(1e-9, 1e-2)
                panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
                panel.axhline(1e-5, color=figures.INK, linewidth=0.8, linestyle=":")
            row[0].set_ylabel("loss, relative to one device")
            most = max(max(found["free"]["flipped"]) for found in setting["meshes"].values())
            row[2].set_ylim(0, max(1.3 * most, 1))
            row[2].yaxis.set_major_locator(figures.MaxNLocator(integer=True))
            row[2].set_ylabel("flipped assignments")
            row[2].text(
                0.02, 0.97, "first flips\n" + ("\n".join(said) or "none"), transform=row[2].transAxes, va="top", size=8
            )
        axes[0][0].legend(loc="upper left", ncols=2)
        return figures.png(figure)
