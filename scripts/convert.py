"""Published checkpoints in and out.

    --from_hf=DIR --workdir=DIR [--config=FILE]      a folder of safetensors files becomes step 0 of a new run
    --workdir=DIR --to_hf=DIR [--family=NAME]        the last checkpoint of a run becomes a folder that transformers loads

In: the model section is that of the checkpoint. Data, training and mesh are those of --config, and so are options of the model that no
evaluation depends on: balancing, transport, kernels, capacity in training, types and remat. Without --config they are the defaults, and
balancing is off. Weights go straight into their shards; optimiser moments are fresh. Where this machine does not have the devices of
config.mesh it is done on one. Train on with scripts/train.py --config=configs/of_run.py:WORKDIR --workdir=WORKDIR.

Out: in bf16 or fp32, never quantised. Biases that select experts are added up.

Example: python scripts/convert.py --from_hf=OLMoE-1B-7B --workdir=runs/olmoe
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from moejax import cli, config, mesh
from moejax.checkpoint.hugging_face import save
from moejax.checkpoint.hugging_face.files import read_json
from moejax.checkpoint.hugging_face.published import Published, open_published
from moejax.checkpoint.hugging_face.weights import BIAS
from moejax.errors import UserError
from moejax.train import check, saved, starts, state

CONFIG = cli.config_flag()
FROM_HF = flags.DEFINE_string("from_hf", None, "folder of a published checkpoint to read")
TO_HF = flags.DEFINE_string("to_hf", None, "folder to write; it must hold no checkpoint yet")
WORKDIR = flags.DEFINE_string("workdir", None, "of the run: a new one to begin, or the one to publish")
FAMILY = flags.DEFINE_string(
    "family", None, "model_type to write; by default what the run came from, or the first that fits"
)
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "of the weights that are written: bfloat16 or float32")
JSON = flags.DEFINE_bool("json", False, "print what was done, tensor by tensor, as JSON")

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def main() -> None:
    if (FROM_HF.value is None) == (TO_HF.value is None) or WORKDIR.value is None:
        raise UserError("give --workdir and one of --from_hf and --to_hf; see --help for an example")
    readers = {"config": "from_hf", "family": "to_hf", "dtype": "to_hf"}
    for name, direction in readers.items():
        if flags.FLAGS[name].present and flags.FLAGS[direction].value is None:
            raise UserError(f"--{name} does nothing without --{direction}; leave it out")
    workdir = Path(WORKDIR.value).expanduser()
    facts = bring_in(workdir) if FROM_HF.value is not None else bring_out(workdir)
    print(json.dumps(facts, indent=1) if JSON.value else said(facts))


# ---- in -----------------------------------------------------------------------------------------------------------


def bring_in(workdir: Path) -> dict[str, Any]:
    """A new run from a published checkpoint."""
    folder = Path(FROM_HF.value).expanduser()
    starts.require_new(workdir)
    published = open_published(folder)
    cfg = worded(configure(published), folder)
    check.check(cfg)
    built = build(cfg)
    begun, report = starts.of_published(built, published, Told())
    keep_beside(folder, workdir)
    number = sum(math.prod(leaf.shape) for leaf in starts.leaves_of_published(built).values())
    facts = facts_of("read", published.name, folder, workdir, number, report)
    cfg = worded(cfg, workdir / saved.TOKENIZER)
    starts.write(workdir, cfg, begun, "converted", **{name: value for name, value in facts.items() if name != "report"})
    return facts


def configure(published: Published) -> config.Config:
    """The config of the new run."""
    model = published.model
    if CONFIG.value is None:
        return dataclasses.replace(config.Config(), name=published.folder.name, model=model)
    given = cli.resolved(CONFIG)
    moe = dataclasses.replace(model.moe, **{name: getattr(given.model.moe, name) for name in save.MOE_FREE})
    own = {name: getattr(given.model, name) for name in ("compute_dtype", "remat")}
    return dataclasses.replace(given, model=dataclasses.replace(model, moe=moe, **own))


def worded(cfg: config.Config, folder: Path) -> config.Config:
    """Text in the vocabulary that lies in a folder, where one does."""
    if not (folder / "tokenizer.json").is_file():
        return cfg
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=str(folder)))


def build(cfg: config.Config) -> state.Built:
    """On the mesh of the config if its devices are there, else on one device."""
    here = math.prod(mesh.shape(cfg.mesh)) == len(jax.devices())
    cfg = cfg if here else dataclasses.replace(cfg, mesh=config.Mesh())
    on = mesh.make(cfg.mesh, jax.devices() if here else jax.devices()[:1])
    with jax.set_mesh(on):
        return state.build(cfg, on)


class Told:
    """Tells every tenth of what is read."""

    def __init__(self) -> None:
        self._tenths = 0

    def __call__(self, done: int, total: int) -> None:
        if not JSON.value and done * 10 // total > self._tenths:
            self._tenths = done * 10 // total
            print(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr)


def keep_beside(folder: Path, workdir: Path) -> None:
    """Tokenizer files, and config.json for its token ids."""
    there = [name for name in (*FILES, "config.json") if (folder / name).is_file()]
    (workdir / saved.TOKENIZER).mkdir(parents=True, exist_ok=True)
    for name in there:
        shutil.copyfile(folder / name, workdir / saved.TOKENIZER / name)


# ---- out ----------------------------------------------------------------------------------------------------------


def bring_out(workdir: Path) -> dict[str, Any]:
    """A published checkpoint from the last of a run."""
    folder = Path(TO_HF.value).expanduser()
    cfg = saved.read_config(workdir)
    model = cfg.model
    with saved.checkpoint(workdir, cfg) as (checkpoints, step):
        there = checkpoints.shapes(step)
        biases = [path for name in ("selection_bias", *save.BIASES) if (path := f"routing/sparse/{name}") in there]
        shapes = {path: leaf for path, leaf in there.items() if path.startswith("parameters/")}
        shapes |= {BIAS: there[biases[0]]} if biases else {}

        def read(path: str) -> np.ndarray:
            names = biases if path == BIAS else [path]
            found = checkpoints.load_arrays(step, lambda name: name in names)
            return np.sum([found[name] for name in names], axis=0) if path == BIAS else found[path]

        before = (
            read_json(workdir / saved.TOKENIZER / "config.json")
            if (workdir / saved.TOKENIZER / "config.json").is_file()
            else {}
        )
        family = FAMILY.value or before.get("model_type") or first_fitting(model)
        report = save.save(
            folder, model, shapes, read, family=family, dtype=DTYPE.value, before=before.get("text_config", before)
        )
    for name in FILES:
        if (workdir / saved.TOKENIZER / name).is_file():
            shutil.copyfile(workdir / saved.TOKENIZER / name, folder / name)
    number = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
    return facts_of("written", family, workdir, folder, number, report)


def first_fitting(model: config.Model) -> str:
    """The family to write where nobody said one."""
    found = save.fitting(model)
    if not found:
        raise UserError(
            "no published family computes this model; --family=NAME says what stands in the way of that one"
        )
    return found[0]


def facts_of(
    done: str, family: str, source: Path, target: Path, number: int, report: list[dict[str, str]]
) -> dict[str, Any]:
    whys: dict[str, int] = {}
    for row in report:
        whys[row["why"]] = whys.get(row["why"], 0) + 1
    return {
        "done": done, "family": family, "from": str(source), "to": str(target), "numbers": number, "tensors": whys, "report": report,
    }  # fmt: skip


def said(facts: dict[str, Any]) -> str:
    """The summary: one line, and one for each thing that became of tensors."""
    head = f"{facts['family']} {facts['done']}: {facts['from']} -> {facts['to']}, {facts['numbers']:,} numbers"
    return "\n".join((head, *(f"  {number:6}  {why}" for why, number in facts["tensors"].items())))


if __name__ == "__main__":
    cli.run(main)
