"""The files of a run of 10,000 steps, 48 sparse layers and 128 experts, made up: what a report of a large run has to carry.

python tests/report/large.py FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np

from moejax import config

STEPS, LAYERS, EXPERTS, LABELS, TOKENS, K = 10_000, 48, 128, 5, 4096, 8
SCALARS = (
    "train/cross_entropy", "train/loss", "train/load_balance", "train/router_z", "train/bits_per_byte", "train/targets",
    "train/gradient_norm", "train/skipped_steps", "moe/requested", "moe/drop_rate", "moe/reroute_rate", "moe/unserved", "moe/load_max",
    "moe/max_violation", "moe/gini", "moe/dead", "moe/entropy", "moe/confidence", "moe/margin", "moe/logit_rms", "moe/starved",
)  # fmt: skip


def write(folder: Path) -> Path:
    """A finished run, with everything that a run of this library leaves."""
    rng = np.random.default_rng(0)
    (folder / "routing").mkdir(parents=True)
    tree = config.to_dict(config.Config())
    tree["name"], tree["train"]["steps"], tree["model"]["repeats"] = "large", STEPS, LAYERS
    tree["model"]["moe"] |= {"num_experts": EXPERTS, "top_k": K}
    (folder / "config.json").write_text(json.dumps(tree))
    labels = [f"label {i}" for i in range(LABELS)]
    facts = {
        "plan": "made up",
        "parameters": {"total": 10**10, "active": 10**9},
        "labels": labels,
        "devices": ["cpu"] * 8,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    _lines(folder / "metrics.jsonl", rng)
    timing = [
        {"step": s, "seconds_per_step": 0.3 + 0.02 * rng.random(), "host_peak_bytes": 2e9 + s}
        for s in range(20, STEPS + 1, 20)
    ]
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing))
    ledgers = [
        {"event": "ledger", "step": s, "seconds": {"step": 0.3 * s, "save": 0.01 * s}}
        for s in range(500, STEPS + 1, 500)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledgers))
    for step in range(250, STEPS + 1, 250):
        np.savez_compressed(folder / "routing" / f"{step:08d}.npz", **_sums(rng))
        np.savez_compressed(folder / "routing" / f"probe_{step:08d}.npz", **_probe(rng))
    tables = {
        "labels": rng.poisson(50, (LAYERS, LABELS, EXPERTS)),
        "coactivation": rng.poisson(9, (LAYERS, EXPERTS, EXPERTS)),
    }
    np.savez_compressed(
        folder / "routing" / "heldout.npz", **_sums(rng), **{f"sparse.{k}": v for k, v in tables.items()}
    )
    return folder


def _lines(file: Path, rng: np.random.Generator) -> None:
    with open(file, "w") as out:
        for step in range(20, STEPS + 1, 20):
            values = 1 + 3 * np.exp(-step / 2000) + 0.1 * rng.random(len(SCALARS))
            out.write(json.dumps({"step": step} | dict(zip(SCALARS, values.tolist(), strict=True))) + "\n")
            if step % 250 == 0:
                out.write(
                    json.dumps({"step": step, "eval/bits_per_byte": 1 + 3 * np.exp(-step / 2000), "eval/churn": 0.1})
                    + "\n"
                )
        out.write(json.dumps({"step": STEPS, "heldout/bits_per_byte": 1.02, "heldout/moe/dead": 0}) + "\n")


def _sums(rng: np.random.Generator) -> dict[str, np.ndarray]:
    load = rng.poisson(300, (LAYERS, EXPERTS))
    whole = {name: load.sum(axis=1) for name in ("tokens", "requested", "routed")}
    real = {name: 0.5 * load.sum(axis=1) for name in ("entropy", "margin", "confidence", "dropped", "rerouted")}
    return {f"sparse.{name}": value for name, value in ({"load": load} | whole | real).items()}


def _probe(rng: np.random.Generator) -> dict[str, np.ndarray]:
    rows, positions = np.indices((TOKENS // 128, 128)).reshape(2, -1)
    drawn = {"tokens": rng.integers(32, 127, TOKENS), "labels": rows % LABELS, "rows": rows, "positions": positions}
    experts = rng.integers(0, EXPERTS, (LAYERS, TOKENS, K)).astype(np.int32)
    return drawn | {"experts": experts, "valid": np.ones(TOKENS, bool)}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
